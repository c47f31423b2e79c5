"""One decode or verify step of a mixer layer in one launch: the Triton form of `replay.replay` for short rows.

Shapes: M tokens of the step, R rows (sequences), T tokens of a row, H query heads, G key/value heads, S state heads,
K = H/S query heads of a state, P head width, N state width, W ring rows, w the window; in the kernel J stands for the
far rows at the positions [end - W, end - w), W for the window's at [start - w, start), I for the step's new rows and Q
for the (head, token) pairs of a program.

With p the position of a row's first token, end = p + T, c the checkpoint position of its slot and

    s_j = sum of A dt over the rows c..j,   e = t - w  (newest row that the state sees at position t)

    near_t = softmax over rows (t - w, t] of N^(-1/2) C_t . B_j, times x_j
    far_t  = exp(s_e) S C_t + sum_{c <= j <= e} exp(s_e - s_j) dt_j (B_j . C_t) x_j + D x_e
    flush to c' = end - rewind - w, iff end + step - c > W:
             S <- exp(s_{c'-1}) S + sum_{c <= j < c'} exp(s_{c'-1} - s_j) dt_j x_j B_j^T

A program owns (row, state, slice of P): one pass over N reads its tile of the state and makes the scores of the far
rows and of the window. A program reads and writes the checkpoint positions of its own tiles only, the ring rows that
it writes are none that a step reads (`slot.py`), so programs need not wait for each other. Products keep Q, of which
there are few, in the tensor cores' M: `docs/kernels.md` says why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checkpoint import checkpoint
from .launch import case_of, precision, tuned
from .slot import MOST_TOKENS, SlotLayout, SlotTensors


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _read(c_QN, state_NP, acc_QP, PRECISION: tl.constexpr):
    """acc + C S^T, for a state of another type in fp32."""
    if state_NP.dtype == c_QN.dtype:
        return _dot(c_QN, state_NP, acc_QP, PRECISION)
    return _dot(c_QN.to(tl.float32), state_NP.to(tl.float32), acc_QP, PRECISION)


@triton.jit
def _sum_after(a_QJ, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr):
    """Of every row the sum of those after it, as a product with ones."""
    j_J = tl.arange(0, BLOCK_J)
    after_JJ = (j_J[:, None] > j_J[None, :]).to(tl.float32)
    if PRECISION == "ieee":
        return tl.dot(a_QJ, after_JJ, input_precision="ieee")
    # tf32 is 10 bits of mantissa: ones are exact in it, the rest is split into what it holds and what it leaves
    high_QJ = (a_QJ.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    sum_QJ = tl.dot(a_QJ - high_QJ, after_JJ, input_precision="tf32")
    return tl.dot(high_QJ, after_JJ, sum_QJ, input_precision="tf32")


@triton.jit
def _stochastic_bf16(value, seed, offset):
    """Round fp32 to bf16 up or down at random, so that the expectation is the value."""
    bits = value.to(tl.int32, bitcast=True) + (tl.randint(seed, offset) & 0xFFFF).to(tl.int32)
    return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _verify(
    state_ptr, position_ptr, x_ring_ptr, b_ring_ptr, dt_ring_ptr,
    state_stride, position_stride, x_ring_stride, b_ring_stride, dt_ring_stride,
    slot_ptr, start_ptr, first_ptr,
    x_ptr, dt_ptr, b_ptr, c_ptr, x_stride, dt_stride, b_stride, c_stride,
    A_ptr, D_ptr, near_ptr, far_ptr, scale, seed,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    W: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr, REWIND: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
    EAGER: tl.constexpr, STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = H // S
    PER_GROUP: tl.constexpr = S // G
    TILES: tl.constexpr = (P + 15) // 16
    BLOCK_Q: tl.constexpr = BLOCK_K * BLOCK_T
    BLOCK_I: tl.constexpr = BLOCK_T if BLOCK_T > 16 else 16  # new rows, as many as a product needs
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # the operand type of products with fp32 weights: fp16 could overflow, bf16 has fp32's range
    WEIGHT: tl.constexpr = DTYPE if tl.bfloat16 == DTYPE else tl.float32
    EXACT: tl.constexpr = "tf32x3" if PRECISION == "tf32" else PRECISION

    row = tl.program_id(1)
    slices: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    s = tl.program_id(0) // slices
    p0 = tl.program_id(0) % slices * BLOCK_P
    g = s // PER_GROUP
    slot = tl.load(slot_ptr + row).to(tl.int64)
    m0 = tl.load(first_ptr + row).to(tl.int64)
    T = (tl.load(first_ptr + row + 1) - m0).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    if (slot < 0) | (T <= 0) | (T > STEP) | (T > BLOCK_T):
        return
    end = start + T

    p_P = p0 + tl.arange(0, BLOCK_P)
    n_N = tl.arange(0, BLOCK_N)
    n_C = tl.arange(0, BLOCK_C)
    in_P = p_P < P
    in_N = n_N < N
    x_ptr += m0 * x_stride + g * P
    b_ptr += m0 * b_stride + g * N
    dt_ptr += m0 * dt_stride + s
    state_ptr += slot * state_stride + s.to(tl.int64) * P * N
    position_ptr += slot * position_stride + s * TILES + p0 // 16
    x_ring_ptr += slot * x_ring_stride + g * P
    b_ring_ptr += slot * b_ring_stride + g * N
    dt_ring_ptr += slot * dt_ring_stride + s
    c = tl.load(position_ptr)

    # new rows, which go into the ring at the end: x by the group's first program of each slice, B by that of the first
    i_I = tl.arange(0, BLOCK_I)
    x_IP = tl.load(x_ptr + i_I[:, None] * x_stride + p_P[None, :], mask=(i_I < T)[:, None] & in_P[None, :], other=0)
    dt_I = tl.load(dt_ptr + i_I * dt_stride, mask=i_I < T)
    if WINDOW > 0:
        b_ptr_I = b_ptr + i_I * b_stride
        w_W = tl.arange(0, BLOCK_W)
        at_W = start - WINDOW + w_W
        live_W = (at_W >= 0) & (w_W < WINDOW)
        x_ptr_W = x_ring_ptr + at_W % W * (G * P)
        b_ptr_W = b_ring_ptr + at_W % W * (G * N)
        x_WP = tl.load(x_ptr_W[:, None] + p_P[None, :], mask=live_W[:, None] & in_P[None, :], other=0)

    # far rows: from the ring below `start`, with a window shorter than the step from the new rows too
    c = checkpoint(c, start, W, WINDOW, STEP)
    j_J = tl.arange(0, BLOCK_J)
    at_J = end - W + j_J
    live_J = (at_J >= c) & (at_J < end - WINDOW)
    load_J = live_J
    if EAGER:  # do not wait for c
        load_J = (at_J >= 0) & (at_J < end - WINDOW)
    x_ptr_J = x_ring_ptr + at_J % W * (G * P)
    b_ptr_J = b_ring_ptr + at_J % W * (G * N)
    dt_ptr_J = dt_ring_ptr + at_J % W * S
    if WINDOW < STEP:
        x_ptr_J = tl.where(at_J >= start, x_ptr + (at_J - start) * x_stride, x_ptr_J)
        b_ptr_J = tl.where(at_J >= start, b_ptr + (at_J - start) * b_stride, b_ptr_J)
        dt_ptr_J = tl.where(at_J >= start, dt_ptr + (at_J - start) * dt_stride, dt_ptr_J)
    x_JP = tl.load(x_ptr_J[:, None] + p_P[None, :], mask=load_J[:, None] & in_P[None, :], other=0)
    dt_J = tl.where(live_J, tl.load(dt_ptr_J, mask=load_J, other=0), 0)
    a_J = dt_J * tl.load(A_ptr + s)

    # queries: Q = (head of the state, token), some heads at a time
    q_Q = tl.arange(0, BLOCK_Q)
    t_Q = q_Q % BLOCK_T
    e_Q = start + t_Q - WINDOW
    tile_CP = n_C[:, None] + p_P[None, :] * N
    for k0 in tl.static_range(0, K, BLOCK_K):
        k_Q = k0 + q_Q // BLOCK_T
        h_Q = s * K + k_Q
        in_Q = (k_Q < K) & (t_Q < T)
        c_ptr_Q = c_ptr + (m0 + t_Q) * c_stride + h_Q * N
        D_Q = tl.load(D_ptr + h_Q, mask=in_Q, other=0)

        # one pass over N: what the state says, and the scores of far rows and window. Loaded with N first: a transposed
        # operand is converted where it is loaded, and what is loaded after it then waits for it
        read_QP = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        far_QJ = tl.zeros((BLOCK_Q, BLOCK_J), tl.float32)
        near_QW = tl.zeros((BLOCK_Q, BLOCK_W), tl.float32)
        new_QI = tl.zeros((BLOCK_Q, BLOCK_I), tl.float32)
        for n0 in tl.range(0, N, BLOCK_C, num_stages=STAGES):
            in_C = n_C < N - n0
            b_CJ = tl.load(b_ptr_J[None, :] + (n0 + n_C)[:, None], mask=in_C[:, None] & load_J[None, :], other=0)
            if WINDOW > 0:
                b_CW = tl.load(b_ptr_W[None, :] + (n0 + n_C)[:, None], mask=in_C[:, None] & live_W[None, :], other=0)
                b_CI = tl.load(b_ptr_I[None, :] + (n0 + n_C)[:, None], mask=in_C[:, None] & (i_I < T)[None, :], other=0)
            state_CP = tl.load(state_ptr + n0 + tile_CP, mask=in_C[:, None] & in_P[None, :], other=0)
            c_QC = tl.load(c_ptr_Q[:, None] + (n0 + n_C)[None, :], mask=in_Q[:, None] & in_C[None, :], other=0)
            if EAGER:
                b_CJ = tl.where(live_J[None, :], b_CJ, 0)
            far_QJ = _dot(c_QC, b_CJ, far_QJ, PRECISION)
            if WINDOW > 0:
                near_QW = _dot(c_QC, b_CW, near_QW, PRECISION)
                new_QI = _dot(c_QC, b_CI, new_QI, PRECISION)
            read_QP = _read(c_QC, state_CP, read_QP, PRECISION)

        # far: decays by a product with ones, since a row decays by all that follow it up to e
        seen_QJ = live_J[None, :] & (at_J[None, :] <= e_Q[:, None])
        a_QJ = tl.where(seen_QJ, a_J[None, :], 0)
        decay_QJ = tl.where(seen_QJ, tl.exp(_sum_after(a_QJ, BLOCK_J, PRECISION)), 0) * dt_J[None, :]
        newest_QJ = live_J[None, :] & (at_J[None, :] == e_Q[:, None])
        far_QJ = far_QJ * decay_QJ + tl.where(newest_QJ, D_Q[:, None], 0)
        far_QP = tl.where(c > 0, read_QP * tl.exp(tl.sum(a_QJ, 1))[:, None], 0)
        far_JP = tl.where(live_J[:, None], x_JP, 0) if EAGER else x_JP
        far_QP = _dot(far_QJ.to(WEIGHT), far_JP.to(WEIGHT), far_QP, PRECISION)
        out_QP = (m0 + t_Q)[:, None] * (H * P) + (h_Q * P)[:, None] + p_P[None, :]
        out_mask = in_Q[:, None] & in_P[None, :]
        tl.store(far_ptr + out_QP, far_QP, mask=out_mask)

        if WINDOW > 0:
            in_window_QW = live_W[None, :] & (at_W[None, :] > e_Q[:, None])
            in_window_QI = (i_I[None, :] <= t_Q[:, None]) & (i_I[None, :] > (t_Q - WINDOW)[:, None])
            near_QW = tl.where(in_window_QW, near_QW * scale, float("-inf"))
            new_QI = tl.where(in_window_QI, new_QI * scale, float("-inf"))
            most_Q = tl.maximum(tl.max(near_QW, 1), tl.max(new_QI, 1))
            near_QW = tl.exp(near_QW - most_Q[:, None])
            new_QI = tl.exp(new_QI - most_Q[:, None])
            near_QP = _dot(near_QW.to(WEIGHT), x_WP.to(WEIGHT), tl.zeros((BLOCK_Q, BLOCK_P), tl.float32), PRECISION)
            near_QP = _dot(new_QI.to(WEIGHT), x_IP.to(WEIGHT), near_QP, PRECISION)
            near_QP = near_QP / (tl.sum(near_QW, 1) + tl.sum(new_QI, 1))[:, None]
            tl.store(near_ptr + out_QP, near_QP, mask=out_mask)

    # flush: rare, so it reads its operands again (from L2) rather than keep registers
    if end + STEP - c > W:
        to = end - REWIND - WINDOW
        SUB_P: tl.constexpr = BLOCK_P if BLOCK_P < 32 else 32
        SUBS: tl.constexpr = BLOCK_P // SUB_P
        gone_J = live_J & (at_J < to)
        step_J = tl.where(gone_J, dt_J, 0)
        fade_J = tl.where(gone_J, a_J, 0)
        later_J = tl.max(_sum_after(tl.broadcast_to(fade_J[None, :], (16, BLOCK_J)), BLOCK_J, PRECISION), 0)
        gain_J = tl.exp(later_J) * step_J
        keep = tl.exp(tl.sum(fade_J, 0))
        for tile in tl.range(0, SUBS * ((N + BLOCK_F - 1) // BLOCK_F), num_stages=1):
            p_V = p0 + tile % SUBS * SUB_P + tl.arange(0, SUB_P)
            n_F = tile // SUBS * BLOCK_F + tl.arange(0, BLOCK_F)
            tile_VF = p_V[:, None] * N + n_F[None, :]
            in_VF = (p_V < P)[:, None] & (n_F < N)[None, :]
            held_F = n_F < tl.where(c > 0, N, 0)
            new_VF = tl.load(state_ptr + tile_VF, mask=(p_V < P)[:, None] & held_F[None, :], other=0).to(tl.float32)
            gone_JV = tl.load(x_ptr_J[:, None] + p_V[None, :], mask=gone_J[:, None] & (p_V < P)[None, :], other=0)
            gone_JF = tl.load(b_ptr_J[:, None] + n_F[None, :], mask=gone_J[:, None] & (n_F < N)[None, :], other=0)
            gained_JV = gone_JV.to(tl.float32) * gain_J[:, None]
            new_VF = new_VF * keep
            if tl.bfloat16 == DTYPE:
                # x dt exp(..) as the sum of two bf16, so that the state gains fp32's leading 16 bits
                high_JV = gained_JV.to(tl.bfloat16)
                low_JV = (gained_JV - high_JV.to(tl.float32)).to(tl.bfloat16)
                new_VF = _dot(tl.trans(high_JV), gone_JF, new_VF, PRECISION)
                new_VF = _dot(tl.trans(low_JV), gone_JF, new_VF, PRECISION)
            else:
                new_VF = tl.dot(tl.trans(gained_JV), gone_JF.to(tl.float32), new_VF, input_precision=EXACT)
            if STOCHASTIC:
                # by position, slot and element: no two roundings of a state share their random bits
                rounded_VF = _stochastic_bf16(new_VF, seed + to, slot * (S * P * N) + s * (P * N) + tile_VF)
                tl.store(state_ptr + tile_VF, rounded_VF, mask=in_VF)
            else:
                tl.store(state_ptr + tile_VF, new_VF, mask=in_VF)
        c = to
    tile_T = tl.arange(0, BLOCK_P // 16)
    tl.store(
        position_ptr + tile_T,
        tl.zeros((BLOCK_P // 16,), tl.int32) + c,
        mask=p0 // 16 + tile_T < TILES,
    )
    ring_I = (start + i_I) % W
    first_I = i_I < tl.where(s % PER_GROUP == 0, T, 0)
    whole_I = i_I < tl.where((s % PER_GROUP == 0) & (p0 == 0), T, 0)
    tl.store(x_ring_ptr + ring_I[:, None] * (G * P) + p_P[None, :], x_IP, mask=first_I[:, None] & in_P[None, :])
    in_IN = whole_I[:, None] & in_N[None, :]
    b_IN = tl.load(b_ptr + i_I[:, None] * b_stride + n_N[None, :], mask=in_IN)
    tl.store(b_ring_ptr + ring_I[:, None] * (G * N) + n_N[None, :], b_IN, mask=in_IN)
    tl.store(dt_ring_ptr + ring_I * S, dt_I, mask=i_I < tl.where(p0 == 0, T, 0))


@dataclass(frozen=True)
class VerifyLaunch:
    """How a step is cut into programs.

    Args:
        block_p: rows of a state tile, a multiple of 16.
        block_c: columns of a state tile, read at once.
        warps, stages: of a program; stages is the depth of the pipeline over the state's columns.
        registers: most of a thread, so that more programs fit a multiprocessor (NVIDIA only); None for no limit.
        eager: load all far rows without waiting for the checkpoint position (small batches).
    """

    block_p: int = 64
    block_c: int = 64
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    eager: bool = False


def launch_case(layout: SlotLayout, max_tokens: int) -> str:
    """The launch table's name of a step of so many tokens a row."""
    queries = layout.query_heads // layout.state_heads * triton.next_power_of_2(max_tokens)
    far = triton.next_power_of_2(layout.ring - layout.window)
    return case_of(queries, (layout.head_dim, layout.state_size), layout.window, far)


def launch_of(layout: SlotLayout, rows: int, max_tokens: int, x: Tensor) -> VerifyLaunch:
    """The launch of a step on so many rows: from the table of x's GPU, else by how much work there is."""
    states = rows * layout.state_heads
    if x.element_size() == 2:
        found = tuned(x.device, launch_case(layout, max_tokens), states)
        if found is not None:
            return VerifyLaunch(**found)
    if states <= 256:
        return VerifyLaunch(block_p=32, block_c=128 if x.element_size() == 2 else 32, stages=1, eager=True)
    return VerifyLaunch()


def verify(
    slots: SlotTensors,
    layout: SlotLayout,
    slot_R: Tensor,
    start_R: Tensor,
    first_R1: Tensor,
    x_MGP: Tensor,
    dt_MS: Tensor,
    A_S: Tensor,
    B_MGN: Tensor,
    C_MHN: Tensor,
    D_H: Tensor,
    *,
    max_tokens: int,
    near_MHP: Tensor | None = None,
    far_MHP: Tensor | None = None,
    seed: int | None = None,
    launch: VerifyLaunch | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Advance a ragged batch of decode or verify rows and update their slots in place; see `replay.replay`.

    Nothing is read on the host, so a CUDA graph can hold it. Rows without tokens, with a negative slot or with
    more than layout.step tokens (a prefill's) are left alone, their outputs unwritten.

    Args:
        slots: the layer's slots, views with any distance between slots.
        layout: their layout; head_dim and state_size a multiple of 16.
        slot_R: int32 or int64, slot of each row, no slot twice.
        start_R: int32 or int64, position of each row's first token.
        first_R1: int32 or int64 (R + 1), where each row's tokens begin among the M.
        x_MGP, B_MGN, C_MHN: values, keys and queries of one dtype; the last two dimensions contiguous.
        dt_MS: step sizes after softplus, fp32.
        A_S, D_H: decay rates (negative) and skip weights, fp32.
        max_tokens: tokens of the longest row to serve here, at most layout.step and 16.
        near_MHP, far_MHP: where to write, contiguous, any float dtype; allocated in C's dtype when None.
        seed: rounds a bf16 state up or down at random on a flush; None rounds to the nearest.
        launch: how to cut the step into programs; from the table of this GPU when None.

    Returns:
        near (M, H, P) or None without a window, and far (M, H, P).

    Raises:
        ValueError: more tokens a row than the layout or the kernel takes, a width it cannot cut.
    """
    G, S, H = layout.groups, layout.state_heads, layout.query_heads
    P, N, R = layout.head_dim, layout.state_size, slot_R.shape[0]
    if max_tokens > min(layout.step, MOST_TOKENS):
        raise ValueError(f"rows of {max_tokens} tokens; the layout takes {layout.step}, the kernel {MOST_TOKENS}")
    if P % 16 or N % 16:
        raise ValueError(f"head_dim {P} and state_size {N} must be multiples of 16")
    for name, t in (("x", x_MGP), ("B", B_MGN), ("C", C_MHN)):
        if t.stride(-1) != 1 or (t.shape[1] > 1 and t.stride(1) != t.shape[2]):
            raise ValueError(f"{name} of strides {t.stride()}: its last two dimensions must be contiguous")
    if seed is not None and slots.state.dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for a bf16 state, this one is {slots.state.dtype}")
    far_MHP = C_MHN.new_empty(*C_MHN.shape[:2], P) if far_MHP is None else far_MHP
    if layout.window and near_MHP is None:
        near_MHP = torch.empty_like(far_MHP)
    launch = launch or launch_of(layout, R, max_tokens, x_MGP)
    block_p = min(launch.block_p, triton.next_power_of_2(P))
    block_c = min(launch.block_c, triton.next_power_of_2(N))
    block_t = triton.next_power_of_2(max_tokens)
    # at most 32 queries at a time: 64 spill, and on four warps they would become wgmma (docs/kernels.md)
    block_k = min(triton.next_power_of_2(H // S), max(32 // block_t, 1))
    block_t = max(block_t, 16 // block_k)
    _verify[(S * triton.cdiv(P, block_p), R)](
        slots.state, slots.position, slots.x, slots.b, slots.dt,
        slots.state.stride(0), slots.position.stride(0), slots.x.stride(0), slots.b.stride(0), slots.dt.stride(0),
        slot_R, start_R, first_R1,
        x_MGP, dt_MS, B_MGN, C_MHN, x_MGP.stride(0), dt_MS.stride(0), B_MGN.stride(0), C_MHN.stride(0),
        A_S, D_H, far_MHP if near_MHP is None else near_MHP, far_MHP, N**-0.5, seed or 0,
        G=G, S=S, H=H, P=P, N=N, W=layout.ring, WINDOW=layout.window, STEP=layout.step, REWIND=layout.rewind,
        BLOCK_P=block_p, BLOCK_N=max(triton.next_power_of_2(N), 16),
        BLOCK_J=max(triton.next_power_of_2(layout.ring - layout.window), 16),
        BLOCK_W=max(triton.next_power_of_2(layout.window), 16),
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_C=block_c, BLOCK_F=min(128, triton.next_power_of_2(N)),
        EAGER=launch.eager, STOCHASTIC=seed is not None, PRECISION=precision(x_MGP), STAGES=launch.stages,
        num_warps=launch.warps, **({} if launch.registers is None else {"maxnreg": launch.registers}),
    )  # fmt: skip
    return near_MHP if layout.window else None, far_MHP

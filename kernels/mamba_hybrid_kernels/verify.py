"""One decode or verify step of a mixer layer in one launch: the Triton form of `replay.replay` for short rows.

Shapes: M tokens of the step, R rows (sequences), T tokens of a row, J ring rows at the positions
[end - W, end), H query heads, G key/value heads, S state heads, K = H/S query heads of a state, P head width,
N state width, W ring rows, w the window; in the kernel Q stands for the (head, token) pairs of a program.

With p the position of a row's first token, end = p + T, c the checkpoint position of its slot and

    s_j = sum of A dt over the rows c..j,   e = t - w  (newest row that the state sees at position t)

    near_t = softmax over rows (t - w, t] of N^(-1/2) C_t . B_j, times x_j
    far_t  = exp(s_e) S C_t + sum_{c <= j <= e} exp(s_e - s_j) dt_j (B_j . C_t) x_j + D x_e
    flush to c' = end - rewind - w, iff end + step - c > W:
             S <- exp(s_{c'-1}) S + sum_{c <= j < c'} exp(s_{c'-1} - s_j) dt_j x_j B_j^T

A program owns (row, states of one group, slice of P): it streams its tiles of the state once, and the scores B_j . C_t
serve the window, the replay and D. Everything is transposed, (J, Q) and (P, Q), so that the long sides feed the
tensor cores' M. A program reads and writes the checkpoint positions of its own tiles only, the ring rows it
writes are none that a step reads (`slot.py`), so programs need not wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_of, precision
from .slot import SlotLayout, SlotTensors

MOST_TOKENS = 16  # of a row in one step


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, STATES: tl.constexpr,
    EAGER: tl.constexpr, STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = H // S
    PER_GROUP: tl.constexpr = S // G
    TILES: tl.constexpr = (P + 15) // 16
    BLOCK_Q: tl.constexpr = BLOCK_S * BLOCK_K * BLOCK_T
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # the operand type of products with fp32 weights: fp16 could overflow, bf16 has fp32's range
    WEIGHT: tl.constexpr = DTYPE if tl.bfloat16 == DTYPE else tl.float32

    row = tl.program_id(1)
    slices: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    s0 = tl.program_id(0) // slices * STATES
    p0 = tl.program_id(0) % slices * BLOCK_P
    g = s0 // PER_GROUP
    slot = tl.load(slot_ptr + row).to(tl.int64)
    m0 = tl.load(first_ptr + row).to(tl.int64)
    T = (tl.load(first_ptr + row + 1) - m0).to(tl.int32)
    start = tl.load(start_ptr + row).to(tl.int32)
    if (slot < 0) | (T <= 0) | (T > STEP) | (T > BLOCK_T):
        return
    end = start + T

    p_P = p0 + tl.arange(0, BLOCK_P)
    in_P = p_P < P
    state_ptr += slot * state_stride + s0.to(tl.int64) * P * N
    position_ptr += slot * position_stride + s0 * TILES + p0 // 16
    x_ring_ptr += slot * x_ring_stride + g * P
    b_ring_ptr += slot * b_ring_stride + g * N
    dt_ring_ptr += slot * dt_ring_stride + s0
    c = tl.load(position_ptr)
    c = tl.where(start == 0, 0, c)

    # queries: Q = (state, head of the state, token)
    q_Q = tl.arange(0, BLOCK_Q)
    state_Q = q_Q // (BLOCK_K * BLOCK_T)
    k_Q = q_Q // BLOCK_T % BLOCK_K
    t_Q = q_Q % BLOCK_T
    h_Q = (s0 + state_Q) * K + k_Q
    in_Q = (state_Q < STATES) & (k_Q < K) & (t_Q < T)
    c_ptr_Q = c_ptr + (m0 + t_Q) * c_stride + h_Q * N

    # rows: from the ring below `start`, from this step's tokens above
    j_J = tl.arange(0, BLOCK_J)
    at_J = end - W + j_J
    live_J = (at_J >= c) & (at_J < end)
    used_J = live_J
    if WINDOW > 0:
        used_J = (at_J >= tl.maximum(tl.minimum(c, start - WINDOW + 1), 0)) & (at_J < end)
    load_J = used_J
    if EAGER:  # do not wait for c
        load_J = (at_J >= 0) & (at_J < end)
    new_J = (at_J >= start) & (at_J < end)
    ring_J = (at_J + W) % W
    token_J = m0 + (at_J - start)
    x_ptr_J = tl.where(new_J, x_ptr + token_J * x_stride + g * P, x_ring_ptr + ring_J * (G * P))
    b_ptr_J = tl.where(new_J, b_ptr + token_J * b_stride + g * N, b_ring_ptr + ring_J * (G * N))
    x_JP = tl.load(x_ptr_J[:, None] + p_P[None, :], mask=load_J[:, None] & in_P[None, :], other=0)
    s_S = tl.arange(0, BLOCK_S)
    dt_ptr_J = tl.where(new_J, dt_ptr + token_J * dt_stride + s0, dt_ring_ptr + ring_J * S)
    dt_JS = tl.load(dt_ptr_J[:, None] + s_S[None, :], mask=load_J[:, None] & (s_S < STATES)[None, :], other=0)
    A_S = tl.load(A_ptr + s0 + s_S, mask=s_S < STATES, other=0)

    # what the state says, and the scores, which serve the window and the replay
    n_C = tl.arange(0, BLOCK_C)
    tile_PC = p_P[:, None] * N + n_C[None, :]
    read_PQ = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    score_JQ = tl.zeros((BLOCK_J, BLOCK_Q), tl.float32)
    if STATES == 1:
        for n0 in tl.range(0, N, BLOCK_C, num_stages=STAGES):
            in_C = n_C < N - n0
            c_QC = tl.load(c_ptr_Q[:, None] + (n0 + n_C)[None, :], mask=in_Q[:, None] & in_C[None, :], other=0)
            state_PC = tl.load(state_ptr + n0 + tile_PC, mask=in_P[:, None] & in_C[None, :], other=0)
            b_JC = tl.load(b_ptr_J[:, None] + (n0 + n_C)[None, :], mask=load_J[:, None] & in_C[None, :], other=0)
            if EAGER:
                b_JC = tl.where(used_J[:, None], b_JC, 0)
            score_JQ = _dot(b_JC, tl.trans(c_QC), score_JQ, PRECISION)
            if state_ptr.dtype.element_ty == DTYPE:
                read_PQ = _dot(state_PC, tl.trans(c_QC), read_PQ, PRECISION)
            else:
                read_PQ = _dot(state_PC.to(tl.float32), tl.trans(c_QC.to(tl.float32)), read_PQ, PRECISION)
    else:
        n_N = tl.arange(0, BLOCK_N)
        in_N = n_N < N
        c_QN = tl.load(c_ptr_Q[:, None] + n_N[None, :], mask=in_Q[:, None] & in_N[None, :], other=0)
        b_JN = tl.load(b_ptr_J[:, None] + n_N[None, :], mask=load_J[:, None] & in_N[None, :], other=0)
        CHUNKS: tl.constexpr = (N + BLOCK_C - 1) // BLOCK_C
        for it in tl.range(0, STATES * CHUNKS, num_stages=STAGES):
            i = it // CHUNKS
            n0 = it % CHUNKS * BLOCK_C
            in_C = n_C < N - n0
            own_Q = in_Q & (state_Q == i)
            c_QC = tl.load(c_ptr_Q[:, None] + (n0 + n_C)[None, :], mask=own_Q[:, None] & in_C[None, :], other=0)
            state_PC = tl.load(state_ptr + i * (P * N) + n0 + tile_PC, mask=in_P[:, None] & in_C[None, :], other=0)
            if state_ptr.dtype.element_ty == DTYPE:
                read_PQ = _dot(state_PC, tl.trans(c_QC), read_PQ, PRECISION)
            else:
                read_PQ = _dot(state_PC.to(tl.float32), tl.trans(c_QC.to(tl.float32)), read_PQ, PRECISION)
        if EAGER:
            b_JN = tl.where(used_J[:, None], b_JN, 0)
        score_JQ = _dot(b_JN, tl.trans(c_QN), score_JQ, PRECISION)

    # decays
    if EAGER:
        x_JP = tl.where(used_J[:, None], x_JP, 0)
    dt_JS = tl.where(live_J[:, None], dt_JS, 0)
    s_JS = tl.cumsum(dt_JS * A_S[None, :], 0)
    if BLOCK_S == 1:
        s_JQ = tl.broadcast_to(s_JS, (BLOCK_J, BLOCK_Q))
        dt_JQ = tl.broadcast_to(dt_JS, (BLOCK_J, BLOCK_Q))
    else:
        each: tl.constexpr = BLOCK_K * BLOCK_T
        s_JQ = tl.reshape(tl.broadcast_to(s_JS[:, :, None], (BLOCK_J, BLOCK_S, each)), (BLOCK_J, BLOCK_Q))
        dt_JQ = tl.reshape(tl.broadcast_to(dt_JS[:, :, None], (BLOCK_J, BLOCK_S, each)), (BLOCK_J, BLOCK_Q))
    e_Q = start + t_Q - WINDOW
    newest_JQ = at_J[:, None] == e_Q[None, :]
    s_e_Q = tl.sum(tl.where(newest_JQ, s_JQ, 0), 0)
    far_JQ = live_J[:, None] & (at_J[:, None] <= e_Q[None, :])
    decay_JQ = tl.exp(tl.where(far_JQ, s_e_Q[None, :] - s_JQ, float("-inf"))) * dt_JQ
    D_Q = tl.load(D_ptr + h_Q, mask=in_Q, other=0)
    weight_JQ = score_JQ * decay_JQ + tl.where(newest_JQ & live_J[:, None], D_Q[None, :], 0)

    x_PJ = tl.trans(x_JP.to(WEIGHT))
    far_PQ = tl.where(c > 0, read_PQ * tl.exp(s_e_Q)[None, :], 0)
    far_PQ = _dot(x_PJ, weight_JQ.to(WEIGHT), far_PQ, PRECISION)
    out_PQ = (m0 + t_Q)[None, :] * (H * P) + (h_Q * P)[None, :] + p_P[:, None]
    out_mask = in_P[:, None] & in_Q[None, :]
    tl.store(far_ptr + out_PQ, far_PQ, mask=out_mask)
    if WINDOW > 0:
        in_window_JQ = (at_J[:, None] > e_Q[None, :]) & (at_J[:, None] <= e_Q[None, :] + WINDOW)
        in_window_JQ = in_window_JQ & (at_J >= 0)[:, None]
        logit_JQ = tl.where(in_window_JQ, score_JQ * scale, float("-inf"))
        logit_JQ = tl.exp(logit_JQ - tl.max(logit_JQ, 0)[None, :])
        near_PQ = _dot(x_PJ, logit_JQ.to(WEIGHT), tl.zeros((BLOCK_P, BLOCK_Q), tl.float32), PRECISION)
        near_PQ = near_PQ / tl.sum(logit_JQ, 0)[None, :]
        tl.store(near_ptr + out_PQ, near_PQ, mask=out_mask)

    # flush: rare, so it reads its operands again (from L2) rather than keep registers
    if end + STEP - c > W:
        to = end - REWIND - WINDOW
        gone_J = live_J & (at_J < to)
        for i in tl.range(0, STATES, num_stages=1):
            dt_J = tl.load(dt_ptr_J + i, mask=live_J, other=0)
            s_J = tl.cumsum(dt_J * tl.load(A_ptr + s0 + i), 0)
            s_to = tl.sum(tl.where(at_J == to - 1, s_J, 0), 0)
            gain_J = tl.exp(tl.where(gone_J, s_to - s_J, float("-inf"))) * dt_J
            keep = tl.exp(s_to)
            xs_JP = tl.load(x_ptr_J[:, None] + p_P[None, :], mask=gone_J[:, None] & in_P[None, :], other=0)
            gained_JP = xs_JP.to(tl.float32) * gain_J[:, None]
            for n0 in tl.range(0, N, BLOCK_F, num_stages=1):
                n_F = n0 + tl.arange(0, BLOCK_F)
                in_PF = in_P[:, None] & (n_F < N)[None, :]
                tile_PF = i * (P * N) + p_P[:, None] * N + n_F[None, :]
                old_PF = tl.load(state_ptr + tile_PF, mask=in_PF, other=0).to(tl.float32)
                new_PF = tl.where(c > 0, old_PF * keep, 0)
                b_JF = tl.load(b_ptr_J[:, None] + n_F[None, :], mask=gone_J[:, None] & (n_F < N)[None, :], other=0)
                if tl.bfloat16 == DTYPE:
                    # x dt exp(..) as the sum of two bf16, so that the state gains fp32's leading 16 bits
                    high_JP = gained_JP.to(tl.bfloat16)
                    low_JP = (gained_JP - high_JP.to(tl.float32)).to(tl.bfloat16)
                    new_PF = _dot(tl.trans(high_JP), b_JF, new_PF, PRECISION)
                    new_PF = _dot(tl.trans(low_JP), b_JF, new_PF, PRECISION)
                else:
                    new_PF = tl.dot(
                        tl.trans(gained_JP), b_JF.to(tl.float32), new_PF,
                        input_precision="tf32x3" if PRECISION == "tf32" else PRECISION,
                    )  # fmt: skip
                if STOCHASTIC:
                    # by position, slot and element: no two roundings of a state share their random bits
                    rounded_PF = _stochastic_bf16(new_PF, seed + to, slot * (S * P * N) + s0 * (P * N) + tile_PF)
                    tl.store(state_ptr + tile_PF, rounded_PF, mask=in_PF)
                else:
                    tl.store(state_ptr + tile_PF, new_PF, mask=in_PF)
        c = to
    own_S = tl.arange(0, BLOCK_S)
    tile_T = tl.arange(0, BLOCK_P // 16)
    tl.store(
        position_ptr + own_S[:, None] * TILES + tile_T[None, :],
        tl.zeros((BLOCK_S, BLOCK_P // 16), tl.int32) + c,
        mask=(own_S < STATES)[:, None] & (p0 // 16 + tile_T < TILES)[None, :],
    )

    # new rows into the ring: x by the group's first program of each slice, B and dt by that of the first slice
    t_T = tl.arange(0, BLOCK_T)
    ring_T = (start + t_T) % W
    first_T = tl.where(s0 % PER_GROUP == 0, T, 0)
    in_TP = (t_T < first_T)[:, None] & in_P[None, :]
    x_TP = tl.load(x_ptr + (m0 + t_T)[:, None] * x_stride + g * P + p_P[None, :], mask=in_TP)
    tl.store(x_ring_ptr + ring_T[:, None] * (G * P) + p_P[None, :], x_TP, mask=in_TP)
    if p0 == 0:
        n_B = tl.arange(0, BLOCK_N)
        in_TN = (t_T < first_T)[:, None] & (n_B < N)[None, :]
        b_TN = tl.load(b_ptr + (m0 + t_T)[:, None] * b_stride + g * N + n_B[None, :], mask=in_TN)
        tl.store(b_ring_ptr + ring_T[:, None] * (G * N) + n_B[None, :], b_TN, mask=in_TN)
        in_TS = (t_T < T)[:, None] & (s_S < STATES)[None, :]
        dt_TS = tl.load(dt_ptr + (m0 + t_T)[:, None] * dt_stride + s0 + s_S[None, :], mask=in_TS)
        tl.store(dt_ring_ptr + ring_T[:, None] * S + s_S[None, :], dt_TS, mask=in_TS)


@dataclass(frozen=True)
class VerifyLaunch:
    """How a step is cut into programs.

    Args:
        block_p: rows of a state tile, a multiple of 16.
        block_c: columns of a state tile, read at once.
        states: states of a group that one program walks.
        warps, stages: of a program; stages is the depth of the walk's pipeline.
        eager: load all ring rows without waiting for the checkpoint position (small batches).
    """

    block_p: int = 64
    block_c: int = 64
    states: int = 1
    warps: int = 4
    stages: int = 3
    eager: bool = False


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
    launch = launch or launch_of(VerifyLaunch, x_MGP.device, layout, R, max_tokens)
    per_group = S // G
    states = min(launch.states, per_group)
    while per_group % states:
        states -= 1
    block_p = min(launch.block_p, triton.next_power_of_2(P))
    block_k, block_s = triton.next_power_of_2(H // S), triton.next_power_of_2(states)
    block_t = max(triton.next_power_of_2(max_tokens), 16 // (block_k * block_s))
    _verify[(S // states * triton.cdiv(P, block_p), R)](
        slots.state, slots.position, slots.x, slots.b, slots.dt,
        slots.state.stride(0), slots.position.stride(0), slots.x.stride(0), slots.b.stride(0), slots.dt.stride(0),
        slot_R, start_R, first_R1,
        x_MGP, dt_MS, B_MGN, C_MHN, x_MGP.stride(0), dt_MS.stride(0), B_MGN.stride(0), C_MHN.stride(0),
        A_S, D_H, far_MHP if near_MHP is None else near_MHP, far_MHP, N**-0.5, seed or 0,
        G=G, S=S, H=H, P=P, N=N, W=layout.ring, WINDOW=layout.window, STEP=layout.step, REWIND=layout.rewind,
        BLOCK_P=block_p, BLOCK_N=max(triton.next_power_of_2(N), 16),
        BLOCK_J=max(triton.next_power_of_2(layout.ring), 16),
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_S=block_s, STATES=states,
        BLOCK_C=min(launch.block_c, triton.next_power_of_2(N)), BLOCK_F=min(64, triton.next_power_of_2(N)),
        EAGER=launch.eager, STOCHASTIC=seed is not None,
        PRECISION=precision(x_MGP), STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    return near_MHP if layout.window else None, far_MHP

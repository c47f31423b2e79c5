"""Prefill in Triton: long rows of a ragged batch that begin or continue their slots, as `replay.replay` has them.

Shapes: M tokens of the step, R rows (sequences), T tokens of a row, H query heads, G key/value heads, S state heads,
P head width, N state width, W ring rows, w the window, K chunks of Q rows; in the window's kernel also J rows of a
block and Q the (token, head of the group) pairs of a program.

With p the position of a row's first token, end = p + T and c the checkpoint position of its slot, in four or five
launches:

    near_t = softmax over rows (t - w, t] of N^(-1/2) C_t . B_j, times x_j
    `ssd_forward`'s walk over the rows [c, c') and [c', end - w), c' = end - rewind - w if end + step - c > W, else c;
        the state at c' goes to the slot; a long row's [c, c') is cut into pieces, of which a launch before it finds
        what they add to the state
    `ssd_forward`'s outputs: far_t from the state entering the chunk of row t - w, and the chunk's rows up to it
    the newest W rows into the ring, c' into the slot: after everything has read the old ones

Rows below p come from the ring, the others from the new tokens. c is known on the device only: the host sets aside as
many chunks as a row can have at most, those past its end find nothing to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import precision
from .slot import SlotLayout, SlotTensors
from .ssd_forward import (
    BY_STEP,
    LOG2_E,
    OutputsLaunch,
    StatesLaunch,
    _dot,
    _find,
    _outputs,
    _row_span,
    _states,
    block,
    most_chunks,
    outputs_launch,
    states_launch,
)

WRITE_ROWS = 16  # ring rows that one program of `_write` writes
PROGRAMS, MOST_PIECES = 512, 16  # of a state walk


@triton.jit(**BY_STEP)
def _near(
    x_ptr, b_ptr, c_ptr, near_ptr, x_stride, b_stride, c_stride,
    slot_ptr, start_ptr, first_ptr, x_ring_ptr, b_ring_ptr, x_ring_stride, b_ring_stride, ROWS, scale,
    G: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """near_t of BLOCK_T tokens for all heads of a group, which see the same rows."""
    HEADS: tl.constexpr = H // G
    BLOCK_Q: tl.constexpr = BLOCK_T * BLOCK_H
    g = tl.program_id(0) % G
    r_R = tl.arange(0, BLOCK_R)
    T_R = tl.load(first_ptr + r_R + 1, mask=r_R < ROWS, other=0) - tl.load(first_ptr + r_R, mask=r_R < ROWS, other=0)
    row, i = _find((T_R.to(tl.int32) + BLOCK_T - 1) // BLOCK_T, tl.program_id(0) // G, BLOCK_R)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    m0 = tl.load(first_ptr + row).to(tl.int64)
    start = tl.load(start_ptr + row).to(tl.int32)
    t0 = start + i * BLOCK_T
    last = tl.minimum(t0 + BLOCK_T, start + (tl.load(first_ptr + row + 1) - m0).to(tl.int32))

    q_Q = tl.arange(0, BLOCK_Q)
    t_Q = t0 + q_Q // BLOCK_H
    h_Q = g * HEADS + q_Q % BLOCK_H
    in_Q = (t_Q < last) & (q_Q % BLOCK_H < HEADS)
    token_Q = m0 + (t_Q - start)
    n_N = tl.arange(0, BLOCK_N)
    p_P = tl.arange(0, BLOCK_P)
    in_N = n_N < N
    in_P = p_P < P
    c_ptr_Q = c_ptr + token_Q * c_stride + h_Q * N
    c_QN = tl.load(c_ptr_Q[:, None] + n_N[None, :], mask=in_Q[:, None] & in_N[None, :], other=0)
    x_ptr += g * P
    b_ptr += g * N
    x_ring_ptr += slot * x_ring_stride + g * P
    b_ring_ptr += slot * b_ring_stride + g * N

    most_Q = tl.full((BLOCK_Q,), -1e30, tl.float32)  # finite: a block may hold no row that a query sees
    sum_Q = tl.zeros((BLOCK_Q,), tl.float32)
    near_QP = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    for j0 in tl.range(tl.maximum(t0 - WINDOW + 1, 0), last, BLOCK_J, num_stages=STAGES):
        j_J = j0 + tl.arange(0, BLOCK_J)
        live_J = j_J < last
        new_J = j_J >= start
        token_J = m0 + (j_J - start)
        x_ptr_J = tl.where(new_J, x_ptr + token_J * x_stride, x_ring_ptr + j_J % W * (G * P))
        b_ptr_J = tl.where(new_J, b_ptr + token_J * b_stride, b_ring_ptr + j_J % W * (G * N))
        b_JN = tl.load(b_ptr_J[:, None] + n_N[None, :], mask=live_J[:, None] & in_N[None, :], other=0)
        x_JP = tl.load(x_ptr_J[:, None] + p_P[None, :], mask=live_J[:, None] & in_P[None, :], other=0)
        logit_QJ = _dot(c_QN, tl.trans(b_JN), tl.zeros((BLOCK_Q, BLOCK_J), tl.float32), PRECISION)
        seen_QJ = (j_J[None, :] <= t_Q[:, None]) & (j_J[None, :] > t_Q[:, None] - WINDOW)
        logit_QJ = tl.where(seen_QJ, logit_QJ * (scale * LOG2_E), float("-inf"))
        before_Q = most_Q
        most_Q = tl.maximum(most_Q, tl.max(logit_QJ, 1))
        weight_QJ = tl.exp2(logit_QJ - most_Q[:, None])
        fade_Q = tl.exp2(before_Q - most_Q)
        sum_Q = sum_Q * fade_Q + tl.sum(weight_QJ, 1)
        near_QP = _dot(weight_QJ.to(x_JP.dtype), x_JP, near_QP * fade_Q[:, None], PRECISION)
    near_QP = near_QP / tl.where(in_Q, sum_Q, 1)[:, None]
    near_ptr_Q = near_ptr + token_Q * (H * P) + h_Q * P
    tl.store(near_ptr_Q[:, None] + p_P[None, :], near_QP, mask=in_Q[:, None] & in_P[None, :])


@triton.jit(**BY_STEP)
def _write(
    x_ptr, dt_ptr, b_ptr, x_stride, dt_stride_m, dt_stride_s, b_stride,
    slot_ptr, start_ptr, first_ptr, position_ptr, x_ring_ptr, dt_ring_ptr, b_ring_ptr,
    position_stride, x_ring_stride, dt_ring_stride, b_ring_stride,
    G: tl.constexpr, S: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    W: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr, REWIND: tl.constexpr, TILES: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """The newest rows of a group into the ring, and where the slot's state now stands."""
    g = tl.program_id(0)
    row = tl.program_id(2)
    slot, m0, start, end, _, to = _row_span(
        row, slot_ptr, start_ptr, first_ptr, position_ptr + g * (S // G * TILES), position_stride,
        W, WINDOW, STEP, REWIND,
    )  # fmt: skip
    j_J = tl.maximum(start, end - W) + tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    live_J = j_J < end
    token_J = m0 + (j_J - start)
    ring_J = j_J % W
    p_P = tl.arange(0, BLOCK_P)
    n_N = tl.arange(0, BLOCK_N)
    s_S = tl.arange(0, BLOCK_S)
    in_JP = live_J[:, None] & (p_P < P)[None, :]
    in_JN = live_J[:, None] & (n_N < N)[None, :]
    in_JS = live_J[:, None] & (s_S < S // G)[None, :]
    head_S = g * (S // G) + s_S
    x_JP = tl.load(x_ptr + (token_J * x_stride)[:, None] + (g * P + p_P)[None, :], mask=in_JP)
    b_JN = tl.load(b_ptr + (token_J * b_stride)[:, None] + (g * N + n_N)[None, :], mask=in_JN)
    dt_JS = tl.load(dt_ptr + (token_J * dt_stride_m)[:, None] + (head_S * dt_stride_s)[None, :], mask=in_JS)
    tl.store(x_ring_ptr + slot * x_ring_stride + (ring_J * (G * P))[:, None] + (g * P + p_P)[None, :], x_JP, mask=in_JP)
    tl.store(b_ring_ptr + slot * b_ring_stride + (ring_J * (G * N))[:, None] + (g * N + n_N)[None, :], b_JN, mask=in_JN)
    tl.store(dt_ring_ptr + slot * dt_ring_stride + (ring_J * S)[:, None] + head_S[None, :], dt_JS, mask=in_JS)
    # a program reads and writes the positions of its own group, by its first block of rows
    if (tl.program_id(1) == 0) & (end > start):
        tile_T = tl.arange(0, BLOCK_TILES)
        tl.store(
            position_ptr + slot * position_stride + head_S[:, None] * TILES + tile_T[None, :],
            tl.zeros((BLOCK_S, BLOCK_TILES), tl.int32) + to,
            mask=(s_S < S // G)[:, None] & (tile_T < TILES)[None, :],
        )


def row_block(rows: int) -> int:
    """How many rows the kernels' table holds for so many: few sizes, as each is compiled."""
    return next((most for most in (16, 256) if most >= rows), triton.next_power_of_2(rows))


def chunk_rows(layout: SlotLayout) -> int:
    """Rows of a chunk, unless told otherwise."""
    return 128 if layout.state_heads == layout.query_heads else 64


def most_workspace(layout: SlotLayout, rows: int, tokens: int) -> int:
    """Bytes that `prefill` takes beside its outputs, at most, for so many tokens in so many rows: the states that enter
    chunks and the decays within them. What pieces of a walk add comes to 16 MiB more.

    An engine that plans its memory has to know: many short prompts at once take much more than one long one.

    Example:
        >>> layout = SlotLayout(8, 32, 32, 128, 128, 64, dtype=torch.bfloat16)
        >>> [most_workspace(layout, rows, 8192) >> 20 for rows in (1, 512)]
        [66, 641]
    """
    Q, S = chunk_rows(layout), layout.state_heads
    spare = layout.ring - layout.step - layout.rewind - layout.window
    rows = min(rows, tokens)
    # the sum of `most_chunks` over rows, each rounded up
    chunks = (tokens + rows * (spare + Q - 1)) // Q + rows * -(-layout.rewind // Q)
    state = layout.head_dim * layout.state_size * _enter_dtype(layout.dtype).itemsize
    return chunks * S * (state + Q * torch.float32.itemsize)


def _enter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the states that enter chunks, for rows of a dtype: bf16 has fp32's range, fp16 has not."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class NearLaunch:
    """How the window's attention is cut into programs.

    Args:
        block_q: (token, head of the group) pairs of a program.
        block_j: rows it takes up at a time.
        warps, stages: of a program; stages is the depth of the pipeline over blocks of rows.
    """

    block_q: int = 128
    block_j: int = 32
    warps: int = 4
    stages: int = 3


def near_launch(x: Tensor) -> NearLaunch:
    """The window's defaults for activations like x."""
    return NearLaunch() if x.element_size() == 2 else NearLaunch(block_q=32, block_j=16, warps=4, stages=1)


def walk_launch(x: Tensor, rows: int, tokens: int, chunk: int, shape: tuple[int, int, int]) -> StatesLaunch:
    """The walk's defaults for activations like x, rows of at most so many tokens, and states of shape (S, P, N)."""
    S, P, N = shape
    walk = states_launch(x, rows * S)
    if x.element_size() > 2:
        return walk
    walk = replace(walk, block_p=64, block_n=128, **({"block_j": 128, "stages": 2} if chunk >= 128 else {}))
    tiles = rows * S * triton.cdiv(P, 64) * triton.cdiv(N, 128)
    # enough programs to fill a large GPU, pieces of four chunks at least
    pieces = min(MOST_PIECES, triton.next_power_of_2(PROGRAMS // tiles), triton.next_power_of_2(tokens // chunk) // 4)
    return replace(walk, pieces=max(pieces, 1))


def prefill(
    slots: SlotTensors,
    layout: SlotLayout,
    slot_R: Tensor,
    start_R: Tensor,
    first_R1: Tensor,
    lengths: list[int],
    x_MGP: Tensor,
    dt_MS: Tensor,
    A_S: Tensor,
    B_MGN: Tensor,
    C_MHN: Tensor,
    D_H: Tensor,
    *,
    chunk: int | None = None,
    near_MHP: Tensor | None = None,
    far_MHP: Tensor | None = None,
    near: NearLaunch | None = None,
    walk: StatesLaunch | None = None,
    launch: OutputsLaunch | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Advance a ragged batch of long rows and update their slots in place; see `replay.replay`.

    Nothing is read from the device. Rows without tokens or with a negative slot are left alone, their outputs
    unwritten.

    Args:
        slots: the layer's slots, views with any distance between slots.
        layout: their layout.
        slot_R: int32 or int64, slot of each row, no slot twice.
        start_R: int32 or int64, position of each row's first token; 0 ignores what the slot holds.
        first_R1: int32 or int64 (R + 1), where each row's tokens begin among the M.
        lengths: tokens of each row, the differences of first_R1.
        x_MGP, B_MGN, C_MHN: values, keys and queries of the layout's dtype; the last two dimensions contiguous.
        dt_MS: step sizes after softplus, fp32.
        A_S, D_H: decay rates (negative) and skip weights, fp32.
        chunk: rows of one chunk, a power of two; None is 64 where query heads share a state, 128 elsewhere.
        near_MHP, far_MHP: where to write, contiguous, any float dtype; allocated in C's dtype when None.
        near, walk, launch: how to cut the window's attention, the state walk and the outputs into programs.

    Returns:
        near (M, H, P) or None without a window, and far (M, H, P).

    Raises:
        ValueError: rows that do not fit the tokens, another chunk, dtypes or strides than above.
    """
    G, S, H = layout.groups, layout.state_heads, layout.query_heads
    P, N, R = layout.head_dim, layout.state_size, len(lengths)
    w, W = layout.window, layout.ring
    if slot_R.shape[0] != R or sum(lengths) > x_MGP.shape[0]:
        raise ValueError(f"rows of {lengths} tokens for {slot_R.shape[0]} slots and {x_MGP.shape[0]} tokens")
    chunk = chunk or chunk_rows(layout)
    if chunk < 16 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk} must be a power of two and at least 16")
    for name, t in (("x", x_MGP), ("B", B_MGN), ("C", C_MHN)):
        if t.stride(-1) != 1 or (t.shape[1] > 1 and t.stride(1) != t.shape[2]):
            raise ValueError(f"{name} of strides {t.stride()}: its last two dimensions must be contiguous")
        if t.dtype != layout.dtype:
            raise ValueError(f"{name} is {t.dtype}, the slots' rows are {layout.dtype}")
    far_MHP = C_MHN.new_empty(*C_MHN.shape[:2], P) if far_MHP is None else far_MHP
    if w and near_MHP is None:
        near_MHP = torch.empty_like(far_MHP)
    near_MHP = near_MHP if w else None
    if not sum(lengths):
        return near_MHP, far_MHP

    rows = (slot_R, start_R, first_R1)
    ring = (slots.x, slots.dt, slots.b)
    ring_strides = [t.stride(0) for t in ring]
    block_r = row_block(R)
    fixed = {"G": G, "P": P, "N": N, "W": W, "WINDOW": w}
    rules = {"STEP": layout.step, "REWIND": layout.rewind}
    accuracy = precision(x_MGP)
    if near_MHP is not None:
        near = near or near_launch(x_MGP)
        if x_MGP.element_size() > 2 and near.block_q >= 64 and near.block_j < 32:
            # Triton 3.6 takes wgmma there, which then reads past its operand (docs/kernels.md)
            raise ValueError(f"fp32 with block_q {near.block_q} needs block_j of at least 32, not {near.block_j}")
        block_h = triton.next_power_of_2(H // G)
        block_t = max(near.block_q // block_h, 1)
        _near[(G * sum(-(-T // block_t) for T in lengths),)](
            x_MGP, B_MGN, C_MHN, near_MHP, x_MGP.stride(0), B_MGN.stride(0), C_MHN.stride(0),
            *rows, slots.x, slots.b, slots.x.stride(0), slots.b.stride(0), R, N**-0.5,
            H=H, **fixed, BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_J=near.block_j,
            BLOCK_P=block(P), BLOCK_N=block(N), PRECISION=accuracy, STAGES=near.stages, num_warps=near.warps,
        )  # fmt: skip

    chunks = sum(most_chunks(T, chunk, W, w, layout.step, layout.rewind) for T in lengths)
    enter_KSPN = x_MGP.new_empty(chunks, S, P, N, dtype=_enter_dtype(x_MGP.dtype))
    s_KSQ = x_MGP.new_empty(chunks, S, chunk, dtype=torch.float32)
    walk = walk or walk_launch(x_MGP, R, max(lengths), chunk, (S, P, N))
    if launch is None:
        launch = outputs_launch(x_MGP, max(P, N))
        if S < H and x_MGP.element_size() == 2:
            launch = replace(launch, heads=H // S, stages=2)
    block_p, block_n = block(P, walk.block_p), block(N, walk.block_n)
    x_strides, dt_strides, b_strides = (0, *x_MGP.stride()[:2]), (0, *dt_MS.stride()), (0, *B_MGN.stride()[:2])
    tiles = S * triton.cdiv(P, block_p) * triton.cdiv(N, block_n)
    piece_RESPN = fade_RES = None
    if walk.pieces > 1:
        piece_RESPN = x_MGP.new_empty(R, walk.pieces, S, P, N, dtype=torch.float32)
        fade_RES = x_MGP.new_empty(R, walk.pieces, S, dtype=torch.float32)
    # what each piece but the last adds to the state, then the walks of all pieces at once
    for enter, s in [(None, None)] * (walk.pieces > 1) + [(enter_KSPN, s_KSQ)]:
        _states[(tiles, R, walk.pieces)](
            x_MGP, dt_MS, A_S, B_MGN, None, slots.state, None, enter, s, piece_RESPN, fade_RES,
            *x_strides, *dt_strides, *b_strides, 0, 0, 0,
            *rows, slots.position, *ring, slots.state.stride(0), slots.position.stride(0), *ring_strides,
            R, walk.pieces,
            S=S, Q=chunk, **fixed, **rules, BLOCK_R=block_r,
            BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_J=min(walk.block_j, chunk),
            PRECISION=accuracy, STAGES=walk.stages, num_warps=walk.warps,
        )  # fmt: skip
    block_p, block_j = block(P, launch.block_p), min(launch.block_j, chunk)
    heads = math.gcd(launch.heads, H // G)
    _outputs[(chunks * (chunk // block_j) * (H // heads) * triton.cdiv(P, block_p),)](
        x_MGP, dt_MS, B_MGN, C_MHN, D_H, None, enter_KSPN, s_KSQ, far_MHP,
        *x_strides, *dt_strides, *b_strides, 0, *C_MHN.stride()[:2], 0, 0, 0,
        *rows, slots.position, *ring, slots.position.stride(0), *ring_strides, R,
        S=S, H=H, Q=chunk, **fixed, **rules, BLOCK_R=block_r,
        BLOCK_P=block_p, BLOCK_N=block(N), BLOCK_J=block_j, HEADS=heads,
        PRECISION=accuracy, STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip

    _write[(G, triton.cdiv(min(W, max(lengths)), WRITE_ROWS), R)](
        x_MGP, dt_MS, B_MGN, x_MGP.stride(0), *dt_MS.stride(), B_MGN.stride(0),
        *rows, slots.position, *ring, slots.position.stride(0), *ring_strides,
        S=S, **fixed, **rules, TILES=layout.tiles, BLOCK_S=triton.next_power_of_2(S // G), BLOCK_J=WRITE_ROWS,
        BLOCK_P=block(P), BLOCK_N=block(N), BLOCK_TILES=triton.next_power_of_2(layout.tiles),
    )  # fmt: skip
    return near_MHP, far_MHP

"""The SSD forward in Triton: streams of rows cut into chunks, for whole sequences (`ssd_forward`) and for prefill.

Shapes: B batch, L length, H query heads, G key/value heads, S state heads (a multiple of G that divides H), P head
width, N state width, K chunks, Q rows of a chunk; in the kernels also M query rows and J rows of a block.

A stream is a run of rows at the positions [lo, hi). Row j is seen by the queries at t >= j + w, w the delay, so the
query that belongs to row j is t = j + w. With s_j = log2(e) sum of A dt from the chunk's first row to row j:

    state walk, chunk after chunk:  S <- 2^(s_Q) S + sum_j 2^(s_Q - s_j) dt_j x_j B_j^T
    outputs of a chunk:             y_t = 2^(s_j) S_in C_t + sum_{i <= j} 2^(s_j - s_i) dt_i (B_i . C_t) x_i + D_h x_j

`_states` walks a stream with a tile of one state in registers and stores the state that enters each chunk, S_in; a
long prefill's walk is cut into pieces that run side by side, after a first launch has found what each of them adds to
the state. `_outputs` then does all chunks at once. x and B exist once per group, products C . B^T never leave the chip.
RAGGED selects prefill's streams: rows that begin at a slot's checkpoint c and come from its ring below `start`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checkpoint import checkpoint
from .launch import precision
from .prefix import prefix_sum

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; two operands of one 16-bit type stay that, others meet in fp32."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def _gain(x_JP, b_JN, gain_J, state_PN, PRECISION: tl.constexpr):
    """state + sum_j gain_j x_j B_j^T."""
    gained_JP = x_JP.to(tl.float32) * gain_J[:, None]
    if x_JP.dtype == tl.bfloat16:
        # as the sum of two bf16: a state that takes up thousands of rows should not see bf16's rounding of each
        high_JP = gained_JP.to(tl.bfloat16)
        low_JP = (gained_JP - high_JP.to(tl.float32)).to(tl.bfloat16)
        state_PN = _dot(tl.trans(high_JP), b_JN, state_PN, PRECISION)
        return _dot(tl.trans(low_JP), b_JN, state_PN, PRECISION)
    if x_JP.dtype == tl.float16 and PRECISION == "tf32":
        # as the sum of two tf32, in which fp16 rows are exact
        high_JP = (gained_JP.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        state_PN = _dot(tl.trans(high_JP), b_JN, state_PN, PRECISION)
        return _dot(tl.trans(gained_JP - high_JP), b_JN, state_PN, PRECISION)
    return _dot(tl.trans(gained_JP), b_JN, state_PN, PRECISION)


@triton.jit
def _row_span(
    row, slot_ptr, start_ptr, first_ptr, position_ptr, position_stride,
    W: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr, REWIND: tl.constexpr,
):  # fmt: skip
    """Of a prefill row: slot, first token among the M, start, end, checkpoint c and where the flush moves it."""
    slot = tl.load(slot_ptr + row).to(tl.int64)
    m0 = tl.load(first_ptr + row).to(tl.int64)
    start = tl.load(start_ptr + row).to(tl.int32)
    T = (tl.load(first_ptr + row + 1) - m0).to(tl.int32)
    T = tl.where(slot < 0, 0, T)
    end = start + T
    c = tl.load(position_ptr + slot * position_stride, mask=T > 0, other=0)
    c = checkpoint(c, start, W, WINDOW, STEP)
    to = tl.where((end + STEP - c > W) & (T > 0), end - REWIND - WINDOW, c)
    return slot, m0, start, end, c, to


@triton.jit
def _chunk_bounds(
    first_ptr, ROWS,
    Q: tl.constexpr, W: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr, REWIND: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """How many chunks are set aside for each prefill row; `most_chunks` on the host, which does not know c."""
    r_R = tl.arange(0, BLOCK_R)
    T_R = tl.load(first_ptr + r_R + 1, mask=r_R < ROWS, other=0) - tl.load(first_ptr + r_R, mask=r_R < ROWS, other=0)
    T_R = T_R.to(tl.int32)
    rows_R = tl.maximum(T_R + (W - STEP - REWIND - WINDOW), 1)
    count_R = (rows_R + Q - 1) // Q + (REWIND + Q - 1) // Q
    return tl.where(r_R < ROWS, count_R, 0)


@triton.jit
def _find(count_R, k, BLOCK_R: tl.constexpr):
    """Which row the k-th piece belongs to if row r has count_R[r] of them, and its number within the row."""
    upto_R = prefix_sum(count_R, BLOCK_R)
    row = tl.sum((upto_R <= k).to(tl.int32), 0)
    return row, k - tl.max(tl.where(upto_R <= k, upto_R, 0), 0)


def most_chunks(tokens: int, chunk: int, ring: int, window: int, step: int, rewind: int) -> int:
    """Chunks of `chunk` rows that a prefill row of so many tokens can have, whatever its checkpoint.

    A flush cuts [c, end - w) at end - rewind - w, and c >= start + step - ring. Without a flush the rows are fewer."""
    return -(-max(tokens + ring - step - rewind - window, 1) // chunk) + -(-rewind // chunk)


# what changes from step to step of an engine, so that a prompt never waits for a compiler
BY_STEP = {
    "do_not_specialize": ["ROWS", "PIECES"],
    "do_not_specialize_on_alignment": ["slot_ptr", "start_ptr", "first_ptr"],
}


@triton.jit(**BY_STEP)
def _states(
    x_ptr, dt_ptr, A_ptr, b_ptr, doc_ptr, initial_ptr, final_ptr, enter_ptr, s_ptr, piece_ptr, fade_ptr,
    x_stride_b, x_stride_l, x_stride_g, dt_stride_b, dt_stride_l, dt_stride_s, b_stride_b, b_stride_l, b_stride_g,
    doc_stride, L, CHUNKS,
    slot_ptr, start_ptr, first_ptr, position_ptr, x_ring_ptr, dt_ring_ptr, b_ring_ptr,
    state_stride, position_stride, x_ring_stride, dt_ring_stride, b_ring_stride, ROWS, PIECES,
    G: tl.constexpr, S: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, WINDOW: tl.constexpr,
    W: tl.constexpr, STEP: tl.constexpr, REWIND: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    RAGGED: tl.constexpr = slot_ptr is not None
    GAINS: tl.constexpr = enter_ptr is None
    CUT: tl.constexpr = piece_ptr is not None
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    row = tl.program_id(1)
    n0 = pid % TILES_N * BLOCK_N
    p0 = pid // TILES_N % TILES_P * BLOCK_P
    head = pid // (TILES_N * TILES_P)
    g = head // (S // G)
    p_P = p0 + tl.arange(0, BLOCK_P)
    n_N = n0 + tl.arange(0, BLOCK_N)
    in_P = p_P < P
    in_N = n_N < N
    in_PN = in_P[:, None] & in_N[None, :]
    tile_PN = head * (P * N) + p_P[:, None] * N + n_N[None, :]
    writes_s = (p0 == 0) & (n0 == 0)

    if RAGGED:
        slot, m0, start, end, c, to = _row_span(
            row, slot_ptr, start_ptr, first_ptr, position_ptr, position_stride, W, WINDOW, STEP, REWIND
        )
        if end == start:
            return
        counts_R = _chunk_bounds(first_ptr, ROWS, Q, W, WINDOW, STEP, REWIND, BLOCK_R)
        k = tl.sum(tl.where(tl.arange(0, BLOCK_R) < row, counts_R, 0), 0).to(tl.int64)
        folded = (to - c + Q - 1) // Q  # chunks below `to`
        x_ring_ptr += slot * x_ring_stride + g * P
        b_ring_ptr += slot * b_ring_stride + g * N
        dt_ring_ptr += slot * dt_ring_stride + head
        initial_ptr += slot * state_stride
        piece = tl.program_id(2)
        piece_ptr_PN = piece_ptr + row.to(tl.int64) * (PIECES * S * P * N) + tile_PN if CUT else None
        fade_ptr_s = fade_ptr + row * (PIECES * S) + head if CUT else None
        first = piece * 0
        if GAINS or not CUT:
            held_N = n_N < tl.where((c > 0) & (piece == 0), N, 0)
            state_PN = tl.load(initial_ptr + tile_PN, mask=in_P[:, None] & held_N[None, :], other=0).to(tl.float32)
            first = piece - 1
        else:
            state_PN = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
            for e in tl.range(0, piece + 1):
                gained_PN = tl.load(piece_ptr_PN + e * (S * P * N), mask=in_PN, other=0)
                state_PN = state_PN * tl.exp2(tl.load(fade_ptr_s + e * S)) + gained_PN
            first = piece
        if CUT:
            per = (folded + PIECES - 1) // PIECES * Q  # rows of a piece
    else:
        b = row.to(tl.int64)
        m0 = b * 0
        start, end, c, to = 0, L, 0, 0
        k = b * CHUNKS
        x_ptr += b * x_stride_b
        dt_ptr += b * dt_stride_b
        b_ptr += b * b_stride_b
        if initial_ptr is not None:
            state_PN = tl.load(initial_ptr + b * (S * P * N) + tile_PN, mask=in_PN, other=0).to(tl.float32)
        else:
            state_PN = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if doc_ptr is not None:
        doc_ptr += row.to(tl.int64) * doc_stride
        doc_before = tl.load(doc_ptr)
    x_ptr += g * x_stride_g
    b_ptr += g * b_stride_g
    dt_ptr += head * dt_stride_s
    A = tl.load(A_ptr + head).to(tl.float32) * LOG2_E

    i_J = tl.arange(0, BLOCK_J)
    faded = 0.0
    for segment in tl.static_range(0 if RAGGED else 1, 1 if GAINS else 2):
        if segment == 0:
            lo, hi, last = c, to, to
            if CUT:
                lo = tl.minimum(c + tl.maximum(first, 0) * per, to)
                hi = tl.minimum(lo + tl.where(first < 0, 0, per), to)
                last = hi
            k0 = k + (lo - c) // Q
        elif RAGGED:
            lo, hi = to, end - WINDOW
            last = hi
            if CUT:
                last = tl.where(piece == PIECES - 1, hi, lo)
            k0 = k + folded
        else:
            lo, hi = to, end - WINDOW
            last = tl.maximum(hi, 1)  # a sequence has at least one chunk, if of no rows
            k0 = k
        s_before = 0.0
        for j0 in tl.range(lo, last, BLOCK_J, num_stages=STAGES):
            j_J = j0 + i_J
            live_J = j_J < hi
            token_J = m0 + (j_J - start)
            x_ptr_J = x_ptr + token_J * x_stride_l
            b_ptr_J = b_ptr + token_J * b_stride_l
            dt_ptr_J = dt_ptr + token_J * dt_stride_l
            if RAGGED:
                new_J = j_J >= start
                ring_J = j_J % W
                x_ptr_J = tl.where(new_J, x_ptr_J, x_ring_ptr + ring_J * (G * P))
                b_ptr_J = tl.where(new_J, b_ptr_J, b_ring_ptr + ring_J * (G * N))
                dt_ptr_J = tl.where(new_J, dt_ptr_J, dt_ring_ptr + ring_J * S)
            x_JP = tl.load(x_ptr_J[:, None] + p_P[None, :], mask=live_J[:, None] & in_P[None, :], other=0)
            b_JN = tl.load(b_ptr_J[:, None] + n_N[None, :], mask=live_J[:, None] & in_N[None, :], other=0)
            dt_J = tl.load(dt_ptr_J, mask=live_J, other=0).to(tl.float32)

            at = (j0 - lo) % Q
            chunk = k0 + (j0 - lo) // Q
            s_J = prefix_sum(dt_J * A, BLOCK_J)
            s_last = tl.min(s_J, 0)  # A is negative
            if GAINS:
                faded += s_last
            else:
                enters_N = n_N < tl.where(at == 0, N, 0)
                tl.store(enter_ptr + chunk * (S * P * N) + tile_PN, state_PN, mask=in_P[:, None] & enters_N[None, :])
                s_before = tl.where(at == 0, 0.0, s_before)
                s_ptr_J = s_ptr + (chunk * S + head) * Q + at + i_J
                tl.store(s_ptr_J, s_before + s_J, mask=i_J < tl.where(writes_s, Q, 0))
                s_before += s_last
            gain_J = tl.exp2(s_last - s_J) * dt_J
            keep = tl.exp2(s_last)
            if doc_ptr is not None:
                doc_J = tl.load(doc_ptr + j_J, mask=live_J, other=0)
                doc_last = tl.sum(tl.where(j_J == tl.minimum(j0 + BLOCK_J, hi) - 1, doc_J, 0), 0)
                doc_last = tl.where(hi > j0, doc_last, doc_before)
                gain_J = tl.where(doc_J == doc_last, gain_J, 0)
                keep = tl.where(doc_last == doc_before, keep, 0)
                doc_before = doc_last
            state_PN = _gain(x_JP, b_JN, gain_J, state_PN * keep, PRECISION)
        if segment == 0 and not GAINS:
            moved_N = n_N < tl.where((to > c) & (piece == PIECES - 1), N, 0)
            tl.store(initial_ptr + tile_PN, state_PN, mask=in_P[:, None] & moved_N[None, :])
    if GAINS:
        tl.store(piece_ptr_PN + piece * (S * P * N), state_PN, mask=in_PN)
        tl.store(fade_ptr_s + piece * S, faded, mask=writes_s)
    if final_ptr is not None:
        if doc_ptr is not None:
            state_PN = tl.where(doc_before == tl.load(doc_ptr + L - 1), state_PN, 0)
        tl.store(final_ptr + row.to(tl.int64) * (S * P * N) + tile_PN, state_PN, mask=in_PN)


@triton.jit(**BY_STEP)
def _outputs(
    x_ptr, dt_ptr, b_ptr, c_ptr, D_ptr, doc_ptr, enter_ptr, s_ptr, y_ptr,
    x_stride_b, x_stride_l, x_stride_g, dt_stride_b, dt_stride_l, dt_stride_s, b_stride_b, b_stride_l, b_stride_g,
    c_stride_b, c_stride_l, c_stride_h, doc_stride, L, CHUNKS,
    slot_ptr, start_ptr, first_ptr, position_ptr, x_ring_ptr, dt_ring_ptr, b_ring_ptr,
    position_stride, x_ring_stride, dt_ring_stride, b_ring_stride, ROWS,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    WINDOW: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr, REWIND: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    RAGGED: tl.constexpr = slot_ptr is not None
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # the operand type of products with fp32 weights: fp16 could overflow, bf16 has fp32's range
    WEIGHT: tl.constexpr = DTYPE if tl.bfloat16 == DTYPE else tl.float32
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    BLOCKS: tl.constexpr = Q // BLOCK_J
    SHARED: tl.constexpr = (H // S) % HEADS == 0  # the program's heads read one state
    # heads fastest: those of a group, which read the same x and B, and those of a state run side by side
    pid = tl.program_id(0)
    p0 = pid % TILES_P * BLOCK_P
    h0 = pid // TILES_P % (H // HEADS) * HEADS
    block = pid // (TILES_P * (H // HEADS)) % BLOCKS
    k = pid // (TILES_P * (H // HEADS) * BLOCKS)
    g = h0 // (H // G)
    p_P = p0 + tl.arange(0, BLOCK_P)
    n_N = tl.arange(0, BLOCK_N)
    in_P = p_P < P
    in_N = n_N < N
    i_J = tl.arange(0, BLOCK_J)

    if RAGGED:
        counts_R = _chunk_bounds(first_ptr, ROWS, Q, W, WINDOW, STEP, REWIND, BLOCK_R)
        row, i = _find(counts_R, k, BLOCK_R)
        slot, m0, start, end, c, to = _row_span(
            row, slot_ptr, start_ptr, first_ptr, position_ptr, position_stride, W, WINDOW, STEP, REWIND
        )
        folded = (to - c + Q - 1) // Q  # chunks below `to`
        lo = tl.where(i < folded, c + i * Q, to + (i - folded) * Q)
        hi = tl.minimum(lo + Q, tl.where(i < folded, to, end - WINDOW))
        x_ring_ptr += slot * x_ring_stride + g * P
        b_ring_ptr += slot * b_ring_stride + g * N
        dt_ring_ptr += slot * dt_ring_stride
    else:
        row = k // CHUNKS
        i = k % CHUNKS
        b = row.to(tl.int64)
        m0 = b * 0
        start, end = 0, L
        lo = i * Q
        hi = tl.minimum(lo + Q, L - WINDOW)
        x_ptr += b * x_stride_b
        dt_ptr += b * dt_stride_b
        b_ptr += b * b_stride_b
        c_ptr += b * c_stride_b
        y_ptr += b * L * (H * P)
    y_ptr += h0 * P
    x_ptr += g * x_stride_g
    b_ptr += g * b_stride_g

    if (i == 0) & (block == 0):  # nothing has left the window yet
        for t0 in range(start, tl.minimum(end, WINDOW), BLOCK_J):
            t_J = t0 + i_J
            y_ptr_J = y_ptr + (m0 + (t_J - start)) * (H * P)
            mask_JP = (t_J < tl.minimum(end, WINDOW))[:, None] & in_P[None, :]
            zeros_JP = tl.zeros((BLOCK_J, BLOCK_P), y_ptr.dtype.element_ty)
            for f in tl.static_range(HEADS):
                tl.store(y_ptr_J[:, None] + f * P + p_P[None, :], zeros_JP, mask_JP)
    j0 = lo + block * BLOCK_J
    if (j0 >= hi) | (tl.minimum(j0 + BLOCK_J, hi) + WINDOW <= start):
        return

    j_M = j0 + i_J
    t_M = j_M + WINDOW
    live_J = j_M < hi
    live_M = live_J & (t_M >= start)
    token_M = m0 + (t_M - start)
    if doc_ptr is not None:
        doc_ptr += row.to(tl.int64) * doc_stride
        doc_M = tl.load(doc_ptr + t_M, mask=live_M, other=0)
        entered_M = doc_M == tl.load(doc_ptr + tl.maximum(lo - 1, 0))
    c_ptr_MN = c_ptr + h0 * c_stride_h + (token_M * c_stride_l)[:, None] + n_N[None, :]
    enter_ptr_PN = enter_ptr + k.to(tl.int64) * (S * P * N) + p_P[:, None] * N + n_N[None, :]
    in_MN = live_M[:, None] & in_N[None, :]
    in_PN = in_P[:, None] & in_N[None, :]
    s_ptr += k.to(tl.int64) * (S * Q) + block * BLOCK_J
    token_J = m0 + (j_M - start)
    x_ptr_J = x_ptr + token_J * x_stride_l
    b_ptr_J = b_ptr + token_J * b_stride_l
    dt_ptr_J = dt_ptr + token_J * dt_stride_l
    if RAGGED:
        new_J = j_M >= start
        ring_J = j_M % W
        x_ptr_J = tl.where(new_J, x_ptr_J, x_ring_ptr + ring_J * (G * P))
        b_ptr_J = tl.where(new_J, b_ptr_J, b_ring_ptr + ring_J * (G * N))
    b_JN = tl.load(b_ptr_J[:, None] + n_N[None, :], mask=live_J[:, None] & in_N[None, :], other=0)
    x_JP = tl.load(x_ptr_J[:, None] + p_P[None, :], mask=live_J[:, None] & in_P[None, :], other=0)
    seen_MJ = live_J[:, None] & (i_J[:, None] >= i_J[None, :])
    if doc_ptr is not None:
        seen_MJ = seen_MJ & (doc_M[:, None] == tl.load(doc_ptr + j_M, mask=live_J, other=0)[None, :])
    own_MJ = seen_MJ & (i_J[:, None] == i_J[None, :])

    if SHARED:
        state = h0 // (H // S)
        enter_PN = tl.load(enter_ptr_PN + state * (P * N), mask=in_PN, other=0)
    for f in tl.range(0, HEADS, num_stages=STAGES if BLOCKS == 1 else 1):
        head = (h0 + f) // (H // S)
        c_MN = tl.load(c_ptr_MN + f * c_stride_h, mask=in_MN, other=0)
        if not SHARED:
            enter_PN = tl.load(enter_ptr_PN + head * (P * N), mask=in_PN, other=0)
        s_before = tl.load(s_ptr + head * Q - 1, mask=block > 0, other=0)
        s_M = tl.load(s_ptr + head * Q + i_J, mask=live_J, other=s_before)
        dt_head_ptr_J = dt_ptr_J + head * dt_stride_s
        if RAGGED:
            dt_head_ptr_J = tl.where(new_J, dt_head_ptr_J, dt_ring_ptr + ring_J * S + head)
        dt_J = tl.load(dt_head_ptr_J, mask=live_J, other=0).to(tl.float32)
        D = tl.load(D_ptr + h0 + f).to(tl.float32)

        # up to the row before this block: every query of the block sees these through one decay, 2^(s_before)
        y_MP = _dot(c_MN, tl.trans(enter_PN), tl.zeros((BLOCK_J, BLOCK_P), tl.float32), PRECISION)
        y_MP = y_MP * tl.exp2(s_before)
        if doc_ptr is not None:
            y_MP = tl.where(entered_M[:, None], y_MP, 0)
        if BLOCKS > 1:
            for i0 in tl.range(0, block * BLOCK_J, BLOCK_J, num_stages=STAGES):
                j_I = lo + i0 + i_J
                token_I = m0 + (j_I - start)
                x_ptr_I = x_ptr + token_I * x_stride_l
                b_ptr_I = b_ptr + token_I * b_stride_l
                dt_ptr_I = dt_ptr + token_I * dt_stride_l + head * dt_stride_s
                if RAGGED:
                    new_I = j_I >= start
                    ring_I = j_I % W
                    x_ptr_I = tl.where(new_I, x_ptr_I, x_ring_ptr + ring_I * (G * P))
                    b_ptr_I = tl.where(new_I, b_ptr_I, b_ring_ptr + ring_I * (G * N))
                    dt_ptr_I = tl.where(new_I, dt_ptr_I, dt_ring_ptr + ring_I * S + head)
                b_IN = tl.load(b_ptr_I[:, None] + n_N[None, :], mask=in_N[None, :], other=0)
                x_IP = tl.load(x_ptr_I[:, None] + p_P[None, :], mask=in_P[None, :], other=0)
                s_I = tl.load(s_ptr - block * BLOCK_J + head * Q + i0 + i_J)
                weight_I = tl.exp2(s_before - s_I) * tl.load(dt_ptr_I).to(tl.float32)
                score_MI = _dot(c_MN, tl.trans(b_IN), tl.zeros((BLOCK_J, BLOCK_J), tl.float32), PRECISION)
                score_MI = score_MI * weight_I[None, :]
                if doc_ptr is not None:
                    score_MI = tl.where(doc_M[:, None] == tl.load(doc_ptr + j_I)[None, :], score_MI, 0)
                y_MP = _dot(score_MI.to(WEIGHT), x_IP.to(WEIGHT), y_MP, PRECISION)
        y_MP = y_MP * tl.exp2(s_M - s_before)[:, None]

        # the block's own rows
        score_MJ = _dot(c_MN, tl.trans(b_JN), tl.zeros((BLOCK_J, BLOCK_J), tl.float32), PRECISION)
        decay_MJ = tl.exp2(tl.where(seen_MJ, s_M[:, None] - s_M[None, :], float("-inf"))) * dt_J[None, :]
        score_MJ = score_MJ * decay_MJ + tl.where(own_MJ, D, 0)
        y_MP = _dot(score_MJ.to(WEIGHT), x_JP.to(WEIGHT), y_MP, PRECISION)
        y_ptr_M = y_ptr + token_M * (H * P) + f * P
        tl.store(y_ptr_M[:, None] + p_P[None, :], y_MP, mask=live_M[:, None] & in_P[None, :])


@dataclass(frozen=True)
class StatesLaunch:
    """How the state walk is cut into programs.

    Args:
        block_p, block_n: tile of a state that one program walks with.
        block_j: rows it takes up at a time, at most the chunk.
        warps, stages: of a program; stages is the depth of the walk's pipeline.
        pieces: that prefill cuts a row's walk into, so that a long row keeps more programs busy.
    """

    block_p: int = 64
    block_n: int = 64
    block_j: int = 64
    warps: int = 4
    stages: int = 3
    pieces: int = 1


@dataclass(frozen=True)
class OutputsLaunch:
    """How the outputs of a chunk are cut into programs.

    Args:
        block_p: columns of a head that one program computes.
        block_j: queries of a program, and rows it takes up at a time, at most the chunk.
        heads: of a group that a program computes one after another.
        warps, stages: of a program; stages is the depth of the pipeline over blocks of rows, and over heads where a
            chunk is one block.
    """

    block_p: int = 128
    block_j: int = 64
    heads: int = 1
    warps: int = 4
    stages: int = 1


def states_launch(x: Tensor, states: int) -> StatesLaunch:
    """The walk's defaults for activations like x and so many states, of which few ask for small tiles."""
    if x.element_size() > 2:
        return StatesLaunch(block_j=32, stages=2)
    return StatesLaunch(block_p=32 if states < 32 else 64)


def outputs_launch(x: Tensor, width: int) -> OutputsLaunch:
    """The outputs' defaults for activations like x and the wider of P and N; by what an H100's registers hold."""
    if x.element_size() > 2:
        return OutputsLaunch(block_p=64, block_j=16, warps=8)
    if width > 128:
        return OutputsLaunch(block_p=64, warps=8)
    return OutputsLaunch(block_p=128 if x.dtype == torch.bfloat16 else 64)


def block(width: int, most: int | None = None) -> int:
    """The power of two that covers width, tl.dot's least of 16 at least, `most` at most."""
    size = max(triton.next_power_of_2(width), 16)
    return size if most is None else min(size, most)


def _check(x_BLGP: Tensor, dt_BLS: Tensor, B_BLGN: Tensor, C_BLHN: Tensor, chunk: int) -> None:
    G, S, H = x_BLGP.shape[2], dt_BLS.shape[2], C_BLHN.shape[2]
    if S % G or H % S:
        raise ValueError(f"{S} state heads must be a multiple of {G} key/value heads and divide {H} query heads")
    if chunk < 16 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk} must be a power of two and at least 16")
    for name, t in (("x", x_BLGP), ("B", B_BLGN), ("C", C_BLHN)):
        if t.stride(-1) != 1:
            raise ValueError(f"{name} of strides {t.stride()}: its last dimension must be contiguous")
        if t.dtype != x_BLGP.dtype:
            raise ValueError(f"{name} is {t.dtype}, x is {x_BLGP.dtype}")


def ssd_forward(
    x_BLGP: Tensor,
    dt_BLS: Tensor,
    A_S: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_H: Tensor,
    *,
    delay: int = 0,
    doc_BL: Tensor | None = None,
    state_BSPN: Tensor | None = None,
    chunk: int = 128,
    enter_dtype: torch.dtype | None = None,
    launch: OutputsLaunch | None = None,
    walk: StatesLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query SSD over whole sequences, row j seen by the queries from j + delay on: y_t is that of
    `ssd.ssd` on x, B and dt delayed, without moving them.

    Args:
        x_BLGP, B_BLGN, C_BLHN: values, keys, queries of one dtype, any strides with the last dimension contiguous.
        dt_BLS: step sizes after softplus, fp32.
        A_S, D_H: decay rates (negative) and skip weights, fp32.
        delay: tokens by which a row comes late; the first `delay` outputs are 0, with an initial state too.
        doc_BL: integer document ids, each document's tokens side by side; a row reaches its own document only.
        state_BSPN: initial states, of the document of a row's first token; None for zeros.
        chunk: rows of one chunk, a power of two.
        enter_dtype: of the states entering the chunks; None is bf16 for bf16 inputs, fp32 for others.
        launch, walk: how to cut the outputs and the state walk into programs.

    Returns:
        y (B, L, H, P) in x's dtype; the final states (B, S, P, N) fp32, of the last token's document; and the states
        entering the K = max(ceil((L - delay) / chunk), 1) chunks (B, K, S, P, N), chunk i those of the document
        of row i chunk - 1.

    Raises:
        ValueError: head counts that do not divide each other, another chunk, dtypes or strides than above.
    """
    _check(x_BLGP, dt_BLS, B_BLGN, C_BLHN, chunk)
    b, L, G, P = x_BLGP.shape
    S, H, N = dt_BLS.shape[2], C_BLHN.shape[2], B_BLGN.shape[3]
    chunks = max(triton.cdiv(L - delay, chunk), 1)
    doc_BL = None if doc_BL is None else doc_BL.contiguous()
    state_BSPN = None if state_BSPN is None else state_BSPN.contiguous()
    if enter_dtype is None:
        enter_dtype = torch.bfloat16 if x_BLGP.dtype == torch.bfloat16 else torch.float32
    enter_BKSPN = x_BLGP.new_empty(b, chunks, S, P, N, dtype=enter_dtype)
    final_BSPN = x_BLGP.new_empty(b, S, P, N, dtype=torch.float32)
    s_BKSQ = x_BLGP.new_empty(b, chunks, S, chunk, dtype=torch.float32)
    walk = walk or states_launch(x_BLGP, b * S)
    block_p, block_n = block(P, walk.block_p), block(N, walk.block_n)
    _states[(S * triton.cdiv(P, block_p) * triton.cdiv(N, block_n), b)](
        x_BLGP, dt_BLS, A_S, B_BLGN, doc_BL, state_BSPN, final_BSPN, enter_BKSPN, s_BKSQ, None, None,
        *x_BLGP.stride()[:3], *dt_BLS.stride(), *B_BLGN.stride()[:3], L, L, chunks,
        None, None, None, None, None, None, None, 0, 0, 0, 0, 0, 0, 1,
        G=G, S=S, P=P, N=N, Q=chunk, WINDOW=delay, W=0, STEP=0, REWIND=0, BLOCK_R=1,
        BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_J=min(walk.block_j, chunk),
        PRECISION=precision(x_BLGP), STAGES=walk.stages, num_warps=walk.warps,
    )  # fmt: skip
    y_BLHP = x_BLGP.new_empty(b, L, H, P)
    launch = launch or outputs_launch(x_BLGP, max(P, N))
    block_p, block_j = block(P, launch.block_p), min(launch.block_j, chunk)
    heads = math.gcd(launch.heads, H // G)
    _outputs[(b * chunks * (chunk // block_j) * (H // heads) * triton.cdiv(P, block_p),)](
        x_BLGP, dt_BLS, B_BLGN, C_BLHN, D_H, doc_BL, enter_BKSPN, s_BKSQ, y_BLHP,
        *x_BLGP.stride()[:3], *dt_BLS.stride(), *B_BLGN.stride()[:3], *C_BLHN.stride()[:3], L, L, chunks,
        None, None, None, None, None, None, None, 0, 0, 0, 0, 0,
        G=G, S=S, H=H, P=P, N=N, Q=chunk, WINDOW=delay, W=0, STEP=0, REWIND=0, BLOCK_R=1,
        BLOCK_P=block_p, BLOCK_N=block(N), BLOCK_J=block_j, HEADS=heads,
        PRECISION=precision(x_BLGP), STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip
    return y_BLHP, final_BSPN, enter_BKSPN

"""Gradients of the grouped-query SSD as Triton kernels: what `ssd_forward` computes, differentiated.

Shapes: B batch, L length, H query heads, G key/value heads, S state heads, P head width, N state width, K chunks
of Q rows, M = K Q rows of a padded stream; in the kernels F = H/S heads of a state, I a tile of rows, J a tile of
queries, X a tile of P or N.

Row j of the stream is the token j, and is read by the query t = j + delay and later ones. With s_j the inclusive sum of
A dt from the start of the chunk, S_in the state entering it, G the gradient of the state leaving it, and the
pairs i <= j of one document

    m_ij = exp(s_j - s_i) (B_i . C_t) (x_i . dy_t),
    r_j  = exp(s_j) dy_t . (S_in C_t),   u_i = exp(s_Q - s_i) x_i . (G B_i)

    dC_t  = sum_i exp(s_j - s_i) dt_i (dy_t . x_i) B_i + exp(s_j) S_in^T dy_t
    dx_i  = sum_hj exp(s_j - s_i) dt_i (C_t . B_i) dy_t + sum_s exp(s_Q - s_i) dt_i G B_i + sum_h D_h dy_{i + delay}
    dB_i  = sum_hj exp(s_j - s_i) dt_i (dy_t . x_i) C_t + sum_s exp(s_Q - s_i) dt_i G^T x_i
    dD_h  = sum_i dy_{i + delay} . x_i
    G of the chunk before = exp(s_Q) G + sum_hj exp(s_j) dy_t C_t^T
    da_k  = sum_{i < k <= j} m_ij dt_i + sum_{j >= k} r_j + sum_{i < k} u_i dt_i + exp(s_Q) <G, S_in>
    ddt_i = sum_j m_ij + u_i + A da_i,   dA = sum_k dt_k da_k

The pairs around k are the row sums minus the column sums of m from k on, both taken from the same fp32 products,
so that what cancels does so to fp32's rounding. In the kernels s is in units of log2(e), for exp2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import precision
from .prefix import prefix_sum
from .ssd_forward import _states, block, states_launch

LOG2_E = tl.constexpr(1.4426950408889634)


def _walk_launch(P: int, N: int, fp32: bool, states: int) -> dict[str, int]:
    """Tiles of the reverse walk of so many states, of which few ask for small tiles."""
    block = 32 if states * triton.cdiv(P, 64) * triton.cdiv(N, 64) < 128 else 64
    launch = {"BLOCK_P": block, "BLOCK_N": block}
    if fp32:
        return launch | {"BLOCK_J": 32, "num_warps": block // 8, "STAGES": 2}
    return launch | {"BLOCK_J": 64, "num_warps": 4, "STAGES": 3}


def _query_launch(P: int, N: int, fp32: bool) -> dict[str, int]:
    """Tiles of dC: what fits an H100's registers."""
    if fp32:
        return {"BLOCK": 16, "BLOCK_I": 16, "BLOCK_X": 16, "num_warps": 4, "STAGES": 1}
    return {"BLOCK": 64, "BLOCK_I": 32, "BLOCK_X": 64, "num_warps": 4 if max(P, N) <= 128 else 8, "STAGES": 2}


def _value_launch(P: int, N: int, fp32: bool) -> dict[str, int]:
    """Tiles of dx."""
    if fp32:
        return {"BLOCK": 16, "BLOCK_J": 16, "BLOCK_X": 16, "num_warps": 4, "STAGES": 1}
    return {"BLOCK": 64, "BLOCK_J": 32, "BLOCK_X": 32, "num_warps": 4 if max(P, N) <= 128 else 8, "STAGES": 2}


def _key_launch(P: int, N: int, fp32: bool) -> dict[str, int]:
    """Tiles of dB."""
    if fp32:
        return {"BLOCK": 16, "BLOCK_J": 16, "BLOCK_X": 16, "num_warps": 4, "STAGES": 1}
    return {"BLOCK": 64, "BLOCK_J": 32, "BLOCK_X": 64, "num_warps": 4 if max(P, N) <= 128 else 8, "STAGES": 2}


def _within(launch: dict[str, int], chunk: int) -> dict[str, int]:
    """The launch with no tile of rows or queries longer than the chunk."""
    return launch | {name: min(launch[name], chunk) for name in ("BLOCK", "BLOCK_I", "BLOCK_J") if name in launch}


@triton.jit
def _decays(
    dt_ptr, dt_stride_b, dt_stride_l, dt_stride_s, A_ptr, s_ptr, step_ptr, rows,
    Q: tl.constexpr,
):  # fmt: skip
    """log2(e) s and dt of one chunk and state; rows beyond the last have a dt of 0."""
    chunk = tl.program_id(0)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row_Q = chunk * Q + tl.arange(0, Q)
    dt_ptr += b * dt_stride_b + s * dt_stride_s
    dt_Q = tl.load(dt_ptr + row_Q.to(tl.int64) * dt_stride_l, mask=row_Q < rows, other=0).to(tl.float32)
    at_Q = (b * tl.num_programs(1) + s) * tl.num_programs(0) * Q + row_Q
    tl.store(step_ptr + at_Q, dt_Q)
    tl.store(s_ptr + at_Q, prefix_sum(dt_Q * (tl.load(A_ptr + s).to(tl.float32) * LOG2_E), Q))


@triton.jit(do_not_specialize=["L", "rows", "chunks", "delay"])
def _walk(
    dy_ptr, dy_stride_b, dy_stride_l, dy_stride_h, c_ptr, c_stride_b, c_stride_l, c_stride_h,
    s_ptr, doc_ptr, doc_stride_b, doc_stride_l, enter_ptr, last_grad_ptr, grad_ptr, first_grad_ptr, carried_ptr,
    L, rows, chunks, delay,
    S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, HAS_DOC: tl.constexpr, HAS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: each chunk's G, its product with S_in; then the initial state's gradient."""
    F: tl.constexpr = H // S
    STEPS: tl.constexpr = F * (Q // BLOCK_J)  # a chunk's queries, some at a time
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    p_P = tile // tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n_N = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_P = p_P < P
    in_N = n_N < N
    in_PN = in_P[:, None] & in_N[None, :]
    at_PN = p_P[:, None] * N + n_N[None, :]
    j_J = tl.arange(0, BLOCK_J)

    dy_ptr += b * dy_stride_b
    c_ptr += b * c_stride_b
    s_ptr += (b * S + s) * chunks * Q
    doc_ptr += b * doc_stride_b
    newest = tl.maximum(rows - 1, 0)
    grad_PN = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_LAST:
        grad_PN = tl.load(last_grad_ptr + (b * S + s) * P * N + at_PN, mask=in_PN, other=0).to(tl.float32)
        if HAS_DOC:
            kept = tl.load(doc_ptr + newest.to(tl.int64) * doc_stride_l) == tl.load(
                doc_ptr + (L - 1).to(tl.int64) * doc_stride_l
            )
            grad_PN = tl.where(kept, grad_PN, 0)

    for it in tl.range(0, chunks * STEPS, num_stages=STAGES):
        chunk = chunks - 1 - it // STEPS
        step = it % STEPS
        h = s * F + step // (Q // BLOCK_J)
        row_J = chunk * Q + step % (Q // BLOCK_J) * BLOCK_J + j_J
        t_J = (row_J + delay).to(tl.int64)
        live_J = row_J < rows
        s_J = tl.load(s_ptr + row_J)
        s_last = tl.load(s_ptr + chunk * Q + Q - 1)
        keep = tl.exp2(s_last)
        read_J = live_J
        if HAS_DOC:
            before = tl.load(doc_ptr + tl.maximum(chunk * Q - 1, 0).to(tl.int64) * doc_stride_l)
            last = tl.load(doc_ptr + tl.minimum(chunk * Q + Q - 1, newest).to(tl.int64) * doc_stride_l)
            doc_J = tl.load(doc_ptr + t_J * doc_stride_l, mask=live_J, other=0)
            keep = tl.where(before == last, keep, 0)
            read_J = live_J & (doc_J == before)
        dy_JP = tl.load(
            dy_ptr + t_J[:, None] * dy_stride_l + h * dy_stride_h + p_P[None, :],
            mask=live_J[:, None] & in_P[None, :],
            other=0,
        )
        c_JN = tl.load(
            c_ptr + t_J[:, None] * c_stride_l + h * c_stride_h + n_N[None, :],
            mask=live_J[:, None] & in_N[None, :],
            other=0,
        )
        at = ((b * chunks + chunk) * S + s) * P * N
        once_P = p_P + step * P < P  # with the chunk's first step only; masked instead of branched to be pipelined
        enter_PN = tl.load(enter_ptr + at + at_PN, mask=once_P[:, None] & in_N[None, :], other=0).to(tl.float32)
        if step == 0:
            tl.store(grad_ptr + at + at_PN, grad_PN, mask=in_PN)
            tl.store(
                carried_ptr + ((b * chunks + chunk) * S + s) * tl.num_programs(0) + tile,
                keep * tl.sum(tl.sum(grad_PN * enter_PN, 1), 0),
            )
        grad_PN *= tl.where(step == 0, keep, 1.0)
        reach_J = tl.where(read_J, tl.exp2(s_J), 0)
        weight_PJ = tl.trans((dy_JP.to(tl.float32) * reach_J[:, None]).to(WEIGHT))
        grad_PN = tl.dot(weight_PJ, c_JN.to(WEIGHT), grad_PN, input_precision=PRECISION)
    tl.store(first_grad_ptr + (b * S + s) * P * N + at_PN, grad_PN, mask=in_PN)


@triton.jit(do_not_specialize=["L", "rows", "chunks", "delay"])
def _dc(
    x_ptr, x_stride_b, x_stride_l, x_stride_g, b_ptr, b_stride_b, b_stride_l, b_stride_g,
    c_ptr, c_stride_b, c_stride_l, c_stride_h, dy_ptr, dy_stride_b, dy_stride_l, dy_stride_h,
    s_ptr, step_ptr, doc_ptr, doc_stride_b, doc_stride_l, enter_ptr, dc_ptr, reach_ptr,
    L, rows, chunks, delay,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
    HAS_DOC: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dC and r of one tile of queries and one head."""
    h = tl.program_id(0)
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    g = h // (H // G)
    s = h // (H // S)
    chunk = tile // (Q // BLOCK)
    j_J = tile * BLOCK + tl.arange(0, BLOCK)
    p_P = tl.arange(0, BLOCK_P)
    n_N = tl.arange(0, BLOCK_N)
    in_P = p_P < P
    in_N = n_N < N
    live_J = j_J < rows
    t_J = (j_J + delay).to(tl.int64)
    x_ptr += b * x_stride_b + g * x_stride_g
    b_ptr += b * b_stride_b + g * b_stride_g
    c_ptr += b * c_stride_b + h * c_stride_h
    dy_ptr += b * dy_stride_b + h * dy_stride_h
    s_ptr += (b * S + s) * chunks * Q
    step_ptr += (b * S + s) * chunks * Q
    doc_ptr += b * doc_stride_b
    enter_ptr += ((b * chunks + chunk) * S + s) * P * N

    # what the query drew from the entering state
    x_X = tl.arange(0, BLOCK_X)
    dc_JN = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for p0 in tl.range(0, P, BLOCK_X, num_stages=STAGES):
        in_X = x_X < P - p0
        dy_JX = tl.load(
            dy_ptr + t_J[:, None] * dy_stride_l + (p0 + x_X)[None, :], mask=live_J[:, None] & in_X[None, :], other=0
        )
        enter_XN = tl.load(
            enter_ptr + (p0 + x_X)[:, None] * N + n_N[None, :], mask=in_X[:, None] & in_N[None, :], other=0
        )
        dc_JN = tl.dot(dy_JX.to(WEIGHT), enter_XN.to(WEIGHT), dc_JN, input_precision=PRECISION)
    s_J = tl.load(s_ptr + j_J)
    reach_J = tl.where(live_J, tl.exp2(s_J), 0)
    if HAS_DOC:
        doc_J = tl.load(doc_ptr + t_J * doc_stride_l, mask=live_J, other=0)
        before = tl.load(doc_ptr + tl.maximum(chunk * Q - 1, 0).to(tl.int64) * doc_stride_l)
        reach_J = tl.where(doc_J == before, reach_J, 0)
    dc_JN *= reach_J[:, None]
    c_JN = tl.load(c_ptr + t_J[:, None] * c_stride_l + n_N[None, :], mask=live_J[:, None] & in_N[None, :], other=0)
    r_J = tl.sum(c_JN.to(tl.float32) * dc_JN, 1)
    tl.store(reach_ptr + (b * H + h) * chunks * Q + j_J, r_J)

    # what it drew from the chunk's rows
    dy_JP = tl.load(
        dy_ptr + t_J[:, None] * dy_stride_l + p_P[None, :], mask=live_J[:, None] & in_P[None, :], other=0
    ).to(WEIGHT)
    for i0 in tl.range(chunk * Q, (tile + 1) * BLOCK, BLOCK_I, num_stages=STAGES):
        i_I = i0 + tl.arange(0, BLOCK_I)
        live_I = i_I < rows
        at_I = i_I.to(tl.int64)
        x_IP = tl.load(x_ptr + at_I[:, None] * x_stride_l + p_P[None, :], mask=live_I[:, None] & in_P[None, :], other=0)
        b_IN = tl.load(b_ptr + at_I[:, None] * b_stride_l + n_N[None, :], mask=live_I[:, None] & in_N[None, :], other=0)
        s_I = tl.load(s_ptr + i_I)
        dt_I = tl.load(step_ptr + i_I)
        pair_JI = live_J[:, None] & (i_I[None, :] <= j_J[:, None])
        if HAS_DOC:
            doc_I = tl.load(doc_ptr + at_I * doc_stride_l, mask=live_I, other=0)
            pair_JI = pair_JI & (doc_J[:, None] == doc_I[None, :])
        dot_JI = tl.dot(dy_JP, tl.trans(x_IP.to(WEIGHT)), input_precision=PRECISION)
        decay_JI = tl.exp2(tl.where(pair_JI, s_J[:, None] - s_I[None, :], float("-inf"))) * dt_I[None, :]
        dc_JN = tl.dot((dot_JI * decay_JI).to(WEIGHT), b_IN.to(WEIGHT), dc_JN, input_precision=PRECISION)
    tl.store(dc_ptr + ((b * L + t_J) * H + h)[:, None] * N + n_N[None, :], dc_JN, mask=live_J[:, None] & in_N[None, :])


@triton.jit(do_not_specialize=["L", "rows", "chunks", "delay"])
def _dx(
    x_ptr, x_stride_b, x_stride_l, x_stride_g, b_ptr, b_stride_b, b_stride_l, b_stride_g,
    c_ptr, c_stride_b, c_stride_l, c_stride_h, dy_ptr, dy_stride_b, dy_stride_l, dy_stride_h,
    s_ptr, step_ptr, doc_ptr, doc_stride_b, doc_stride_l, grad_ptr, D_ptr,
    dx_ptr, gained_ptr, queries_ptr, keys_ptr, dD_ptr,
    L, rows, chunks, delay,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
    HAS_DOC: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of one tile of rows and one group; of its states u, of its heads the sums of m over the queries, those over
    the rows, and dD."""
    R: tl.constexpr = S // G
    F: tl.constexpr = H // S
    g = tl.program_id(0)
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    own = tile % (Q // BLOCK)
    chunk = tile // (Q // BLOCK)
    M = chunks.to(tl.int64) * Q
    i_I = tile * BLOCK + tl.arange(0, BLOCK)
    at_I = i_I.to(tl.int64)
    live_I = i_I < rows
    p_P = tl.arange(0, BLOCK_P)
    n_N = tl.arange(0, BLOCK_N)
    x_X = tl.arange(0, BLOCK_X)
    in_P = p_P < P
    in_N = n_N < N
    x_ptr += b * x_stride_b + g * x_stride_g
    b_ptr += b * b_stride_b + g * b_stride_g
    c_ptr += b * c_stride_b
    dy_ptr += b * dy_stride_b
    doc_ptr += b * doc_stride_b
    x_IP = tl.load(x_ptr + at_I[:, None] * x_stride_l + p_P[None, :], mask=live_I[:, None] & in_P[None, :], other=0)
    live_out_I = live_I
    if HAS_DOC:
        doc_I = tl.load(doc_ptr + at_I * doc_stride_l, mask=live_I, other=0)
        last = tl.load(doc_ptr + tl.maximum(tl.minimum(chunk * Q + Q - 1, rows - 1), 0).to(tl.int64) * doc_stride_l)
        live_out_I = live_I & (doc_I == last)

    # through the state leaving the chunk
    dx_IP = tl.zeros((BLOCK, BLOCK_P), tl.float32)
    for r in range(R):
        s = g * R + r
        at_s = (b * S + s) * M
        s_I = tl.load(s_ptr + at_s + i_I)
        dt_I = tl.load(step_ptr + at_s + i_I)
        s_last = tl.load(s_ptr + at_s + chunk * Q + Q - 1)
        weight_I = tl.exp2(tl.where(live_out_I, s_last - s_I, float("-inf")))
        at = ((b * chunks + chunk) * S + s) * P * N
        gained_IP = tl.zeros((BLOCK, BLOCK_P), tl.float32)
        for n0 in tl.range(0, N, BLOCK_X, num_stages=STAGES):
            in_X = x_X < N - n0
            b_IX = tl.load(
                b_ptr + at_I[:, None] * b_stride_l + (n0 + x_X)[None, :], mask=live_I[:, None] & in_X[None, :], other=0
            )
            grad_PX = tl.load(
                grad_ptr + at + p_P[:, None] * N + (n0 + x_X)[None, :], mask=in_P[:, None] & in_X[None, :], other=0
            )
            gained_IP = tl.dot(b_IX.to(WEIGHT), tl.trans(grad_PX.to(WEIGHT)), gained_IP, input_precision=PRECISION)
        tl.store(gained_ptr + at_s + i_I, weight_I * tl.sum(gained_IP * x_IP.to(tl.float32), 1))
        dx_IP += gained_IP * (weight_I * dt_I)[:, None]

    # through the chunk's queries, head after head
    b_IN = tl.load(b_ptr + at_I[:, None] * b_stride_l + n_N[None, :], mask=live_I[:, None] & in_N[None, :], other=0)
    tiles = (Q - own * BLOCK) // BLOCK_J
    keys_I = tl.zeros((BLOCK,), tl.float32)
    skips_I = tl.zeros((BLOCK,), tl.float32)
    for it in tl.range(0, R * F * tiles, num_stages=STAGES):
        h = g * (R * F) + it // tiles
        other = it % tiles
        at_s = (b * S + h // F) * M
        s_I = tl.load(s_ptr + at_s + i_I)
        dt_I = tl.load(step_ptr + at_s + i_I)
        j_J = tile * BLOCK + other * BLOCK_J + tl.arange(0, BLOCK_J)
        live_J = j_J < rows
        t_J = (j_J + delay).to(tl.int64)
        s_J = tl.load(s_ptr + at_s + j_J)
        c_JN = tl.load(
            c_ptr + t_J[:, None] * c_stride_l + h * c_stride_h + n_N[None, :],
            mask=live_J[:, None] & in_N[None, :],
            other=0,
        ).to(WEIGHT)
        dy_JP = tl.load(
            dy_ptr + t_J[:, None] * dy_stride_l + h * dy_stride_h + p_P[None, :],
            mask=live_J[:, None] & in_P[None, :],
            other=0,
        ).to(WEIGHT)
        pair_IJ = live_J[None, :] & (i_I[:, None] <= j_J[None, :])
        if HAS_DOC:
            doc_J = tl.load(doc_ptr + t_J * doc_stride_l, mask=live_J, other=0)
            pair_IJ = pair_IJ & (doc_I[:, None] == doc_J[None, :])
        decay_IJ = tl.exp2(tl.where(pair_IJ, s_J[None, :] - s_I[:, None], float("-inf")))
        score_IJ = tl.dot(b_IN.to(WEIGHT), tl.trans(c_JN), input_precision=PRECISION) * decay_IJ
        dot_IJ = tl.dot(x_IP.to(WEIGHT), tl.trans(dy_JP), input_precision=PRECISION)
        m_IJ = score_IJ * dot_IJ
        skip_IJ = pair_IJ & (i_I[:, None] == j_J[None, :])
        keys_I = tl.where(other == 0, 0, keys_I) + tl.sum(m_IJ, 1)
        skips_I = tl.where(other == 0, 0, skips_I) + tl.sum(tl.where(skip_IJ, dot_IJ, 0), 1)
        tl.store(queries_ptr + ((own * batch + b) * H + h) * M + j_J, tl.sum(m_IJ * dt_I[:, None], 0))
        if other == tiles - 1:
            tl.store(keys_ptr + (b * H + h) * M + i_I, keys_I)
            tl.store(dD_ptr + (b * tl.num_programs(1) + tile) * H + h, tl.sum(skips_I, 0))
        weight_IJ = score_IJ * dt_I[:, None] + tl.where(skip_IJ, tl.load(D_ptr + h), 0)
        dx_IP = tl.dot(weight_IJ.to(WEIGHT), dy_JP, dx_IP, input_precision=PRECISION)
    at_I = (b * L + i_I) * G + g
    tl.store(dx_ptr + at_I[:, None] * P + p_P[None, :], dx_IP, mask=live_I[:, None] & in_P[None, :])


@triton.jit(do_not_specialize=["L", "rows", "chunks", "delay"])
def _db(
    x_ptr, x_stride_b, x_stride_l, x_stride_g, b_ptr, b_stride_b, b_stride_l, b_stride_g,
    c_ptr, c_stride_b, c_stride_l, c_stride_h, dy_ptr, dy_stride_b, dy_stride_l, dy_stride_h,
    s_ptr, step_ptr, doc_ptr, doc_stride_b, doc_stride_l, grad_ptr, db_ptr,
    L, rows, chunks, delay,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
    HAS_DOC: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB of one tile of rows and one group."""
    R: tl.constexpr = S // G
    F: tl.constexpr = H // S
    g = tl.program_id(0)
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    own = tile % (Q // BLOCK)
    chunk = tile // (Q // BLOCK)
    M = chunks.to(tl.int64) * Q
    i_I = tile * BLOCK + tl.arange(0, BLOCK)
    at_I = i_I.to(tl.int64)
    live_I = i_I < rows
    p_P = tl.arange(0, BLOCK_P)
    n_N = tl.arange(0, BLOCK_N)
    x_X = tl.arange(0, BLOCK_X)
    in_P = p_P < P
    in_N = n_N < N
    x_ptr += b * x_stride_b + g * x_stride_g
    b_ptr += b * b_stride_b + g * b_stride_g
    c_ptr += b * c_stride_b
    dy_ptr += b * dy_stride_b
    doc_ptr += b * doc_stride_b
    x_IP = tl.load(x_ptr + at_I[:, None] * x_stride_l + p_P[None, :], mask=live_I[:, None] & in_P[None, :], other=0)
    live_out_I = live_I
    if HAS_DOC:
        doc_I = tl.load(doc_ptr + at_I * doc_stride_l, mask=live_I, other=0)
        last = tl.load(doc_ptr + tl.maximum(tl.minimum(chunk * Q + Q - 1, rows - 1), 0).to(tl.int64) * doc_stride_l)
        live_out_I = live_I & (doc_I == last)

    # through the state leaving the chunk
    db_IN = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for r in range(R):
        s = g * R + r
        at_s = (b * S + s) * M
        s_I = tl.load(s_ptr + at_s + i_I)
        dt_I = tl.load(step_ptr + at_s + i_I)
        s_last = tl.load(s_ptr + at_s + chunk * Q + Q - 1)
        weight_I = tl.exp2(tl.where(live_out_I, s_last - s_I, float("-inf")))
        at = ((b * chunks + chunk) * S + s) * P * N
        gained_IN = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        for p0 in tl.range(0, P, BLOCK_X, num_stages=STAGES):
            in_X = x_X < P - p0
            x_IX = tl.load(
                x_ptr + at_I[:, None] * x_stride_l + (p0 + x_X)[None, :], mask=live_I[:, None] & in_X[None, :], other=0
            )
            grad_XN = tl.load(
                grad_ptr + at + (p0 + x_X)[:, None] * N + n_N[None, :], mask=in_X[:, None] & in_N[None, :], other=0
            )
            gained_IN = tl.dot(x_IX.to(WEIGHT), grad_XN.to(WEIGHT), gained_IN, input_precision=PRECISION)
        db_IN += gained_IN * (weight_I * dt_I)[:, None]

    # through the chunk's queries, head after head
    tiles = (Q - own * BLOCK) // BLOCK_J
    for it in tl.range(0, R * F * tiles, num_stages=STAGES):
        h = g * (R * F) + it // tiles
        other = it % tiles
        at_s = (b * S + h // F) * M
        s_I = tl.load(s_ptr + at_s + i_I)
        dt_I = tl.load(step_ptr + at_s + i_I)
        j_J = tile * BLOCK + other * BLOCK_J + tl.arange(0, BLOCK_J)
        live_J = j_J < rows
        t_J = (j_J + delay).to(tl.int64)
        s_J = tl.load(s_ptr + at_s + j_J)
        c_JN = tl.load(
            c_ptr + t_J[:, None] * c_stride_l + h * c_stride_h + n_N[None, :],
            mask=live_J[:, None] & in_N[None, :],
            other=0,
        ).to(WEIGHT)
        dy_JP = tl.load(
            dy_ptr + t_J[:, None] * dy_stride_l + h * dy_stride_h + p_P[None, :],
            mask=live_J[:, None] & in_P[None, :],
            other=0,
        ).to(WEIGHT)
        pair_IJ = live_J[None, :] & (i_I[:, None] <= j_J[None, :])
        if HAS_DOC:
            doc_J = tl.load(doc_ptr + t_J * doc_stride_l, mask=live_J, other=0)
            pair_IJ = pair_IJ & (doc_I[:, None] == doc_J[None, :])
        decay_IJ = tl.exp2(tl.where(pair_IJ, s_J[None, :] - s_I[:, None], float("-inf")))
        dot_IJ = tl.dot(x_IP.to(WEIGHT), tl.trans(dy_JP), input_precision=PRECISION)
        weight_IJ = dot_IJ * decay_IJ * dt_I[:, None]
        db_IN = tl.dot(weight_IJ.to(WEIGHT), c_JN, db_IN, input_precision=PRECISION)
    at_I = (b * L + i_I) * G + g
    tl.store(db_ptr + at_I[:, None] * N + n_N[None, :], db_IN, mask=live_I[:, None] & in_N[None, :])


@triton.jit(do_not_specialize=["L", "rows", "chunks"])
def _ddt(
    step_ptr, doc_ptr, doc_stride_b, doc_stride_l, A_ptr,
    carried_ptr, reach_ptr, gained_ptr, queries_ptr, keys_ptr, ddt_ptr, dA_ptr,
    L, rows, chunks,
    S: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
    CARRIED: tl.constexpr, HAS_DOC: tl.constexpr,
):  # fmt: skip
    """ddt of one chunk and state, and its share of dA."""
    F: tl.constexpr = H // S
    TILES: tl.constexpr = Q // BLOCK
    chunk = tl.program_id(0)
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    M = chunks.to(tl.int64) * Q
    at_s = (b * S + s) * M
    k_Q = tl.arange(0, Q)
    live_Q = chunk * Q + k_Q < rows
    doc_ptr += b * doc_stride_b
    if HAS_DOC:
        doc_Q = tl.load(doc_ptr + (chunk * Q + k_Q).to(tl.int64) * doc_stride_l, mask=live_Q, other=0)
    da_Q = tl.zeros((Q,), tl.float32)
    for j0 in range(0, Q, BLOCK_J):
        j_J = j0 + tl.arange(0, BLOCK_J)
        row_J = chunk * Q + j_J
        dt_J = tl.load(step_ptr + at_s + row_J)
        from_J = tl.zeros((BLOCK_J,), tl.float32)
        column_J = tl.zeros((BLOCK_J,), tl.float32)
        for f in range(F):
            h = s * F + f
            from_J += tl.load(reach_ptr + (b * H + h) * M + row_J)
            column_J += tl.load(keys_ptr + (b * H + h) * M + row_J)
            for i in range(TILES):
                from_J += tl.load(queries_ptr + ((i * batch + b) * H + h) * M + row_J, mask=j_J // BLOCK >= i, other=0)
        from_J -= dt_J * column_J
        gained_J = dt_J * tl.load(gained_ptr + at_s + row_J)
        term_QJ = tl.where(j_J[None, :] >= k_Q[:, None], from_J[None, :], gained_J[None, :])
        if HAS_DOC:
            doc_J = tl.load(doc_ptr + row_J.to(tl.int64) * doc_stride_l, mask=row_J < rows, other=0)
            term_QJ = tl.where(doc_Q[:, None] == doc_J[None, :], term_QJ, 0)
        da_Q += tl.sum(term_QJ, 1)
    tiles_C = tl.arange(0, triton.next_power_of_2(CARRIED))
    at = ((b * chunks + chunk) * S + s) * CARRIED
    da_Q += tl.sum(tl.load(carried_ptr + at + tiles_C, mask=tiles_C < CARRIED, other=0), 0)

    direct_Q = tl.load(gained_ptr + at_s + chunk * Q + k_Q)
    for f in range(F):
        direct_Q += tl.load(keys_ptr + (b * H + s * F + f) * M + chunk * Q + k_Q)
    dt_Q = tl.load(step_ptr + at_s + chunk * Q + k_Q)
    ddt_Q = direct_Q + tl.load(A_ptr + s) * da_Q
    tl.store(ddt_ptr + (b * L + chunk * Q + k_Q) * S + s, ddt_Q, mask=live_Q)
    tl.store(dA_ptr + (b * chunks + chunk) * S + s, tl.sum(dt_Q * da_Q, 0))


def entering_states(
    x_BLGP: Tensor,
    dt_BLS: Tensor,
    A_S: Tensor,
    B_BLGN: Tensor,
    *,
    delay: int = 0,
    doc_BL: Tensor | None = None,
    state_BSPN: Tensor | None = None,
    chunk: int = 128,
) -> Tensor:
    """The states entering each chunk, as `ssd_forward` returns them, by its state walk alone.

    Args:
        x_BLGP, dt_BLS, A_S, B_BLGN, delay, doc_BL, state_BSPN, chunk: as in `ssd_forward`.

    Returns:
        (B, K, S, P, N), bf16 for bf16 inputs, fp32 for others.
    """
    b, L, G, P = x_BLGP.shape
    S, N = dt_BLS.shape[2], B_BLGN.shape[3]
    chunks = max(triton.cdiv(L - delay, chunk), 1)
    dtype = torch.bfloat16 if x_BLGP.dtype == torch.bfloat16 else torch.float32
    enter_BKSPN = x_BLGP.new_empty(b, chunks, S, P, N, dtype=dtype)
    s_BKSQ = x_BLGP.new_empty(b, chunks, S, chunk, dtype=torch.float32)
    doc_BL = None if doc_BL is None else doc_BL.contiguous()
    state_BSPN = None if state_BSPN is None else state_BSPN.contiguous()
    walk = states_launch(x_BLGP, b * S)
    block_p, block_n = block(P, walk.block_p), block(N, walk.block_n)
    _states[(S * triton.cdiv(P, block_p) * triton.cdiv(N, block_n), b)](
        x_BLGP, dt_BLS, A_S, B_BLGN, doc_BL, state_BSPN, None, enter_BKSPN, s_BKSQ, None, None,
        *x_BLGP.stride()[:3], *dt_BLS.stride(), *B_BLGN.stride()[:3], L, L, chunks,
        None, None, None, None, None, None, None, 0, 0, 0, 0, 0, 0, 1,
        G=G, S=S, P=P, N=N, Q=chunk, WINDOW=delay, W=0, STEP=0, REWIND=0, BLOCK_R=1,
        BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_J=min(walk.block_j, chunk),
        PRECISION=precision(x_BLGP), STAGES=walk.stages, num_warps=walk.warps,
    )  # fmt: skip
    return enter_BKSPN


def ssd_backward(
    dy_BLHP: Tensor,
    last_grad_BSPN: Tensor | None,
    x_BLGP: Tensor,
    dt_BLS: Tensor,
    A_S: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_H: Tensor,
    enter_BKSPN: Tensor,
    *,
    delay: int = 0,
    doc_BL: Tensor | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `ssd_forward`.

    Args:
        dy_BLHP: gradient of y.
        last_grad_BSPN: gradient of the final states, None for zero.
        x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, delay, doc_BL, chunk: as in `ssd_forward`.
        enter_BKSPN: its states entering each chunk.

    Returns:
        Gradients of x, dt, A, B, C, D, in their dtypes, and of the initial states (B, S, P, N) fp32.
    """
    b, L, G, P = x_BLGP.shape
    S, H, N = dt_BLS.shape[2], C_BLHN.shape[2], B_BLGN.shape[3]
    rows = max(L - delay, 0)
    chunks = enter_BKSPN.shape[1]
    M = chunks * chunk

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x_BLGP.new_empty(shape, dtype=dtype)

    # fp16's range is too small for states and weights
    bf16 = x_BLGP.dtype == torch.bfloat16
    weight = tl.bfloat16 if bf16 else tl.float32
    shared = {"HAS_DOC": doc_BL is not None, "PRECISION": precision(x_BLGP), "WEIGHT": weight}
    doc_BL = x_BLGP.new_zeros(1, 1, dtype=torch.int32) if doc_BL is None else doc_BL
    dy_BLHP, x_BLGP, B_BLGN, C_BLHN = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (dy_BLHP, x_BLGP, B_BLGN, C_BLHN)
    )
    A_S, D_H = A_S.contiguous(), D_H.contiguous()
    dy = (dy_BLHP, *dy_BLHP.stride()[:3])
    C = (C_BLHN, *C_BLHN.stride()[:3])
    streams = (x_BLGP, *x_BLGP.stride()[:3], B_BLGN, *B_BLGN.stride()[:3], *C, *dy)
    doc = (doc_BL, *doc_BL.stride())

    s_BSM, dt_BSM = new(b, S, M), new(b, S, M)
    _decays[(chunks, S, b)](dt_BLS, *dt_BLS.stride(), A_S, s_BSM, dt_BSM, rows, Q=chunk)

    launch = _within(_walk_launch(P, N, not bf16, b * S), chunk)
    tiles = triton.cdiv(P, launch["BLOCK_P"]) * triton.cdiv(N, launch["BLOCK_N"])
    grad_BKSPN = new(b, chunks, S, P, N, dtype=torch.bfloat16 if bf16 else torch.float32)
    first_grad_BSPN = new(b, S, P, N)
    carried = new(b, chunks, S, tiles)
    _walk[(tiles, S, b)](
        *dy, *C, s_BSM, *doc, enter_BKSPN, first_grad_BSPN if last_grad_BSPN is None else last_grad_BSPN.contiguous(),
        grad_BKSPN, first_grad_BSPN, carried, L, rows, chunks, delay,
        S=S, H=H, P=P, N=N, Q=chunk, HAS_LAST=last_grad_BSPN is not None, **shared, **launch,
    )  # fmt: skip

    # heads and groups are the fastest in the grids, so that those of one stretch of rows share what they load
    shape = {"G": G, "S": S, "H": H, "P": P, "N": N, "Q": chunk, "BLOCK_P": block(P), "BLOCK_N": block(N)}
    launch = _within(_query_launch(P, N, not bf16), chunk)
    dC_BLHN = new(b, L, H, N, dtype=C_BLHN.dtype)
    dC_BLHN[:, : L - rows].zero_()
    reach_BHM = new(b, H, M)
    _dc[(H, M // launch["BLOCK"], b)](
        *streams, s_BSM, dt_BSM, *doc, enter_BKSPN, dC_BLHN, reach_BHM, L, rows, chunks, delay,
        **shape, **shared, **launch,
    )  # fmt: skip

    launch = _within(_key_launch(P, N, not bf16), chunk)
    dB_BLGN = new(b, L, G, N, dtype=B_BLGN.dtype)
    dB_BLGN[:, rows:].zero_()
    _db[(G, M // launch["BLOCK"], b)](
        *streams, s_BSM, dt_BSM, *doc, grad_BKSPN, dB_BLGN, L, rows, chunks, delay, **shape, **shared, **launch
    )

    launch = _within(_value_launch(P, N, not bf16), chunk)
    blocks = chunk // launch["BLOCK"]
    dx_BLGP = new(b, L, G, P, dtype=x_BLGP.dtype)
    dx_BLGP[:, rows:].zero_()
    gained_BSM, keys_BHM, queries = new(b, S, M), new(b, H, M), new(blocks, b, H, M)
    dD = new(b, chunks * blocks, H)
    _dx[(G, chunks * blocks, b)](
        *streams, s_BSM, dt_BSM, *doc, grad_BKSPN, D_H, dx_BLGP, gained_BSM, queries, keys_BHM, dD,
        L, rows, chunks, delay, **shape, **shared, **launch,
    )  # fmt: skip

    ddt_BLS = new(b, L, S, dtype=dt_BLS.dtype)
    ddt_BLS[:, rows:].zero_()
    dA = new(b, chunks, S)
    _ddt[(chunks, S, b)](
        dt_BSM, *doc, A_S, carried, reach_BHM, gained_BSM, queries, keys_BHM, ddt_BLS, dA, L, rows, chunks,
        S=S, H=H, Q=chunk, BLOCK=launch["BLOCK"], BLOCK_J=min(32, chunk), CARRIED=tiles, HAS_DOC=shared["HAS_DOC"],
        num_warps=4,
    )  # fmt: skip
    dA_S, dD_H = dA.sum((0, 1)).to(A_S.dtype), dD.sum((0, 1)).to(D_H.dtype)
    return dx_BLGP, ddt_BLS, dA_S, dB_BLGN, dC_BLHN, dD_H, first_grad_BSPN

"""Grouped-query SSD: the state-space recurrence of a mixer layer over whole sequences.

Shapes: B batch, L length, H query heads, G key/value heads, S state heads (a multiple of G that divides H),
P head width, N state width; in the reference also C chunks of Q tokens, R = S/G states of a group and
K = H/S query heads of a state. Everything of a key/value group exists once, it is never repeated to H heads:

    a_t = exp(A_s dt_t),  S_t = a_t S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D_h x_t

with s the state head that query head h reads (s = h // (H/S)) and x, B those of its group (g = h // (H/G)).
Source: Dao & Gu 2024 (arXiv 2405.21060) section 6, with the query head's own C per head.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types

import torch
from torch import Tensor

from .ssd_op import ssd_op


def delay(t_BLX: Tensor, steps: int, doc_BL: Tensor | None = None) -> Tensor:
    """Shift a sequence to the right, so that position t holds what stood at t - steps, else zeros.

    Args:
        t_BLX: (B, L, ...) any dtype.
        steps: how far, in tokens; 0 returns the input.
        doc_BL: (B, L) document ids; a token never moves into another document.

    Returns:
        (B, L, ...) same dtype.
    """
    if steps == 0:
        return t_BLX
    L = t_BLX.shape[1]
    out = torch.zeros_like(t_BLX)
    if steps < L:
        moved = t_BLX[:, : L - steps]
        if doc_BL is not None:
            same = doc_BL[:, steps:] == doc_BL[:, : L - steps]
            moved = torch.where(same.view(*same.shape, *[1] * (t_BLX.dim() - 2)), moved, 0)
        out = torch.cat([out[:, :steps], moved], dim=1)
    return out


def ssd_reference(
    x_BLGP: Tensor,
    dt_BLS: Tensor,
    A_S: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_H: Tensor,
    doc_BL: Tensor | None,
    state_BSPN: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Chunked SSD in plain PyTorch, differentiable; see `ssd`. Within a chunk it is a masked matrix product,
    between chunks a recurrence over the chunks' states (arXiv 2405.21060, listing 1)."""
    acc = torch.promote_types(dt_BLS.dtype, torch.float32)
    b, L, G, P = x_BLGP.shape
    S, H, N = dt_BLS.shape[2], C_BLHN.shape[2], B_BLGN.shape[3]
    R, K = S // G, H // S
    Q = min(chunk, L)
    pad = -L % Q
    c = (L + pad) // Q

    def chunked(t: Tensor, *shape: int) -> Tensor:
        t = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, pad))
        return t.reshape(b, c, Q, *shape)

    x = chunked(x_BLGP.to(acc), G, P).transpose(2, 3)  # b c G Q P
    Bm = chunked(B_BLGN.to(acc), G, N).transpose(2, 3)  # b c G Q N
    Cm = chunked(C_BLHN.to(acc), G, R, K, N).permute(0, 1, 3, 4, 5, 2, 6)  # b c G R K Q N
    dt = chunked(dt_BLS.to(acc), G, R).permute(0, 1, 3, 4, 2)  # b c G R Q
    cum = (dt * A_S.to(acc).view(G, R, 1)).cumsum(-1)  # log-decay from the chunk's start, its own token included

    causal = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    live_in: Tensor | None = None  # tokens of a chunk that belong to the document the chunk before ended in
    if doc_BL is not None:
        doc = torch.cat([doc_BL, doc_BL[:, -1:].expand(b, pad)], 1).view(b, c, Q)
        allowed = (causal & (doc[..., :, None] == doc[..., None, :]))[:, :, None, None]
        live_out = (doc == doc[..., -1:])[:, :, None, None]
        before = torch.cat([doc[:, :1, 0], doc[:, :-1, -1]], 1)
        live_in = (doc == before[..., None])[:, :, None, None]
        carried = live_in[..., -1]
    else:
        allowed = causal

    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(~allowed, float("-inf")).exp() * dt[..., None, :]
    scores = (Cm.reshape(b, c, G, R * K * Q, N) @ Bm.transpose(-1, -2)).view(b, c, G, R, K, Q, Q)
    y = ((scores * decay[:, :, :, :, None]).reshape(b, c, G, R * K * Q, Q) @ x).view(b, c, G, R, K, Q, P)

    last = cum[..., -1:]
    weight = (last - cum).exp() * dt  # what a token still weighs at the chunk's end
    if doc_BL is not None:
        weight = torch.where(live_out, weight, 0)
    gained = (x[:, :, :, None] * weight[..., None]).transpose(-1, -2) @ Bm[:, :, :, None]  # b c G R P N
    keep = last.exp()
    if doc_BL is not None:
        keep = torch.where(carried[..., None], keep, 0)
    # S states, not G by R: what is returned last is no view, which FSDP would warn about
    keep, gained = keep.reshape(b, c, S, 1, 1), gained.reshape(b, c, S, P, N)
    state = torch.zeros(b, S, P, N, dtype=acc, device=x.device) if state_BSPN is None else state_BSPN.to(acc)
    entering = []
    for i in range(c):
        entering.append(state)
        state = keep[:, i] * state + gained[:, i]
    enter = torch.stack(entering, 1).view(b, c, G, R, P, N)
    reach = cum.exp() if live_in is None else torch.where(live_in, cum.exp(), 0)
    y = y + (Cm.reshape(b, c, G, R, K * Q, N) @ enter.transpose(-1, -2)).view_as(y) * reach[:, :, :, :, None, :, None]

    y = y.permute(0, 1, 5, 2, 3, 4, 6).reshape(b, c * Q, H, P)[:, :L]
    y = y + D_H.to(acc)[:, None] * x_BLGP.to(acc).repeat_interleave(H // G, 2)
    return y, state


@functools.cache
def _mamba_ssm_scan():
    """mamba-ssm's Triton scan. Its package's __init__ imports a CUDA extension that only Mamba-1 needs and that
    the pure-Python wheel lacks, so the package is entered beside its __init__."""
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(
                "the mamba_ssm backend needs mamba-ssm==2.3.1: "
                "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm==2.3.1"
            )
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["mamba_ssm"] = package
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined


def _ssd_mamba_ssm(x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, doc_BL, state_BSPN, chunk) -> tuple[Tensor, Tensor]:
    # mamba-ssm knows one state per head and C per group, so x, B, dt are repeated to the H query heads.
    H, G, S = C_BLHN.shape[2], x_BLGP.shape[2], dt_BLS.shape[2]
    y, state_BHPN = _mamba_ssm_scan()(
        x_BLGP.repeat_interleave(H // G, 2),
        dt_BLS.float().repeat_interleave(H // S, 2),
        A_S.float().repeat_interleave(H // S),
        B_BLGN.repeat_interleave(H // G, 2),
        C_BLHN.contiguous(),
        chunk_size=chunk,
        D=D_H.float(),
        initial_states=None if state_BSPN is None else state_BSPN.float().repeat_interleave(H // S, 1),
        seq_idx=None if doc_BL is None else doc_BL.int().contiguous(),
        return_final_states=True,
    )
    return y, state_BHPN[:, :: H // S].float()


def _ssd_triton(x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, doc_BL, state_BSPN, delay, chunk) -> tuple[Tensor, Tensor]:
    if x_BLGP.dtype == torch.float64:
        raise ValueError("the triton backend computes in fp32 and takes no fp64; the reference does")
    x_BLGP, B_BLGN, C_BLHN = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (x_BLGP, B_BLGN.to(x_BLGP.dtype), C_BLHN.to(x_BLGP.dtype))
    )
    state_BSPN = None if state_BSPN is None else state_BSPN.float()
    return ssd_op(x_BLGP, dt_BLS.float(), A_S.float(), B_BLGN, C_BLHN, D_H.float(), doc_BL, state_BSPN, delay, chunk)


def _shifted(x_BLGP, dt_BLS, B_BLGN, doc_BL, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    return delay(x_BLGP, steps, doc_BL), delay(dt_BLS, steps), delay(B_BLGN, steps)


def ssd(
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
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the grouped-query state-space recurrence over whole sequences.

    Args:
        x_BLGP: values (B, L, G, P), any float dtype.
        dt_BLS: step sizes after softplus (B, L, S), positive; 0 leaves the state as it is.
        A_S: decay rates (S,), negative, fp32.
        B_BLGN: keys (B, L, G, N).
        C_BLHN: queries (B, L, H, N).
        D_H: skip weights (H,).
        delay: by how many tokens x, B and dt come late: position t works with those of t - delay. Where that is
            before the sequence or in another document there is nothing to add, and the first `delay` outputs of
            a row are 0.
        doc_BL: integer document ids (B, L); the state starts from zero where the id changes. An initial state
            belongs to the first document of its row.
        state_BSPN: initial states (B, S, P, N), None for zeros.
        chunk: tokens of one chunk, by default 64 in the reference and 128 in Triton, where it is a power of two; the
            result depends on it by rounding only.
        backend: "reference" (plain PyTorch, the CPU path), "triton" (the GPU path) or "mamba_ssm" (mamba-ssm's
            kernels on repeated heads, to compare with); None picks by device.

    Returns:
        y (B, L, H, P) in x's dtype and the final states (B, S, P, N) in fp32 (fp64 for fp64 step sizes).

    Raises:
        ValueError: head counts that do not divide each other, an unknown backend, or what it does not take.

    Example:
        >>> y, state = ssd(torch.randn(1, 9, 1, 4), torch.ones(1, 9, 1), -torch.ones(1), torch.randn(1, 9, 1, 4),
        ...                torch.randn(1, 9, 2, 4), torch.zeros(2))
        >>> y.shape, state.shape
        (torch.Size([1, 9, 2, 4]), torch.Size([1, 1, 4, 4]))
    """
    G, S, H = x_BLGP.shape[2], dt_BLS.shape[2], C_BLHN.shape[2]
    if S % G or H % S:
        raise ValueError(f"{S} state heads must be a multiple of {G} key/value heads and divide {H} query heads")
    backend = backend or ("triton" if x_BLGP.is_cuda else "reference")
    if backend == "triton":
        return _ssd_triton(
            x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, doc_BL, state_BSPN, delay, 128 if chunk is None else chunk
        )
    if backend == "reference":
        run, chunk = ssd_reference, 64 if chunk is None else chunk
    elif backend == "mamba_ssm":
        run, chunk = _ssd_mamba_ssm, 128 if chunk is None else chunk
    else:
        raise ValueError(f"backend {backend!r} is none of 'reference', 'triton', 'mamba_ssm'")
    x, dt, B = _shifted(x_BLGP, dt_BLS, B_BLGN, doc_BL, delay)
    y, last = run(x, dt, A_S, B, C_BLHN, D_H, doc_BL, state_BSPN, chunk)
    if delay and state_BSPN is not None:  # an initial state, too, is read with a row
        y = torch.cat([torch.zeros_like(y[:, :delay]), y[:, delay:]], 1)
    return y.to(x_BLGP.dtype), last

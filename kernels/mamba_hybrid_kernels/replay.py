"""One step of a mixer layer for a ragged batch: window attention, replay, outputs, flush, ring write.

Shapes: M tokens of the step (all rows one after another), R rows (sequences), T tokens of a row, J = W + T ring
rows in order of position and then the new ones, H query heads, G key/value heads, S state heads, P head width,
N state width, W ring rows, w the window.

With p the position of a row's first token, c the checkpoint position of its slot and

    s_j = sum of A dt over the rows c..j,   e = t - w  (newest row that the state sees at position t)

    near_t = softmax over rows (t - w, t] of N^(-1/2) C_t . B_j, times x_j
    far_t  = exp(s_e) S C_t + sum_{c <= j <= e} exp(s_e - s_j) dt_j (B_j . C_t) x_j + D x_e
    flush to c': S <- exp(s_{c'-1}) S + sum_{c <= j < c'} exp(s_{c'-1} - s_j) dt_j x_j B_j^T

p comes from the scheduler, c from the slot: nothing here knows how many drafted tokens were accepted.
See `slot.py` for when a flush happens and why no read collides with a write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import StepRows
from .slot import SlotLayout, SlotTensors
from .ssd import ssd
from .window import window_attention


def replay(
    slots: SlotTensors,
    layout: SlotLayout,
    rows: StepRows,
    x_MGP: Tensor,
    dt_MS: Tensor,
    A_S: Tensor,
    B_MGN: Tensor,
    C_MHN: Tensor,
    D_H: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Advance a ragged batch of sequences by their new tokens and update their slots in place.

    Args:
        slots: the layer's slots.
        layout: their layout.
        rows: which sequences, where they stand and how many tokens each of them gets.
        x_MGP, B_MGN: values and (rotated) keys of the new tokens, layout.dtype.
        dt_MS: step sizes after softplus, fp32.
        A_S: decay rates, negative, fp32.
        C_MHN: (rotated) queries.
        D_H: skip weights.
        backend: "reference" (plain PyTorch, the CPU path) or "triton" (`verify` and `prefill`); None picks by device.

    Returns:
        near (M, H, P) or None without a window, and far (M, H, P): fp32, from the Triton kernels in C's dtype. What
        they hold for tokens that are padding means nothing.

    Raises:
        ValueError: more rows than tokens, an unknown backend, or what the Triton kernels do not take.
    """
    backend = backend or ("triton" if x_MGP.is_cuda else "reference")
    if backend not in ("reference", "triton"):
        raise ValueError(f"backend {backend!r} is none of 'reference', 'triton'")
    if sum(rows.lengths) > x_MGP.shape[0]:
        raise ValueError(f"rows of {rows.lengths} tokens are more than {x_MGP.shape[0]} tokens")
    H, P, device = C_MHN.shape[1], x_MGP.shape[2], x_MGP.device
    if backend == "triton":
        far_MHP = C_MHN.new_empty(len(x_MGP), H, P)
        near_MHP = torch.empty_like(far_MHP) if layout.window else None
        _launch(slots, layout, rows, (x_MGP, dt_MS, A_S, B_MGN, C_MHN, D_H), near_MHP, far_MHP)
        return near_MHP, far_MHP
    far_MHP = torch.zeros(len(x_MGP), H, P, device=device)
    near_MHP = torch.zeros_like(far_MHP) if layout.window else None
    short = []
    for row in rows.on_host():
        slot, start, first, T = row
        if layout.step >= T:
            short.append(row)
            continue
        span = slice(first, first + T)
        near, far_MHP[span] = _prefill(
            slots, layout, slot, start, x_MGP[span], dt_MS[span], A_S, B_MGN[span], C_MHN[span], D_H
        )
        if near_MHP is not None:
            near_MHP[span] = near
    if short:
        slot_R, start_R, first_R, T_R = torch.tensor(short, device=device).T
        i_T = torch.arange(int(T_R.max()), device=device)
        valid = i_T < T_R[:, None]
        index = first_R[:, None] + torch.where(valid, i_T, 0)
        near, far = _verify(
            slots, layout, slot_R, start_R, valid, x_MGP[index], dt_MS[index], A_S, B_MGN[index], C_MHN[index], D_H,
        )  # fmt: skip
        far_MHP[index[valid]] = far[valid]
        if near_MHP is not None:
            near_MHP[index[valid]] = near[valid]
    return near_MHP, far_MHP


def _launch(slots, layout, rows, inputs, near_MHP, far_MHP) -> None:
    """The Triton kernels: verify for the rows of at most layout.step tokens, prefill for the others."""
    from .prefill import prefill  # Triton is needed to run, not to import
    from .verify import verify

    outputs = {"near_MHP": near_MHP, "far_MHP": far_MHP}
    long = [] if rows.most <= layout.step else [r for r, T in enumerate(rows.lengths) if layout.step < T]
    # `verify` passes over rows that are longer than a step
    most = min(rows.most, layout.step) if len(long) < len(rows.lengths) else 0
    if most:
        verify(slots, layout, rows.slot_R, rows.start_R, rows.first_R1, *inputs, max_tokens=most, **outputs)
    if long:
        # mostly side by side: an engine puts them behind the others
        span = slice(long[0], long[-1] + 1)
        lengths, first_R1 = rows.lengths[span], rows.first_R1[span.start : span.stop + 1]
        slot_R = rows.slot_R[span]
        if len(long) < len(lengths):
            slot_R = torch.where(first_R1.diff() > layout.step, slot_R, -1)
        prefill(slots, layout, slot_R, rows.start_R[span], first_R1, lengths, *inputs, **outputs)


def _verify(slots, layout, slot_R, start_R, valid_RT, x_RTGP, dt_RTS, A_S, B_RTGN, C_RTHN, D_H):
    """Rows of at most layout.step tokens, all at once: the formulas of this file, term by term."""
    R, T, G, P = x_RTGP.shape
    S, H, N = dt_RTS.shape[2], C_RTHN.shape[2], B_RTGN.shape[3]
    W, w, device = layout.ring, layout.window, x_RTGP.device
    c_R = layout.checkpoint(slots.position[slot_R, 0, 0].long(), start_R)
    past_RW = start_R[:, None] + torch.arange(-W, 0, device=device)
    live_RW = past_RW >= c_R[:, None]
    at = (slot_R[:, None], past_RW % W)

    def rows(ring: Tensor, new: Tensor) -> Tensor:  # R J ... fp32, zeros where nothing lives
        both = torch.cat([ring[at], new.to(ring.dtype)], 1).float()
        mask = torch.cat([live_RW, valid_RT], 1)
        return torch.where(mask.view(R, W + T, *[1] * (both.dim() - 2)), both, 0)

    x, B, dt = rows(slots.x, x_RTGP), rows(slots.b, B_RTGN), rows(slots.dt, dt_RTS)
    live_RJ = torch.cat([live_RW, valid_RT], 1)
    j = torch.arange(W + T, device=device)
    e = torch.arange(W - w, W - w + T, device=device)  # index of row t - w
    s = (dt * A_S.float()).cumsum(1)  # R J S
    s_e = s[:, e]
    scores = C_RTHN.float().view(R, T, G, H // G, N).permute(0, 2, 3, 1, 4).flatten(2, 3) @ B.permute(0, 2, 3, 1)
    scores = scores.view(R, H, T, W + T)

    near = None
    if w:
        seen = (j > e[:, None]) & (j <= e[:, None] + w) & live_RJ[:, None]  # R T J
        logits = (scores * N**-0.5).masked_fill(~seen[:, None], float("-inf"))
        near = logits.softmax(-1).view(R, G, H // G * T, W + T) @ x.transpose(1, 2)
        near = near.view(R, H, T, P).transpose(1, 2)

    folded = (j <= e[:, None]) & live_RJ[:, None]  # R T J
    decay = (s_e[:, :, None] - s[:, None]).masked_fill(~folded[..., None], float("-inf")).exp() * dt[:, None]
    weights = scores * decay.permute(0, 3, 1, 2).repeat_interleave(H // S, 1)
    far = (weights.view(R, G, H // G * T, W + T) @ x.transpose(1, 2)).view(R, H, T, P).transpose(1, 2)
    state = torch.where((c_R > 0)[:, None, None, None], slots.state[slot_R].float(), 0)
    read = C_RTHN.float().view(R, T, S, H // S, N).transpose(1, 2).flatten(2, 3) @ state.transpose(-1, -2)
    read = read.view(R, S, T, H // S, P).transpose(1, 2) * s_e.exp()[..., None, None]
    far = far + read.reshape(R, T, H, P) + D_H.float()[:, None] * x[:, e].repeat_interleave(H // G, 2)

    end_R = start_R + valid_RT.sum(1)
    flush = (end_R + layout.step - c_R > W).nonzero()[:, 0]
    if len(flush):
        to = end_R[flush] - layout.rewind - w
        last = W + to - 1 - start_R[flush]  # index of row c' - 1
        s_to = s[flush, last]  # F S
        gone = (j <= last[:, None]) & live_RJ[flush]
        weight = (s_to[:, None] - s[flush]).masked_fill(~gone[..., None], float("-inf")).exp() * dt[flush]
        gained = torch.einsum(
            "fjgp,fjgr,fjgn->fgrpn", x[flush], weight.view(len(flush), W + T, G, S // G), B[flush]
        ).reshape(len(flush), S, P, N)
        new_state = s_to.exp()[..., None, None] * state[flush] + gained
        slots.state[slot_R[flush]] = new_state.to(slots.state.dtype)
        c_R = c_R.index_put((flush,), to)
    slots.position[slot_R] = c_R.int()[:, None, None]
    position = start_R[:, None] + torch.arange(T, device=device)
    r, i = valid_RT.nonzero(as_tuple=True)
    at = (slot_R[r], position[r, i] % W)
    slots.x[at] = x_RTGP[r, i].to(slots.x.dtype)
    slots.b[at] = B_RTGN[r, i].to(slots.b.dtype)
    slots.dt[at] = dt_RTS[r, i].float()
    return near, far


def _prefill(slots, layout, slot, start, x_TGP, dt_TS, A_S, B_TGN, C_THN, D_H):
    """One row of many tokens: block-wise window attention and chunked SSD over the rows [c, end)."""
    T, H, N = C_THN.shape
    W, w, device = layout.ring, layout.window, x_TGP.device
    end = start + T
    c = int(layout.checkpoint(slots.position[slot, 0, 0], torch.tensor(start)))
    lo = min(c, max(start - w + 1, 0)) if w else c
    past = torch.arange(lo, start, device=device) % W
    x = torch.cat([slots.x[slot, past], x_TGP.to(slots.x.dtype)])
    B = torch.cat([slots.b[slot, past], B_TGN.to(slots.b.dtype)])
    dt = torch.cat([slots.dt[slot, past], dt_TS.float()])
    C = torch.cat([C_THN.new_zeros(start - lo, H, N), C_THN])  # queries of the past are not asked again

    near = None
    if w:
        near = window_attention(C.to(x.dtype)[None], B[None], x[None], w)[0, start - lo :].float()

    # the state reads rows [c, end - w); row j is seen by the query at position j + w
    state = slots.state[slot][None].float() if c > 0 else None
    far = torch.zeros(T, H, x.shape[2], dtype=torch.float32, device=device)
    flush = end + layout.step - c > W
    to = end - layout.rewind - w if flush else c
    for a, b in ((c, to), (max(to, c), end - w)):
        if b <= a:
            continue
        span = slice(a - lo, b - lo)
        y, state = ssd(
            x[None, span], dt[None, span], A_S, B[None, span], C[None, a + w - lo : b + w - lo], D_H, state_BSPN=state
        )
        skip = max(0, start - w - a)
        far[a + w + skip - start : b + w - start] = y[0, skip:]
        if b == to:
            slots.state[slot] = state[0].to(slots.state.dtype)
    slots.position[slot] = to
    kept = torch.arange(max(start, end - W), end, device=device)
    slots.x[slot, kept % W] = x_TGP[kept - start].to(slots.x.dtype)
    slots.b[slot, kept % W] = B_TGN[kept - start].to(slots.b.dtype)
    slots.dt[slot, kept % W] = dt_TS[kept - start].float()
    return near, far

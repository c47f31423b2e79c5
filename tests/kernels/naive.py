"""Token-by-token definitions in fp64, the ground the references stand on."""

import torch
from torch import Tensor


def naive_ssd(x, dt, A, B, C, D, doc=None, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence of `mamba_hybrid_kernels.ssd`, one token after another."""
    b, L, G, P = x.shape
    S, H, N = dt.shape[2], C.shape[2], B.shape[3]
    state = torch.zeros(b, S, P, N, dtype=x.dtype) if state is None else state.clone()
    group_of_state, state_of_head, group_of_head = (torch.arange(n) // (n // m) for n, m in ((S, G), (H, S), (H, G)))
    ys = []
    for t in range(L):
        if doc is not None and t > 0:
            state = torch.where((doc[:, t] != doc[:, t - 1])[:, None, None, None], 0, state)
        decay = (dt[:, t] * A).exp()[..., None, None]
        outer = x[:, t, group_of_state][..., :, None] * B[:, t, group_of_state][..., None, :]
        state = state * decay + dt[:, t][..., None, None] * outer
        y = (state[:, state_of_head] @ C[:, t][..., None])[..., 0]
        ys.append(y + D[:, None] * x[:, t, group_of_head])
    return torch.stack(ys, 1), state


def naive_window(q, k, v, window, doc=None) -> Tensor:
    """Softmax attention over the last `window` tokens through the full score matrix."""
    H, G, L = q.shape[2], k.shape[2], q.shape[1]
    k, v = k.repeat_interleave(H // G, 2), v.repeat_interleave(H // G, 2)
    i = torch.arange(L)
    mask = ((i[:, None] >= i) & (i[:, None] - i < window)).expand(q.shape[0], L, L)
    if doc is not None:
        mask = mask & (doc[:, :, None] == doc[:, None])
    scores = torch.einsum("bthn,bjhn->bhtj", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhtj,bjhp->bthp", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)


def documents(batch: int, length: int) -> Tensor:
    """Random document ids, about one border in ten tokens."""
    return (torch.rand(batch, length) < 0.1).long().cumsum(1)

"""The matrices of attention and mixer, one number after another, and the error of one to the other.

Shapes: B rows, L tokens, H query heads, G key/value heads, N key width, P channels.
"""

import torch
from torch import Tensor

from mamba_hybrid.mixer import MixerCore


def mixer_matrices(core: MixerCore, q, k, v, dt, z, cos, sin, doc) -> Tensor:
    """M (B, H, L, L, P), from what `MixerCore.forward` takes."""
    c, w = core.config, core.config.window
    H, G, P = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    x, b, queries = core.inputs(q, k, v, cos, sin, doc)
    steps, rate = core.step_size(dt), core.A_S
    M = torch.zeros(*doc.shape[:1], H, *doc.shape[1:] * 2, P)
    for row in range(len(doc)):
        for h in range(H):
            g, s = h // (H // G), h // (H // c.state_heads)
            for t in range(doc.shape[1]):
                own = [j for j in range(t + 1) if doc[row, j] == doc[row, t]]
                near, far = [j for j in own if j > t - w], [j for j in own if j <= t - w]
                gate = torch.ones(P)
                if z is not None:
                    raw = z[row, t].view(H, P)[h]
                    gate = raw * raw.sigmoid() if c.gate == "silu" else 2 * raw.sigmoid()
                dot = {j: (queries[row, t, h] * b[row, j, g]).sum() for j in own}
                if near:
                    share = torch.stack([dot[j] for j in near]).div(c.state_size**0.5).softmax(0)
                    for j, a in zip(near, share, strict=True):
                        M[row, h, t, j] = gate * core.near_weight[h] * a
                weight = {
                    j: (rate[s] * steps[row, j + 1 : t - w + 1, s].sum()).exp() * steps[row, j, s] * dot[j]
                    + (core.D[h] if j == t - w else 0)
                    for j in far
                }
                y = sum((weight[j] * x[row, j, g] for j in far), torch.zeros(P))
                y = y * gate if c.norm == "after_gate" else y
                for j in far:
                    M[row, h, t, j] = (
                        gate * core.far_weight[h] * weight[j] / (y.square().mean() + c.rms_norm_eps).sqrt()
                    )
    return M


def attention_matrices(q_BLHN: Tensor, k_BLGN: Tensor, doc: Tensor) -> Tensor:
    """A (B, H, L, L), from rotated queries and keys."""
    H, G, N = *(t.shape[2] for t in (q_BLHN, k_BLGN)), q_BLHN.shape[3]
    seen = (doc[:, :, None] == doc[:, None]).tril()
    scores = torch.einsum("bthn,bjhn->bhtj", q_BLHN, k_BLGN.repeat_interleave(H // G, 2)) / N**0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)


def relative(M: Tensor, A: Tensor, counted: Tensor) -> Tensor:
    """Squared error of each row's counted query tokens, a mean over channels, relative to A's square (B,)."""
    error, whole = (M - A[..., None]).square().mean(-1).sum(-1), A.square().sum(-1)
    return torch.stack([e[:, c].sum() / a[:, c].sum() for e, a, c in zip(error, whole, counted, strict=True)])

"""Softmax attention over the last `window` tokens, grouped queries.

Shapes: B batch, L length, H query heads, G key/value heads, N key width, P value width, W the window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(
    q_BLHN: Tensor,
    k_BLGN: Tensor,
    v_BLGP: Tensor,
    window: int,
    *,
    doc_BL: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """near_t = softmax over j in (t - window, t] of scale q_t . k_j, times v_j.

    Queries are cut into blocks of `window`, so that a block needs the keys of itself and of the block before:
    L * 2 window scores instead of L^2.

    Args:
        q_BLHN, k_BLGN, v_BLGP: queries, keys (rotated already) and values, one dtype.
        window: how many tokens a query sees, itself included; at least 1.
        doc_BL: integer document ids (B, L); a query sees its own document only.
        scale: factor on the scores, 1/sqrt(N) when None.

    Returns:
        (B, L, H, P), the inputs' dtype.

    Raises:
        ValueError: window < 1.
    """
    if window < 1:
        raise ValueError(f"window {window} must be at least 1")
    b, L, H, N = q_BLHN.shape
    G, P = v_BLGP.shape[2:]
    # short sequences and tiny windows: blocks of at least 16 queries, never more than needed
    block = max(min(window, L), 16)
    pad = -L % block
    n = (L + pad) // block
    back = -(-(window - 1) // block)  # whole blocks a query can look back into

    def blocks(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)).view(b, n, block, *t.shape[2:])

    def with_past(t: Tensor) -> Tensor:
        parts = [F.pad(t, (0, 0) * (t.dim() - 2) + (i, 0))[:, :n] for i in range(back, -1, -1)]
        return torch.cat(parts, 2)

    q, k, v = blocks(q_BLHN), with_past(blocks(k_BLGN)), with_past(blocks(v_BLGP))
    i = torch.arange(block, device=q.device)[:, None]
    j = torch.arange((back + 1) * block, device=q.device) - back * block
    first = torch.arange(n, device=q.device)[:, None, None] * block
    mask = (j <= i) & (j > i - window) & (first + j >= 0)  # n block keys
    if doc_BL is not None:
        doc = F.pad(doc_BL, (0, pad), value=-1).view(b, n, block)
        mask = mask & (doc[..., :, None] == with_past(doc)[..., None, :])
    mask = mask.expand(b, *mask.shape[-3:]).reshape(b * n, 1, *mask.shape[-2:])

    def heads_first(t: Tensor) -> Tensor:
        return t.flatten(0, 1).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        heads_first(q), heads_first(k), heads_first(v), attn_mask=mask, scale=scale, enable_gqa=H != G
    )
    return out.transpose(1, 2).reshape(b, n * block, H, P)[:, :L]

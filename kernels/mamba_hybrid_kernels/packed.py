"""Attention over documents that lie one behind another, each its own, without a mask: PyTorch's flash attention.

Shapes: B rows, L tokens of a row, M = B L, D documents, H query heads, G key/value heads, N head width.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes fewer key than query heads as they come, later versions want to be told
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_runs(t: Tensor, width: int) -> bool:
    """Whether `packed_attention` takes activations like t with heads of that width."""
    halves = t.dtype in (torch.float16, torch.bfloat16)
    return t.is_cuda and torch.version.hip is None and halves and width % 8 == 0 and width <= 256


class PackedDocuments(NamedTuple):
    """Documents of packed rows, with what a GPU would else be waited for: how many there are.

    Args:
        ids_BL, first_D1: what `document_starts` takes and returns.
    """

    ids_BL: Tensor
    first_D1: Tensor


def document_starts(doc_BL: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """Where the documents of packed rows begin among all tokens, and their number at the end: int32 (D + 1).

    Waits for the device if there are ids: how many documents there are decides about a shape. See `PackedDocuments`.

    Args:
        doc_BL: integer document ids (B, L), a document's tokens side by side; None for one document a row.
        rows, length: B and L.
        device: for the result.
    """
    if doc_BL is None:
        return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
    begins_BL = F.pad(doc_BL[:, 1:] != doc_BL[:, :-1], (1, 0), value=True)
    first_D1 = F.pad(begins_BL.flatten().nonzero()[:, 0].int(), (0, 1), value=rows * length)
    torch._dynamo.maybe_mark_dynamic(first_D1, 0)  # or the second batch compiles everything again
    return first_D1


def packed_attention(
    q_BLHN: Tensor, k_BLGN: Tensor, v_BLGN: Tensor, first_D1: Tensor, *, window: int | None = None
) -> Tensor:
    """Causal softmax attention of each token to its own document, or to the last `window` tokens of it.

    Args:
        q_BLHN, k_BLGN, v_BLGN: queries, keys (rotated already) and values, one dtype that `packed_runs` takes.
        first_D1: see `document_starts`; no document is longer than a row.
        window: how many tokens a query sees, itself included; None for all.

    Returns:
        (B, L, H, N), the inputs' dtype.
    """
    L = q_BLHN.shape[1]
    q_MHN, k_MGN, v_MGN = (t.flatten(0, 1) for t in (q_BLHN, k_BLGN, v_BLGN))
    left = -1 if window is None else window - 1
    y_MHN = varlen_attn(q_MHN, k_MGN, v_MGN, first_D1, first_D1, L, L, window_size=(left, 0), **GROUPED)
    assert isinstance(y_MHN, Tensor)
    return y_MHN.view(q_BLHN.shape)

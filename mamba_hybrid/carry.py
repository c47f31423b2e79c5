"""What a chunk of long rows hands to the next, without gradient: truncated backpropagation through time.

Shapes: B rows, T tokens of a chunk, L tokens of all chunks up to this one, G key/value heads, P head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LayerCarry:
    """A layer's part, an object of its own so that torch.compile finds all layers of a kind alike.

    Args:
        past: of the chunk before: an attention layer's keys and values (B, G, L - T, P), or a mixer's `MixerPast`;
            None in the first chunk.
    """

    def __init__(self, past: Any = None) -> None:
        self.past = past
        self.next: Any = None

    def attend(self, k_BGTP: Tensor, v_BGTP: Tensor) -> tuple[Tensor, Tensor]:
        """An attention layer's keys and values of all tokens (B, G, L, P)."""
        if self.past is not None:
            k_BGTP, v_BGTP = (torch.cat(pair, 2) for pair in zip(self.past, (k_BGTP, v_BGTP), strict=True))
        self.next = k_BGTP.detach(), v_BGTP.detach()
        return k_BGTP, v_BGTP


class Carry:
    """Of one chunk, for `HybridMambaModel.forward`: it reads what came before and notes what the next chunk needs.

    It may do so twice, as recomputed activations do: nothing that came before is changed. It is no dataclass, since
    FSDP copies those and casts what is in them.

    Args:
        documents: ids of all tokens before (B, L - T), None in the first chunk.
        pasts: by layer, what the chunk before gave.

    Example:
        >>> carry = Carry()
        >>> for tokens, documents in chunks:
        ...     model(tokens, document_ids=documents, carry=carry).last_hidden_state.sum().backward()
        ...     carry = carry.following(documents)
    """

    def __init__(self, documents: Tensor | None = None, pasts: dict[int, Any] | None = None) -> None:
        self.documents, self.pasts = documents, pasts or {}
        self.layers: dict[int, LayerCarry] = {}

    def behind(self, doc_BT: Tensor) -> Tensor:
        """Document ids of all tokens up to the chunk's last (B, L)."""
        return doc_BT if self.documents is None else torch.cat([self.documents, doc_BT], 1)

    def of(self, layer: int) -> LayerCarry:
        """For the layer's forward pass over this chunk."""
        self.layers[layer] = LayerCarry(self.pasts.get(layer))
        return self.layers[layer]

    def following(self, doc_BT: Tensor) -> Carry:
        """The next chunk's, when a forward pass over this one (with these document ids) has ended."""
        return Carry(self.behind(doc_BT), {layer: c.next for layer, c in self.layers.items()})

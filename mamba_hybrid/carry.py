"""What a chunk of long rows hands to the next, without gradient: truncated backpropagation through time.

Shapes: B rows, T tokens of a chunk, L tokens of all chunks up to this one, G key/value heads, P head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mixer import MixerPast


class Carry:
    """Of one chunk, for `HybridMambaModel.forward`: it reads what came before and notes what the next chunk needs.

    It may do so twice, as recomputed activations do: nothing that came before is changed. It is no dataclass, since
    FSDP copies those and casts what is in them.

    Args:
        documents: ids of all tokens before (B, L - T), None in the first chunk.
        kv: of each attention layer, keys and values (B, G, L - T, P) before.
        mixers: of each mixer layer, what the chunk before gave.

    Example:
        >>> carry = Carry()
        >>> for tokens, documents in chunks:
        ...     model(tokens, document_ids=documents, carry=carry).last_hidden_state.sum().backward()
        ...     carry = carry.following(documents)
    """

    def __init__(
        self,
        documents: Tensor | None = None,
        kv: dict[int, tuple[Tensor, Tensor]] | None = None,
        mixers: dict[int, MixerPast] | None = None,
    ) -> None:
        self.documents, self.kv, self.mixers = documents, kv or {}, mixers or {}
        self.next_kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.next_mixers: dict[int, MixerPast] = {}

    def behind(self, doc_BT: Tensor) -> Tensor:
        """Document ids of all tokens up to the chunk's last (B, L)."""
        return doc_BT if self.documents is None else torch.cat([self.documents, doc_BT], 1)

    def attend(self, layer: int, k_BGTP: Tensor, v_BGTP: Tensor) -> tuple[Tensor, Tensor]:
        """An attention layer's keys and values of all tokens (B, G, L, P)."""
        if layer in self.kv:
            k_BGTP, v_BGTP = (torch.cat(pair, 2) for pair in zip(self.kv[layer], (k_BGTP, v_BGTP), strict=True))
        self.next_kv[layer] = k_BGTP.detach(), v_BGTP.detach()
        return k_BGTP, v_BGTP

    def following(self, doc_BT: Tensor) -> Carry:
        """The next chunk's, when a forward pass over this one (with these document ids) has ended."""
        return Carry(self.behind(doc_BT), self.next_kv, self.next_mixers)

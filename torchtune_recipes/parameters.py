"""How many parameters a model has, from its configuration alone."""

from __future__ import annotations

import torch

from mamba_hybrid.config import HybridMambaConfig
from mamba_hybrid.model import HybridMambaForCausalLM

from .activations import META
from .models import PARTS


class Parameters:
    """How many parameters a model has, by the units that FSDP gathers.

    Args:
        config: the model's, None for no model.
        frozen: parts (keys of `PARTS`) that are not trained.
    """

    def __init__(self, config: HybridMambaConfig | None, frozen: list[str]) -> None:
        self.frozen = frozen
        self.numel: dict[str, int] = {}
        if config is not None:
            self.config = config
            with META:
                model = HybridMambaForCausalLM(config)
            self.numel = {name: p.numel() for name, p in model.named_parameters()}

    def trains(self, name: str) -> bool:
        """Whether a parameter of this name is trained."""
        return not any(key in name for part in self.frozen for key in PARTS[part])

    def count(self, *keys: str, trained: bool = False) -> int:
        """Parameters whose name has all the keys; with `trained`, those that are."""
        return sum(
            n for name, n in self.numel.items() if all(k in name for k in keys) and (self.trains(name) or not trained)
        )

    def layer(self, index: int, *keys: str, trained: bool = False) -> int:
        """`count` in a layer."""
        return self.count(f".layers.{index}.", *keys, trained=trained)

    def root(self, *, trained: bool = False) -> int:
        """`count` of embeddings, last norm and head."""
        return self.count(trained=trained) - self.count(".layers.", trained=trained)

    def bytes(self, dtype: torch.dtype, *keys: str) -> int:
        """Of the parameters that `count` counts, the mixers' cores among them in fp32, the rest in the dtype."""
        cores = self.count("core.", *keys)
        return (self.count(*keys) - cores) * dtype.itemsize + cores * 4

    def units(self, *keys: str, trained: bool = False) -> int:
        """Of FSDP's units in layers, a layer or a mixer's core each, those in which `count` counts something."""
        names = [n for n in self.numel if all(k in n for k in (".layers.", *keys)) and (self.trains(n) or not trained)]
        return len({(name.split(".layers.")[1].split(".")[0], "core." in name) for name in names})

"""A drafter cut from a model: some of its layers between its own embeddings, final norm and head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from .checkpoint import save_model
from .config import HybridMambaConfig
from .errors import UserError
from .source import hybrid_config, open_source

PREFIX = "model.layers."


def evenly(count: int, total: int) -> list[int]:
    """`count` of `total` layers, evenly spread, the first and the last among them.

    Example:
        >>> evenly(2, 32)
        [0, 31]
        >>> evenly(1, 32)
        [0]
    """
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def cut(src: str | Path, out: str | Path, *, layers: int | list[int] = 2, overwrite: bool = False) -> list[int]:
    """Write a checkpoint with a few layers of another one, to be distilled into a drafter for it.

    Args:
        src: a hybrid, or a Llama, Mistral or Qwen2 (which becomes a hybrid with no mixer): directory or .gguf.
        out: directory to write, atomically.
        layers: how many, evenly spread, or which.
        overwrite: replace `out`.

    Returns:
        The layers that were kept.

    Raises:
        UserError: layers that the source does not have, or what `open_source` and `save_model` raise.

    Source: "The Mamba in the Llama" (arXiv 2408.15237), section 4, whose drafters have 2 and 4 layers.
    """
    source = open_source(src)
    config: HybridMambaConfig = copy.deepcopy(hybrid_config(source.config))
    total = config.num_hidden_layers
    if isinstance(layers, int):
        if not 1 <= layers < total:
            raise UserError(f"--layers {layers} must be at least 1 and fewer than the {total} of {src}")
        layers = evenly(layers, total)
    odd = [i for i in layers if not 0 <= i < total]
    if not layers or odd or sorted(set(layers)) != layers:
        raise UserError(f"--keep-layers {layers} must name layers of 0 to {total - 1}, each once, in order")
    assert config.layer_types is not None
    config.num_hidden_layers = len(layers)
    config.layer_types = [config.layer_types[i] for i in layers]
    config.architectures = ["HybridMambaForCausalLM"]
    place = {f"{PREFIX}{old}.": f"{PREFIX}{new}." for new, old in enumerate(layers)}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in source.names:
            start = ".".join(name.split(".")[:3]) + "."
            if not name.startswith(PREFIX):
                yield name, source.tensor(name)
            elif start in place:
                yield place[start] + name.removeprefix(start), source.tensor(name)

    save_model(out, config, tensors(), source.save_companions, overwrite=overwrite)
    return layers

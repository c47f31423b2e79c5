"""A GGUF file as a plain Hugging Face directory, which trainers and servers read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import ShardWriter, atomic_directory
from .errors import UserError
from .source import open_source


def import_gguf(src: str | Path, out: str | Path, *, dtype: str = "bfloat16", overwrite: bool = False) -> None:
    """Dequantise a GGUF file tensor by tensor into a checkpoint of its own architecture, written atomically.

    Args:
        src: the .gguf file.
        out: directory to write.
        dtype: to store in.
        overwrite: replace `out`.

    Raises:
        UserError: not a GGUF file of a Llama, Mistral or Qwen2, or `out` exists.
    """
    if Path(src).is_dir():
        raise UserError(f"{src} is a directory already; import takes a .gguf file")
    source = open_source(src)
    to = getattr(torch, dtype)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in tqdm(source.names, desc="importing", unit="tensor", disable=None):
            yield name, source.tensor(name).to(to)

    with atomic_directory(out, overwrite=overwrite) as work:
        writer = ShardWriter(work)
        for name, tensor in tensors():
            writer.add(name, tensor)
        writer.close()
        source.config.dtype = to
        if not source.config.architectures:
            source.config.architectures = [f"{source.config.model_type.capitalize()}ForCausalLM"]
        source.config.save_pretrained(work)
        source.save_companions(work)

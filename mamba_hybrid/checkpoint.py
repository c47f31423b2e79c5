"""The one checkpoint format: a Hugging Face directory, read whole or written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .config import HybridMambaConfig
from .errors import UserError, first_line
from .model import HybridMambaForCausalLM
from .output import to_disk
from .source import COMPANIONS, Source, hybrid_config, open_source

FP32 = ".core."  # parameters that keep fp32 whatever the rest is stored in
CARD = "README.md"


def load_config(path: str | Path) -> HybridMambaConfig:
    """Configuration of a hybrid, or of a plain Llama, Mistral or Qwen2 as a hybrid with no mixer.

    Raises:
        UserError: as `open_source`.
    """
    return hybrid_config(open_source(path).config)


def open_model(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[HybridMambaForCausalLM, Source]:
    """A model without its numbers, and the checkpoint that has them.

    Args:
        path: of a hybrid, or of a plain Llama, Mistral or Qwen2 (directory or GGUF), which is a hybrid with no mixer.
        dtype: of the parameters, but for the mixers' cores, which are fp32.

    Returns:
        The model, in eval mode, on the meta device; and a source that has every parameter of it in its shape.

    Raises:
        UserError: the checkpoint cannot be read, or lacks tensors, has strange ones or ones of another shape.
    """
    source = open_source(path)
    config = hybrid_config(source.config)
    with torch.device("meta"):
        model = HybridMambaForCausalLM(config)
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if FP32 in name else dtype)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is not among them
    found = source.shapes
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    missing, strange = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or strange:
        raise UserError(
            f"{path} does not fit its config.json: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(strange)} unknown {strange[:2]}"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(f"{path}: {name} is {found[name]}, its config.json says {shape}")
    return model.eval(), source


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> HybridMambaForCausalLM:
    """Load a model on the CPU; arguments and errors are those of `open_model`."""
    model, source = open_model(path, dtype)
    state = {name: source.tensor(name).to(p.dtype) for name, p in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    make_buffers(model)
    return model.eval()


def make_buffers(model: HybridMambaForCausalLM) -> None:
    """Rotary frequencies, on the CPU: they follow from the configuration and are no part of a checkpoint."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@contextlib.contextmanager
def atomic_directory(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends, and vanishes if it raises.

    Raises:
        UserError: `out` exists and overwrite is off, is no checkpoint that could be overwritten, or cannot be written.
    """
    check_out(out, overwrite=overwrite)
    place = Path(os.path.abspath(out))  # "." has no name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as e:
        raise UserError(f"{out} cannot be written: {e.strerror}") from e
    try:
        yield work
        for path in (*work.rglob("*"), work):
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary files are for their owner only
            to_disk(path)
        _replace(place, work)
    except BaseException as e:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(e, OSError | SafetensorError):
            raise UserError(f"{out} cannot be written: {first_line(e)}") from e
        raise


def check_out(out: str | Path, *, overwrite: bool) -> None:
    """Raises UserError for a directory that must not be written: what is there is kept, unless it is a checkpoint (or
    an empty directory) and `overwrite` is on."""
    out = Path(out)
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists; give another directory or --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UserError(f"{out} is no checkpoint (no config.json), so --overwrite keeps it; give another directory")


def _replace(place: Path, work: Path) -> None:
    """Put a whole directory where another may be."""
    if place.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
        try:
            place.rename(old / place.name)
            work.rename(place)
        finally:
            if not place.exists():
                (old / place.name).rename(place)
            shutil.rmtree(old)
    else:
        work.rename(place)
    to_disk(place.parent)


class ShardWriter:
    """Writes tensors into safetensors shards as they come, holding one shard in memory.

    Args:
        out: directory.
        shard_bytes: a shard is written when it would grow over this.
    """

    def __init__(self, out: Path, shard_bytes: int = 2 * 2**30) -> None:
        self.out, self.shard_bytes = out, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > self.shard_bytes:
            self._flush()
        self._held[name] = tensor.detach().cpu().contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._held, self.out / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held, self._bytes = {}, 0

    def close(self) -> None:
        """Write what is left, name the shards as transformers does, and their index if there are several."""
        if self._held:
            self._flush()
        if len(self._shards) == 1:
            (self.out / "shard-0").rename(self.out / "model.safetensors")
            return
        n = len(self._shards)
        where: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
            (self.out / f"shard-{i}").rename(self.out / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": where}
        (self.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def copy_companions(like: Path) -> Callable[[Path], None]:
    """Function that copies tokenizer, chat template, generation config and model card from `like`."""

    def copy(out: Path) -> None:
        for name in (*COMPANIONS, CARD):
            if (like / name).is_file():
                shutil.copyfile(like / name, out / name)

    return copy


def save_model(
    out: str | Path,
    config: HybridMambaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    like: str | Path | Callable[[Path], None],
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint atomically: all of it or nothing.

    Args:
        out: directory, which must not exist unless `overwrite`.
        config: the model's; its dtype is set to the embeddings'.
        tensors: (name, tensor) pairs under the model's state-dict names, stored as they are. A tied lm_head is
            left out; the mixers' cores are stored in fp32.
        like: directory whose tokenizer, chat template, generation config and model card are copied, or a
            function that writes such files.
        overwrite: replace `out`.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    companions = like if callable(like) else copy_companions(Path(like))
    with atomic_directory(out, overwrite=overwrite) as work:
        writer = ShardWriter(work)
        for name, tensor in tensors:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if name == "model.embed_tokens.weight":
                config.dtype = tensor.dtype
            writer.add(name, tensor.float() if FP32 in name else tensor)
        writer.close()
        config.save_pretrained(work)
        companions(work)

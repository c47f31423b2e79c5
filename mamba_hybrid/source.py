"""Where pretrained weights come from: a Hugging Face directory or a GGUF file, one tensor at a time.

Both look the same to a reader: tensors under transformers' Llama names, a transformers configuration, and the
files that travel along (tokenizer, chat template, generation config).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from .config import HybridMambaConfig
from .errors import UserError, first_line

FAMILIES = ("llama", "mistral", "qwen2")
COMPANIONS = (  # what travels with the weights
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

GGUF_NAMES = (  # llama.cpp's tensor names, as regular expressions, and transformers'
    (r"token_embd\.(\w+)", r"model.embed_tokens.\1"),
    (r"output_norm\.(\w+)", r"model.norm.\1"),
    (r"output\.(\w+)", r"lm_head.\1"),
    (r"blk\.(\d+)\.attn_norm\.(\w+)", r"model.layers.\1.input_layernorm.\2"),
    (r"blk\.(\d+)\.ffn_norm\.(\w+)", r"model.layers.\1.post_attention_layernorm.\2"),
    (r"blk\.(\d+)\.attn_(q|k|v)\.(\w+)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_output\.(\w+)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.(\w+)", r"model.layers.\1.mlp.\2_proj.\3"),
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        shape: its shape, known without reading it.
        load: reads all of it.
        load_rows: reads a slice of its first dimension.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    load_rows: Callable[[slice], Tensor]


class Source:
    """A pretrained checkpoint, read tensor by tensor.

    Use `open_source`.

    Args:
        path: the directory or file.
        config: as transformers reads it.
        stored: tensors by name.
        save_companions: writes tokenizer and generation config into a directory.
    """

    def __init__(
        self,
        path: Path,
        config: PretrainedConfig,
        stored: dict[str, StoredTensor],
        save_companions: Callable[[Path], None],
    ) -> None:
        self.path, self.config, self.save_companions = path, config, save_companions
        self._stored = stored

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Load one tensor, as stored (GGUF: dequantised to fp32).

        Args:
            name: of the tensor.
            rows: of its first dimension, all when None. Of a safetensors file no others are read.

        Raises:
            UserError: no such tensor, or it cannot be read.
        """
        if name not in self._stored:
            raise UserError(f"{self.path} has no tensor {name!r}; is it a whole Llama-family checkpoint?")
        stored = self._stored[name]
        try:
            return stored.load() if rows is None else stored.load_rows(rows)
        except NotImplementedError as e:  # a quantisation that gguf cannot read
            raise UserError(f"{self.path}: tensor {name!r} cannot be read: {e}; take another file of the model") from e
        except (SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{self.path}: tensor {name!r} cannot be read ({e}); download the checkpoint again") from e


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face directory or a GGUF file of a Llama, Mistral or Qwen2 model, or a hybrid's directory.

    Raises:
        UserError: nothing there, not a checkpoint, another architecture, a broken file.

    Example:
        >>> open_source("SmolLM2-135M-Instruct.Q4_1.gguf").tensor("model.norm.weight").shape
        torch.Size([576])
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a Hugging Face directory or a .gguf file (hf download NAME --local-dir DIR "
            "fetches one from the hub)"
        )
    source = _open_directory(path) if path.is_dir() else _open_gguf(path)
    kind = source.config.model_type
    if kind not in (*FAMILIES, HybridMambaConfig.model_type):
        raise UserError(f"{path} is a {kind!r} model; this converts {', '.join(FAMILIES)}")
    return source


def _open_directory(path: Path) -> Source:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give a Hugging Face directory or a .gguf file")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as e:  # transformers raises many kinds here
        raise UserError(f"{path}/config.json cannot be read: {first_line(e)}") from e

    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index} cannot be read ({e}); download the checkpoint again") from e
    elif (path / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise UserError(f"{path} has no model.safetensors; save it with save_pretrained(..., safe_serialization=True)")

    stored: dict[str, StoredTensor] = {}
    for file in files:
        try:
            handle = safe_open(path / file, framework="pt")
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{path / file} is missing, truncated or damaged ({first_line(e)}); download it again"
            ) from e
        for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
            part = handle.get_slice(name)
            load = functools.partial(handle.get_tensor, name)
            stored[name] = StoredTensor(tuple(part.get_shape()), load, part.__getitem__)

    def companions(out: Path) -> None:
        for name in COMPANIONS:
            if (path / name).is_file():
                (out / name).write_bytes((path / name).read_bytes())

    return Source(path, config, stored, companions)


def _open_gguf(path: Path) -> Source:
    with path.open("rb") as f:
        magic = f.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is no GGUF file (it starts with {magic!r}) and no directory; give one of the two")
    try:
        reader = gguf.GGUFReader(str(path))
        architecture = reader.fields["general.architecture"].contents()
    except Exception as e:  # the reader has no error of its own for a cut-off file
        raise UserError(f"{path} is a truncated or damaged GGUF file ({first_line(e)}); download it again") from e
    if architecture not in FAMILIES:
        raise UserError(f"{path} is a {architecture!r} model; this converts {', '.join(FAMILIES)}")
    size, end = path.stat().st_size, max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
    if end > size:
        raise UserError(f"{path} is truncated: {size} bytes of at least {end}; download it again")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as e:
        raise UserError(f"{path}: its configuration cannot be read: {first_line(e)}") from e
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32

    stored: dict[str, StoredTensor] = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        if name is not None:
            load = functools.partial(_from_gguf, tensor, name, architecture, config)
            shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts from the innermost
            stored[name] = StoredTensor(shape, load, functools.partial(_rows, load))
    config.tie_word_embeddings = "lm_head.weight" not in stored

    def companions(out: Path) -> None:
        tokenizer = load_tokenizer(path)
        tokenizer.save_pretrained(out)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        ).save_pretrained(out)

    return Source(path, config, stored, companions)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint, directory or GGUF file.

    Raises:
        UserError: it has none.
    """
    where, file = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    try:
        return AutoTokenizer.from_pretrained(where, **file)
    except Exception as e:  # transformers raises many kinds here
        raise UserError(
            f"{path} has no tokenizer that transformers can load ({first_line(e)}); copy the model's there"
        ) from e


def _rows(load: Callable[[], Tensor], rows: slice) -> Tensor:
    return load()[rows]


def _hf_name(name: str) -> str | None:
    for pattern, repl in GGUF_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, repl, name)
    return None  # rope_freqs.weight and the like: the configuration says it


def _from_gguf(tensor: gguf.ReaderTensor, name: str, architecture: str, config: PretrainedConfig) -> Tensor:
    data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    out = torch.from_numpy(np.array(data, dtype=np.float32, copy=True))
    if architecture != "qwen2" and re.search(r"\.(q|k)_proj\.", name):
        # llama.cpp interleaves the halves of each head for its rotary embedding; put them side by side again
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        rows = out.shape[0] // heads
        out = out.view(heads, rows // 2, 2, *out.shape[1:]).transpose(1, 2).reshape(out.shape)
    return out


def hybrid_config(config: PretrainedConfig, **mixer: object) -> HybridMambaConfig:
    """A hybrid's configuration with the shape of a Llama, Mistral or Qwen2 one; `mixer` sets the rest.

    Raises:
        UserError: a part of the architecture that a hybrid does not have, or mixer values that contradict it.
    """
    if isinstance(config, HybridMambaConfig):
        data = config.to_dict()
        for key in ("model_type", "transformers_version", "_name_or_path"):
            data.pop(key, None)
    else:
        sliding = getattr(config, "sliding_window", None)
        if getattr(config, "model_type", "") == "qwen2" and not getattr(config, "use_sliding_window", False):
            sliding = None
        limit = mixer.get("max_position_embeddings", config.max_position_embeddings)
        if sliding is not None and sliding < limit:
            raise UserError(
                f"the model attends {sliding} tokens (sliding_window) of {limit}; "
                f"convert it for contexts of at most that: --max-positions {sliding}"
            )
        if getattr(config, "mlp_bias", False):
            raise UserError("the model has biases in its MLPs (mlp_bias), which a hybrid does not")
        qwen = config.model_type == "qwen2"
        bias = bool(getattr(config, "attention_bias", False))
        same = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
            "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "dtype",
        )  # fmt: skip
        data = {key: getattr(config, key, None) for key in same}
        data["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        data["qkv_bias"], data["o_bias"] = qwen or bias, bias and not qwen
    data.update({k: v for k, v in mixer.items() if v is not None})
    try:
        return HybridMambaConfig(
            architectures=["HybridMambaForCausalLM"], **{k: v for k, v in data.items() if k != "architectures"}
        )
    except Exception as e:  # strict dataclasses wrap ours
        raise UserError(_cause(e)) from e


def _cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    return first_line(e)

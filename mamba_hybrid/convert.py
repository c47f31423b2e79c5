"""Conversion: a pretrained Transformer in, a hybrid out, layer by layer; or a hybrid, which gets further mixers.

One layer's weights are in memory at a time, beside the hidden states of the calibration tokens: those of the
source and those of the hybrid as converted so far walk through the layers side by side.

Shapes: B sequences, L length, D model width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from .calibrate import Fit, calibrate_mixer
from .checkpoint import FP32, check_out, save_model
from .config import ATTENTION, MIXER, HybridMambaConfig
from .device import check_device
from .errors import UserError
from .mixer import HybridMixer, ZeroLinear
from .model import Batch, HybridLayer
from .source import Source, hybrid_config, load_tokenizer, open_source
from .text import read_texts, token_stream

INPUTS = ("student", "teacher")
INITS = ("calibrated", "original")
# the block of the paper's released code, whose new parts start at random
ORIGINAL = dict(window=0, ssm_rope=False, short_conv=4, gate="silu", norm="after_gate")
# what all mixers of a model have in common, and the flag that sets it, if there is one
MIXER_FLAGS = {
    "window": "--window", "state_heads": "--state-heads", "short_conv": "--short-conv", "gate": "--gate",
    "ssm_rope": "--no-ssm-rope", "state_size": None, "norm": None,
}  # fmt: skip


@dataclass
class Conversion:
    """What to convert and how.

    Args:
        source: Hugging Face directory or GGUF file; of a hybrid, the mixers and all else are kept as they are.
        out: directory to write.
        attention_layers: layers that stay attention; None keeps a share, evenly spread over those that are.
        keep: that share, of all layers.
        mixer: HybridMambaConfig's mixer fields; None leaves a default.
        mixers_from: a hybrid whose mixers the converted layers get, instead of copied and calibrated ones.
        init: "calibrated", or "original" for the paper's random start, for comparison.
        calibrate: text to calibrate on; None only copies the projections.
        column: of a .jsonl text.
        tokens, length: of the calibration text, and of one of its sequences.
        inputs: calibrate each layer on the "student"'s own inputs or on the "teacher"'s.
        ridge: pull of the output projection to the attention's.
        dtype: "float32", "bfloat16", "float16" or None for the source's (GGUF: bfloat16).
        overwrite: replace `out`.
        seed: of init "original".
        device: to calibrate on.
    """

    source: str
    out: str
    attention_layers: list[int] | None = None
    keep: float = 0.5
    mixer: dict[str, object] = field(default_factory=dict)
    mixers_from: str | None = None
    init: str = "calibrated"
    calibrate: str | None = None
    column: str = "text"
    tokens: int = 16_384
    length: int = 1024
    inputs: str = "teacher"
    ridge: float = 0.1
    dtype: str | None = None
    overwrite: bool = False
    seed: int = 0
    device: str = "cpu"


@dataclass
class Report:
    """What a conversion did: the fit of each converted layer, None where there was none, whose mixers they got if not
    their own, and the KL to the source on held-out tokens, None without a calibration text."""

    config: HybridMambaConfig
    fits: dict[int, Fit | None]
    mixers_from: str | None
    kl: float | None
    kl_tokens: int


def attention_layers(layers: int, keep: float) -> list[int]:
    """Which layers stay attention when a share is kept, evenly spread: the last of each period, as in the paper.

    Example:
        >>> attention_layers(8, 0.25)
        [3, 7]
    """
    if not 0 <= keep <= 1:
        raise UserError(f"--keep {keep} must be between 0 and 1")
    kept = round(keep * layers)
    return [i for i in range(layers) if (i + 1) * kept // layers > i * kept // layers]


def convert(job: Conversion) -> Report:
    """Run a conversion; see `Conversion`.

    Returns:
        What was done, for `format_report`.

    Raises:
        UserError: bad input; nothing is written then.
    """
    if job.inputs not in INPUTS or job.init not in INITS:
        raise UserError(f"inputs {job.inputs!r} must be one of {INPUTS} and init {job.init!r} one of {INITS}")
    check_out(job.out, overwrite=job.overwrite)
    if not 0 <= job.ridge < math.inf:
        raise UserError(f"--ridge {job.ridge} must be a number of at least 0")
    if (limit := job.mixer.get("max_position_embeddings")) is not None and int(str(limit)) < 1:
        raise UserError(f"--max-positions {limit} must be at least 1")
    source = open_source(job.source)
    kept = _kept_layers(source, job)
    given = None if job.mixers_from is None else open_source(job.mixers_from)
    config = _hybrid_config(source, given, kept, job)
    walk = Walk(source, config, job, given)
    n = config.num_hidden_layers
    dtype = getattr(torch, job.dtype) if job.dtype else _stored_dtype(source)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in walk.tensors():
            yield name, tensor if FP32 in name else tensor.to(dtype)

    def companions(out: Path) -> None:
        source.save_companions(out)
        (out / "README.md").write_text(model_card(job, config, walk, n))

    save_model(job.out, config, tensors(), companions, overwrite=job.overwrite)
    return Report(config, {i: walk.fits.get(i) for i in walk.converted}, job.mixers_from, walk.kl, walk.kl_tokens)


def _kept_layers(source: Source, job: Conversion) -> list[int]:
    """The layers that stay attention, ascending."""
    n = source.config.num_hidden_layers
    mixers = source.config.mixer_layers if isinstance(source.config, HybridMambaConfig) else []
    have = [i for i in range(n) if i not in mixers]
    if job.attention_layers is None:
        count = len(attention_layers(n, job.keep))
        if mixers and count >= len(have):
            raise UserError(
                f"--keep {job.keep} leaves nothing to convert: {job.source} has {len(have)} attention layers of {n}"
            )
        return [have[i] for i in attention_layers(len(have), count / max(len(have), 1))]
    kept = sorted(set(job.attention_layers))
    if odd := [i for i in kept if not 0 <= i < n]:
        raise UserError(f"--attention-layers {odd} are not among the model's layers 0..{n - 1}")
    if odd := [i for i in kept if i in mixers]:
        raise UserError(f"--attention-layers {odd} are mixers in {job.source} already")
    if mixers and kept == have:
        raise UserError(f"--attention-layers {kept} leave nothing to convert in {job.source}")
    return kept


def _hybrid_config(source: Source, given: Source | None, kept: list[int], job: Conversion) -> HybridMambaConfig:
    """The new hybrid's. All mixers of a model are of one kind: the source's or those given, if there are any."""
    n = source.config.num_hidden_layers
    fields = dict(job.mixer)
    if job.init == "original":
        if named := [flag for name, flag in MIXER_FLAGS.items() if name in job.mixer and flag is not None]:
            raise UserError(f"--init original is one kind of mixer, the paper's: leave out {', '.join(named)}")
        fields = ORIGINAL | fields
    for origin, where in ((given, job.mixers_from), (source, job.source)):
        if origin is None or not isinstance(origin.config, HybridMambaConfig) or not origin.config.mixer_layers:
            continue
        for name, flag in MIXER_FLAGS.items():
            value = getattr(origin.config, name)
            if fields.setdefault(name, value) != value:
                if job.init == "original":
                    flag = "--init original"
                elif name not in job.mixer:
                    flag = "--mixers-from"
                raise UserError(
                    f"{name} of the mixers of {where} is {value}, not {fields[name]}; all mixers of a model are of "
                    f"one kind: leave out {flag}, or convert from the Transformer"
                )
    config = hybrid_config(source.config, layer_types=[ATTENTION if i in kept else MIXER for i in range(n)], **fields)
    if given is None:
        return config
    has = given.config.mixer_layers if isinstance(given.config, HybridMambaConfig) else []
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        theirs = getattr(given.config, name, None)
        if has and theirs != getattr(config, name):
            raise UserError(
                f"--mixers-from {job.mixers_from} has {name} {theirs}, {job.source} {getattr(config, name)}"
            )
    if lacking := [i for i in Walk.to_convert(source, config) if i not in has]:
        raise UserError(f"--mixers-from {job.mixers_from} has no mixer in layers {lacking}")
    return config


def read_layers(file: str | Path, source: str | Path) -> list[int]:
    """The attention layers that `select_layers` chose.

    Args:
        file: its layers.json.
        source: the checkpoint to convert, which must have as many layers.

    Raises:
        UserError: no such file, or it is of another model.
    """
    try:
        found = json.loads(Path(file).read_text())
        layers, chosen = int(found["layers"]), [int(i) for i in found["attention_layers"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--layers-from {file} is no layers.json of select_layers: {e!r}") from e
    if layers != (n := open_source(source).config.num_hidden_layers):
        raise UserError(f"--layers-from {file} is of a model of {layers} layers, {source} has {n}")
    return chosen


def _stored_dtype(source: Source) -> torch.dtype:
    return torch.bfloat16 if source.path.is_file() else source.tensor("model.norm.weight").dtype


@dataclass
class Streams:
    """Hidden states of the calibration tokens (B, L, D) in teacher and student, and what their layers share."""

    teacher: Tensor
    student: Tensor
    batch: Batch


class Walk:
    """Goes through a source's layers once, converting; `tensors` yields the hybrid's, and fills `fits` and `kl`.

    Args:
        source: the Transformer or hybrid.
        config: of the new hybrid.
        job: the conversion.
        given: a hybrid whose mixers the converted layers get.

    Raises:
        UserError: a calibration text that cannot be read or is too short.
    """

    def __init__(self, source: Source, config: HybridMambaConfig, job: Conversion, given: Source | None = None) -> None:
        self.source, self.config, self.job, self.given = source, config, job, given
        self.converted = self.to_convert(source, config)
        self.fits: dict[int, Fit] = {}
        self.kl: float | None = None
        self.kl_tokens = 0
        self.old = hybrid_config(source.config, max_position_embeddings=config.max_position_embeddings)
        self.ids_BL = self._calibration_tokens() if job.calibrate else None
        self.held = 0 if self.ids_BL is None else max(1, len(self.ids_BL) // 5)  # sequences the KL is taken on

    @staticmethod
    def to_convert(source: Source, config: HybridMambaConfig) -> list[int]:
        """Layers that are attention in the source and mixers in the new hybrid."""
        old = source.config.mixer_layers if isinstance(source.config, HybridMambaConfig) else []
        return [i for i in config.mixer_layers if i not in old]

    def _calibration_tokens(self) -> Tensor:
        job = self.job
        assert job.calibrate is not None
        texts = read_texts(job.calibrate, job.column)
        check_device(job.device)
        if job.length < 1:
            raise UserError(f"--calibrate-length {job.length} must be at least 1")
        if job.tokens < 2 * job.length:
            raise UserError(
                f"--calibrate-tokens {job.tokens} must be at least 2 sequences of --calibrate-length {job.length}"
            )
        if job.length > self.config.max_position_embeddings:
            raise UserError(
                f"--calibrate-length {job.length} is over the model's context {self.config.max_position_embeddings}"
            )
        tokens, _ = token_stream(texts, load_tokenizer(self.source.path), job.tokens)
        rows = len(tokens) // job.length
        if rows < 2:
            raise UserError(
                f"{job.calibrate} has {len(tokens)} tokens, calibration needs 2 sequences of "
                f"--calibrate-length {job.length}"
            )
        return tokens[: rows * job.length].view(rows, job.length)

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the hybrid, in the order of the layers."""
        source, ids = self.source, self.ids_BL
        embed = source.tensor("model.embed_tokens.weight")
        yield "model.embed_tokens.weight", embed
        streams = None
        if ids is not None:
            start = nn.functional.embedding(ids, embed.float()).to(self.job.device)
            positions = torch.arange(ids.shape[1], device=start.device)[None]
            cos, sin = LlamaRotaryEmbedding(self.config).to(start.device)(start, positions)
            streams = Streams(start, start, Batch(cos, sin))
        layers = range(self.config.num_hidden_layers)
        for i in tqdm(layers, desc="converting", unit="layer", disable=None):
            prefix = f"model.layers.{i}."
            old = self._old_layer(i)
            new = self._converted(old, i) if i in self.converted else old
            if streams is not None:
                self._advance(i, old, new, streams)
            for name, tensor in new.state_dict().items():
                yield prefix + name, tensor
        norm = source.tensor("model.norm.weight")
        yield "model.norm.weight", norm
        head = embed if self.config.tie_word_embeddings else source.tensor("lm_head.weight")
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", head
        if streams is not None:
            self.kl, self.kl_tokens = self._step0_kl(streams, norm, head)

    def _old_layer(self, i: int) -> HybridLayer:
        with torch.device("meta"):
            layer = HybridLayer(self.old, i)
        self._fill(layer, self.source, f"model.layers.{i}.")
        return layer

    @staticmethod
    def _fill(module: nn.Module, source: Source, prefix: str) -> None:
        """Give a module the source's tensors, in fp32."""
        state = {name: source.tensor(prefix + name).float() for name in module.state_dict()}
        for name, like in module.state_dict().items():
            if state[name].shape != like.shape:
                raise UserError(
                    f"{source.path}: {prefix}{name} is {tuple(state[name].shape)}, "
                    f"its config.json says {tuple(like.shape)}"
                )
        module.load_state_dict(state, assign=True)

    def _converted(self, old: HybridLayer, i: int) -> HybridLayer:
        layer = HybridLayer(self.config, i).to(torch.float32)
        layer.mlp, layer.input_layernorm = old.mlp, old.input_layernorm
        layer.post_attention_layernorm = old.post_attention_layernorm
        mixer = layer.mixer
        if self.given is not None:
            self._fill(mixer, self.given, f"model.layers.{i}.mixer.")
            return layer
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(mixer, name).load_state_dict(getattr(old.self_attn, name).state_dict())
        if self.job.init == "original":
            original_init(mixer, torch.Generator().manual_seed(self.job.seed + i))
        else:
            for proj in (mixer.dt_proj, mixer.z_proj):
                if isinstance(proj, ZeroLinear):
                    nn.init.zeros_(proj.weight)
        return layer

    def _advance(self, i: int, old: HybridLayer, new: HybridLayer, streams: Streams) -> None:
        """Take both streams through layer i, which is calibrated on the way."""
        old.to(self.job.device)
        new.to(self.job.device)
        teacher, student, batch = streams.teacher, streams.student, streams.batch
        if i not in self.converted or self.given is not None or self.job.init != "calibrated":
            streams.teacher, streams.student = (
                torch.cat([layer(h[None], batch) for h in stream]) for layer, stream in ((old, teacher), (new, student))
            )
            return
        heads = torch.cat([old.self_attn.heads(old.input_layernorm(h[None]), batch) for h in teacher])
        mixed = torch.stack([old.self_attn.o_proj(y) for y in heads])
        on_student = self.job.inputs == "student"
        inputs, target = (student, teacher + mixed - student) if on_student else (teacher, mixed)
        fit = slice(0, len(teacher) - self.held)
        self.fits[i] = calibrate_mixer(
            new.mixer,
            new.input_layernorm(inputs[fit]),
            heads[fit].unflatten(-1, (self.config.num_attention_heads, self.config.head_dim)),
            target[fit],
            batch.cos,
            batch.sin,
            ridge=self.job.ridge,
        )
        streams.teacher = torch.stack([h + old.mlp(old.post_attention_layernorm(h)) for h in teacher + mixed])
        streams.student = torch.cat([new(h[None], batch) for h in student])

    def _step0_kl(self, streams: Streams, norm: Tensor, head: Tensor) -> tuple[float, int]:
        """Mean KL(teacher || student) per token on the held-out sequences, and their tokens."""
        final = LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        final.weight.copy_(norm)
        final.to(self.job.device)
        head, total, count = head.float().to(self.job.device), 0.0, 0
        held = (h[-self.held :].flatten(0, 1).split(256) for h in (streams.teacher, streams.student))
        for t, s in zip(*held, strict=True):
            p, q = ((final(h) @ head.T).log_softmax(-1) for h in (t, s))
            total += float((p.exp() * (p - q)).sum())
            count += len(t)
        return total / count, count


@torch.no_grad()
def original_init(mixer: HybridMixer, rng: torch.Generator) -> None:
    """The start of the paper's released code: everything that attention does not have is random.

    Source: mamba_ssm's Mamba-2 defaults (arXiv 2405.21060), which the release keeps: convolution U(+-1/2), A in
    U(1, 16), dt log-uniform in [1e-3, 1e-1], D and the norm 1, gate and step projections as torch's Linear.
    """
    core = mixer.core
    core.A_log.uniform_(1, 16, generator=rng).log_()
    dt = torch.empty_like(core.dt_bias).uniform_(math.log(1e-3), math.log(1e-1), generator=rng).exp_()
    core.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    core.D.fill_(1)
    core.far_weight.fill_(1)
    core.conv_weight.uniform_(-0.5, 0.5, generator=rng)
    core.conv_bias.uniform_(-0.5, 0.5, generator=rng)
    core.conv_silu.fill_(1)
    assert mixer.z_proj is not None
    for proj in (mixer.z_proj, mixer.dt_proj):
        bound = proj.in_features**-0.5
        proj.weight.uniform_(-bound, bound, generator=rng)


def format_report(report: Report) -> str:
    """The table that `mamba-hybrid convert` prints."""
    if report.mixers_from is not None:
        lines = [f"layers {', '.join(map(str, report.fits))}: the mixers of {report.mixers_from}"]
    else:
        lines = ["layer  error before  error after  half-lives (tokens)"]
        for i, fit in report.fits.items():
            if fit is None:
                lines.append(f"{i:5}  not calibrated")
            else:
                lines.append(f"{i:5}  {fit.before:12.4f}  {fit.after:11.4f}  {' '.join(map(str, fit.half_lives))}")
    if report.kl is None and report.mixers_from is not None:
        lines.append("KL not measured: no text was given (--calibrate TEXT)")
    elif report.kl is None:
        lines.append("not calibrated: no text was given (--calibrate TEXT); expect a KL of several nats per token")
    else:
        lines.append(f"step-0 KL {report.kl:.4f} nats per token on {report.kl_tokens} held-out tokens")
    return "\n".join(lines)


def model_card(job: Conversion, config: HybridMambaConfig, walk: Walk, layers: int) -> str:
    """README.md of a converted checkpoint: what it is and the recipe that made it."""
    recipe = {k: v for k, v in asdict(job).items() if k not in ("out", "overwrite")}
    recipe["source"] = Path(job.source).name
    for key in ("calibrate", "mixers_from"):
        recipe[key] = recipe[key] and Path(recipe[key]).name
    kl = "not measured" if walk.kl is None else f"{walk.kl:.4f} nats per token on {walk.kl_tokens} held-out tokens"
    mixers = config.mixer_layers
    state = "It has not been distilled; KL(teacher || student)"
    if walk.converted != mixers:
        state = f"Layers {', '.join(map(str, walk.converted))} were converted last; KL(before || after)"
    return f"""---
library_name: mamba_hybrid
tags: [mamba_hybrid, hybrid, ssm]
---
# Hybrid of {Path(job.source).name}

{len(mixers)} of {layers} attention layers are grouped-query SSD mixers that started from the attention's weights
(layers {", ".join(map(str, mixers)) or "none"}). Window {config.window}, {config.state_heads} states a layer.
{state}: {kl}.

The licence is that of the model it was converted from.

```json
{json.dumps(recipe, indent=2)}
```

Load it with `import mamba_hybrid` and `AutoModelForCausalLM.from_pretrained(...)`, distil it with
`tune run distill_hybrid`, serve it with `mamba-hybrid serve`.
"""

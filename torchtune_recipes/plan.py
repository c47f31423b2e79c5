"""What a recipe takes of each GPU, from its YAML and the models' config.json alone: `mamba-hybrid plan`.

Shapes: B rows of one micro-batch, L tokens of a row, D and E width of student and teacher, V vocabulary.

Memory is the most that is alive at one moment of a step, so a step is gone through moment by moment. Parameters are
counted on models without memory, activations by `activations`; what FSDP2 gathers and reduces follows from
`models.shard`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from transformers import AutoConfig

from mamba_hybrid.config import ATTENTION, MIXER, HybridMambaConfig
from mamba_hybrid.convert import attention_layers
from mamba_hybrid.errors import UserError, first_line
from mamba_hybrid.flops import alignment_flops, distillation_flops
from mamba_hybrid.model import HybridMambaForCausalLM
from mamba_hybrid.source import hybrid_config

from .activations import META, Live, Shapes
from .align_hybrid import AlignHybrid
from .distill_hybrid import LOSS, DistillHybrid
from .models import PARTS
from .recipe import DTYPES, check_keys, component

NEEDED = ("student", "teacher", "dataset", "optimizer", "batch_size", "dtype")
GB = 1e9
CONTEXT = int(0.6 * GB)  # CUDA's own, with cuBLAS, NCCL and the kernels
FRAGMENTATION = 0.1  # of what is allocated: the caching allocator's blocks that fit nothing


def read_config(path: str | Path, keep: float | None = None) -> HybridMambaConfig:
    """A model's configuration, without its weights.

    Args:
        path: a directory with a config.json, or a file like it.
        keep: make a plain Transformer's the hybrid that `mamba-hybrid convert --keep` makes of it.

    Raises:
        UserError: there is none, or not of a model that this package takes.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} has no config.json; name a file like it with --student-config or --teacher-config")
    try:
        config = AutoConfig.from_pretrained(file)
    except Exception as e:  # transformers raises many kinds here
        raise UserError(f"{file} cannot be read: {first_line(e)}") from e
    if keep is not None and not isinstance(config, HybridMambaConfig):
        n = config.num_hidden_layers
        kept = attention_layers(n, keep)
        return hybrid_config(config, layer_types=[ATTENTION if i in kept else MIXER for i in range(n)])
    return hybrid_config(config)


class Parameters:
    """How many parameters a model has, by the units that FSDP gathers.

    Args:
        config: the model's.
        frozen: parts (keys of `PARTS`) that are not trained.
    """

    def __init__(self, config: HybridMambaConfig, frozen: list[str]) -> None:
        self.config, self.frozen = config, frozen
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

    def computed(self, whole: int, cores: int, dtype: torch.dtype) -> int:
        """Bytes of so many parameters, the mixers' cores among them in fp32, the rest in the dtype."""
        return (whole - cores) * dtype.itemsize + cores * 4


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step on one GPU.

    Args:
        name: of the moment.
        bytes: of each kind of thing.
    """

    name: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def optimizer_bytes(node: DictConfig) -> tuple[float, float]:
    """Bytes for each trained parameter that an optimiser keeps, and that it needs besides while it steps.

    The optimiser takes a step on a small parameter, so that any class is known.
    """
    p = nn.Parameter(torch.zeros(512, 512))
    optimizer = component("optimizer", node, [{"params": [p], "lr": 1e-3}])
    p.grad = torch.ones_like(p)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps
        optimizer.step()
    kept = sum(_nbytes(t) for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    with torch.compiler.set_stance("force_eager"), Live() as live:
        optimizer.step()
    # without `fused` a whole list of tensors is stepped at once, with what is made on the way for all of them
    return kept / p.numel(), live.peak / p.numel() if not node.get("fused") else 0.0


def _nbytes(t: torch.Tensor) -> int:
    if hasattr(t, "__tensor_flatten__"):
        names, _ = t.__tensor_flatten__()
        return sum(_nbytes(getattr(t, name)) for name in names)
    return t.nbytes


class Stage:
    """A recipe's step, seen from one GPU.

    Args:
        cfg: the recipe's configuration.
        student, teacher: the models' configurations.
        gpus: how many share the model.
    """

    def __init__(self, cfg: DictConfig, student: HybridMambaConfig, teacher: HybridMambaConfig, gpus: int) -> None:
        self.cfg = cfg
        self.gpus = cfg.get("data_parallel_shard") or gpus  # that share one copy of the models
        self.offload = bool(cfg.get("offload_teacher"))
        self.dtype, self.length = DTYPES[cfg.dtype], int(cfg.dataset.max_seq_len)
        self.accumulate = cfg.get("gradient_accumulation_steps") or 1
        self.student, self.teacher = Parameters(student, self.frozen()), Parameters(teacher, list(PARTS))
        self.state, self.stepping = optimizer_bytes(cfg.optimizer)
        # FSDP has what it gathers twice, as one buffer and as parameters, or the next unit's buffer beside this unit's
        self.copies = 1 if self.gpus == 1 else 2

    def frozen(self) -> list[str]:
        """Parts of the student that are not trained."""
        raise NotImplementedError

    def flops(self) -> float:
        """Model FLOPs of one token."""
        raise NotImplementedError

    def moments(self, batch: int) -> Iterator[Moment]:
        """The moments of a step that can be the fullest, with so many rows in a micro-batch."""
        raise NotImplementedError

    def traffic(self) -> int:
        """Bytes that FSDP brings to a GPU, and sends from it, in one step."""
        raise NotImplementedError

    def peak(self, batch: int) -> Moment:
        """The fullest moment."""
        return max(self.moments(batch), key=lambda m: m.total)

    def shard(self, number: float) -> int:
        """One GPU's share."""
        return int(number / self.gpus)

    def always(self) -> dict[str, int]:
        """What lies on the GPU all the time."""
        teacher = self.teacher.computed(self.teacher.count(), self.teacher.count("core."), self.dtype)
        return {
            "student's parameters, fp32": self.shard(4 * self.student.count()),
            "optimiser's moments": self.shard(self.state * self.student.count(trained=True)),
            "teacher": 0 if self.offload else self.shard(teacher),
        }

    def gradients(self, number: int) -> dict[str, int]:
        """Sharded gradients of so many parameters, or of all that are trained when steps before this have made them."""
        number = number if self.accumulate == 1 else self.student.count(trained=True)
        return {"gradients, fp32": self.shard(4 * number)}

    def root(self, model: Parameters) -> int:
        """Bytes of embeddings, last norm and head, gathered."""
        return model.root() * self.dtype.itemsize

    def gathered(self, model: Parameters, layer: int) -> int:
        """Bytes of a layer, gathered, and of the one that is on its way."""
        one = model.computed(model.layer(layer), model.layer(layer, "core."), self.dtype)
        return one * self.copies

    def step(self) -> Moment:
        """The optimiser's step."""
        trained = self.student.count(trained=True)
        gradients = self.shard(4 * trained)
        return Moment(
            "optimiser's step",
            self.always()
            | {
                "teacher's embeddings and head, gathered": self.root(self.teacher),
                "gradients, fp32": gradients,
                "optimiser's arrays": self.shard(self.stepping * trained),
            },
        )

    def teacher_forward(self, shapes: Shapes, batch: int) -> Moment:
        """The teacher's forward pass, at its largest layer."""
        kinds = {shapes.config.layer_types[i]: i for i in range(shapes.config.num_hidden_layers)}  # type: ignore[index]
        most = max(shapes.layer(i, grad=False).forward for i in kinds.values())
        return Moment(
            "teacher's forward pass",
            self.always() | self.gradients(0) | {
                "teacher's embeddings and head, gathered": self.root(self.teacher),
                "layers, gathered": max(self.gathered(self.teacher, i) for i in kinds.values()),
                "activations of a layer": shapes.hidden().nbytes + most,
                "batch, mask and rotary tables": shapes.shared(),
            },
        )  # fmt: skip

    def host(self) -> int:
        """Bytes of host memory that the models take of a process: the rows of one tensor at a time while checkpoints
        are read, and the share of a teacher that stays there."""
        largest = max(self.shard(4 * m.config.vocab_size * m.config.hidden_size) for m in (self.student, self.teacher))
        return largest + (self.shard(self.teacher.count() * self.dtype.itemsize) if self.offload else 0)

    def moved(self, number: float) -> float:
        """Of what is gathered or reduced, the share that comes from other GPUs."""
        return number * (self.gpus - 1) / self.gpus


class Distillation(Stage):
    """`distill_hybrid`."""

    def __init__(self, cfg: DictConfig, student: HybridMambaConfig, teacher: HybridMambaConfig, gpus: int) -> None:
        check_keys(cfg.get("loss") or {}, LOSS, "loss.")
        super().__init__(cfg, student, teacher, gpus)

    def frozen(self) -> list[str]:
        return list(self.cfg.get("freeze") or [])

    def flops(self) -> float:
        return distillation_flops(
            self.student.config, self.teacher.config, self.length, lambda part: part not in self.frozen()
        )  # fmt: skip

    def traffic(self) -> int:
        student, teacher = (m.computed(m.count(), m.count("core."), self.dtype) for m in (self.student, self.teacher))
        # the student's layers come for the forward and for the backward pass; embeddings and heads once
        come = 2 * student - self.root(self.student) + teacher
        return int(self.accumulate * self.moved(come + 4 * self.student.count(trained=True)))

    def moments(self, batch: int) -> Iterator[Moment]:
        model, config = self.student, self.student.config
        mine = Shapes(config, batch, self.length, self.dtype, lambda name: model.trains(name))
        theirs = Shapes(self.teacher.config, batch, self.length, self.dtype)
        yield self.teacher_forward(theirs, batch)

        n, types = config.num_hidden_layers, config.layer_types or []
        of_kind = {kind: mine.layer(types.index(kind), grad=True) for kind in sorted(set(types))}
        layers = [of_kind[kind] for kind in types]
        hidden = mine.hidden().nbytes
        every = (
            (self.cfg.get("activation_checkpoint_every") or 1) if self.cfg.get("enable_activation_checkpointing") else 0
        )
        again = [bool(every) and i % every == 0 for i in range(n)]
        kept = [hidden if again[i] else layer.kept for i, layer in enumerate(layers)]
        norm = mine.norm()
        loss = mine.loss(self.teacher.config, **(self.cfg.get("loss") or {}))
        common = self.always() | {
            "teacher's embeddings and head, gathered": self.root(self.teacher),
            "teacher's hidden states": theirs.hidden().nbytes,
            "student's embeddings and head, gathered": self.root(model),
            "batch, mask and rotary tables": mine.shared(),
        }
        entry = hidden  # again: the last layer's output; else the first layer's input, which no layer before it kept
        inputs = "layer inputs kept" if all(again) else "activations kept"
        before = common | self.gradients(0) | {inputs: sum(kept) + entry + norm.kept}
        yield Moment(
            "loss",
            before | {"loss, a chunk of tokens": loss.forward},
        )  # fmt: skip
        yield Moment(
            "backward pass of the head",
            before | {"loss, its gradients": loss.backward},
        )  # fmt: skip
        head = config.vocab_size * config.hidden_size * self.dtype.itemsize * model.trains("lm_head.weight")
        reduced, waiting = 0, 0
        for i in reversed(range(n)):
            yield Moment(
                f"backward pass of layer {i}",
                common | self.gradients(reduced) | {
                    "head's gradient": head,
                    inputs: sum(kept[:i]) + entry + hidden * again[i],
                    "a layer computed again" if again[i] else "a layer's backward pass": layers[i].backward,
                    "layers, gathered": self.gathered(model, i),
                    "layer's gradients being reduced": waiting,
                },
            )  # fmt: skip
            trained = model.layer(i, trained=True)
            reduced, waiting = reduced + trained, 4 * trained
        root = model.root(trained=True)
        tied = config.tie_word_embeddings
        yield Moment(
            "gradients of embeddings and head reduced",
            common | self.gradients(reduced + root) | {
                "embeddings' and head's gradients": root * self.dtype.itemsize * (2 if tied else 1),
                "being reduced": waiting + 4 * root,
            },
        )  # fmt: skip
        yield self.step()


class Alignment(Stage):
    """`align_hybrid`, whose teacher ends with the last layer that something is learnt from."""

    def __init__(self, cfg: DictConfig, student: HybridMambaConfig, teacher: HybridMambaConfig, gpus: int) -> None:
        layers = max(student.mixer_layers, default=-1) + 1
        shorter = copy.deepcopy(teacher)
        shorter.num_hidden_layers, shorter.layer_types = layers, (teacher.layer_types or [])[:layers]
        super().__init__(cfg, student, shorter, gpus)

    def frozen(self) -> list[str]:
        return [part for part in PARTS if part != "mixers"]

    def flops(self) -> float:
        return alignment_flops(self.student.config, self.teacher.config, self.length)

    def traffic(self) -> int:
        teacher = self.teacher.computed(self.teacher.count(), self.teacher.count("core."), self.dtype)
        mixers = self.student.computed(self.student.count(".mixer."), self.student.count("core."), self.dtype)
        return int(
            self.accumulate * self.moved(teacher + 2 * mixers + 4 * self.student.count(trained=True))
        )  # fmt: skip

    def moments(self, batch: int) -> Iterator[Moment]:
        model = self.student
        mine = Shapes(model.config, batch, self.length, self.dtype, lambda name: model.trains(name))
        theirs = Shapes(self.teacher.config, batch, self.length, self.dtype)
        yield self.teacher_forward(theirs, batch)
        mixers = model.config.mixer_layers
        aligned = mine.aligned(mixers[0])
        reduced = waiting = 0
        for i in mixers:
            unit = model.computed(model.layer(i, ".mixer."), model.layer(i, "core."), self.dtype)
            yield Moment(
                f"backward pass of mixer {i}",
                self.always() | self.gradients(reduced) | {
                    "teacher's embeddings and head, gathered": self.root(self.teacher),
                    "layers, gathered": self.gathered(self.teacher, i) + unit * self.copies,
                    "a layer's input and the attention's": 3 * mine.hidden().nbytes,
                    "activations of a mixer": aligned.backward,
                    "batch, mask and rotary tables": mine.shared() + theirs.shared(),
                    "mixer's gradients being reduced": waiting,
                },
            )  # fmt: skip
            trained = model.layer(i, trained=True)
            reduced, waiting = reduced + trained, 4 * trained
        yield self.step()


STAGES: dict[str, type[Stage]] = {"distill_hybrid": Distillation, "align_hybrid": Alignment}
KEYS = {
    name: recipe.required + recipe.optional
    for name, recipe in (("distill_hybrid", DistillHybrid), ("align_hybrid", AlignHybrid))
}


@dataclass(frozen=True)
class Plan:
    """The figures that `mamba-hybrid plan` prints.

    Args:
        title: recipe, GPUs, batch.
        moments: of a step.
        gpu: bytes of a GPU.
        host: bytes of host memory that the models take of one process.
        largest: rows of the largest micro-batch that fits, 0 for none.
        flops: of one GPU in one step.
        traffic: bytes that come to one GPU in one step.
        tokens: of one GPU in one step.
    """

    title: str
    moments: list[Moment]
    gpu: int
    host: int
    largest: int
    flops: float
    traffic: int
    tokens: int

    @property
    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.moments, key=lambda m: m.total)

    @property
    def total(self) -> int:
        """Bytes of the GPU in use at that moment, what PyTorch does not count included."""
        return needed(self.peak)


def needed(moment: Moment) -> int:
    """Bytes of a GPU for a moment: what PyTorch allocates, CUDA's own and what the allocator cannot use."""
    return int(moment.total * (1 + FRAGMENTATION)) + CONTEXT


def plan(
    config: str | Path,
    overrides: list[str],
    *,
    recipe: str | None = None,
    gpus: int | None = None,
    gpu_gb: float = 80,
    student_config: str | Path | None = None,
    teacher_config: str | Path | None = None,
    keep: float = 0.5,
) -> Plan:
    """Work out a recipe's memory and time.

    Args:
        config: a recipe's YAML.
        overrides: key=value, as for `tune run`.
        recipe: its name; None takes it, and gpus, from the `tune run` line in the YAML's header.
        gpus: processes of the run, one a GPU.
        gpu_gb: memory of one, in 10^9 bytes.
        student_config, teacher_config: config.json of a model that is not where the YAML says.
        keep: share of attention of a student that is still a plain Transformer.

    Raises:
        UserError: the YAML or a configuration cannot be read or does not fit.
    """
    cfg, header = _load(config, overrides)
    processes, named = _command(config, header)
    name = recipe or named
    if name not in STAGES:
        raise UserError(f"recipe {name!r} is none of {', '.join(STAGES)}{'' if name else '; name it with --recipe'}")
    check_keys(cfg, KEYS[name])
    count = processes if gpus is None else gpus
    if count < 1 or gpu_gb <= 0:
        raise UserError(f"--gpus {count} and --gpu-mem {gpu_gb} must be above 0")
    if count % (cfg.get("data_parallel_shard") or count):
        raise UserError(f"data_parallel_shard {cfg.data_parallel_shard} does not divide the {count} GPUs (--gpus)")
    if (chunk := cfg.get("sequence_chunk")) is not None and chunk < cfg.dataset.max_seq_len:
        raise UserError(f"sequence_chunk {chunk}: what is planned are whole rows; set sequence_chunk=null")
    if (target := cfg.get("target") or "outputs") != "outputs":
        raise UserError(f"target {target}: what is planned is alignment to outputs; set target=outputs")
    if cfg.get("device", "cuda") != "cuda":
        raise UserError(f"device {cfg.device!r}: what is planned is a GPU's memory; add device=cuda")
    student = read_config(student_config or cfg.student, keep)
    teacher = read_config(teacher_config or cfg.teacher)
    stage = STAGES[name](cfg, student, teacher, count)
    batch = int(cfg.batch_size)
    tokens = batch * stage.length * stage.accumulate
    gpu = int(gpu_gb * GB)
    return Plan(
        f"{config}: {name} on {count} GPU{'s' * (count > 1)}, {batch} x {stage.length} tokens "
        f"{f'x {stage.accumulate} ' if stage.accumulate > 1 else ''}each, {cfg.dtype}",
        list(stage.moments(batch)),
        gpu,
        stage.host(),
        largest(stage, gpu, batch),
        stage.flops() * tokens,
        stage.traffic(),
        tokens,
    )


def _command(config: str | Path, header: str) -> tuple[int, str]:
    """Processes and recipe of the header's tune run line for this file, no recipe where it is not clear."""
    lines = re.findall(r"tune run (?:--nproc_per_node (\d+) )?(\w+) --config (\S+)", header)
    own = [line for line in lines if Path(line[2]).name == Path(config).name] or lines
    if len({recipe for _, recipe, _ in own}) != 1:
        return 1, ""
    return int(own[0][0] or 1), own[0][1]


def _load(config: str | Path, overrides: list[str]) -> tuple[DictConfig, str]:
    try:
        text = Path(config).read_text()
        cfg = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(overrides))
        assert isinstance(cfg, DictConfig)
        odd = [key for key in NEEDED if key not in cfg]
        if odd or "max_seq_len" not in cfg.dataset:
            raise UserError(f"{config} lacks {', '.join(odd) or 'dataset.max_seq_len'}")
        if cfg.dtype not in DTYPES:
            raise UserError(f"dtype {cfg.dtype!r} is none of {', '.join(DTYPES)}")
        for key, value in (("batch_size", cfg.batch_size), ("dataset.max_seq_len", cfg.dataset.max_seq_len)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{key} {value!r} must be a whole number above 0")
        OmegaConf.resolve(cfg)
    except OSError as e:
        raise UserError(f"{config} cannot be read: {e.strerror}") from e
    except (OmegaConfBaseException, AssertionError, ValueError) as e:
        raise UserError(f"{config} is no recipe's configuration: {first_line(e)}") from e
    return cfg, text.split("\n\n")[0]


def largest(stage: Stage, gpu: int, batch: int) -> int:
    """Rows of the largest micro-batch that fits into a GPU's bytes, 0 if not one row does.

    What is alive at a moment grows by the same bytes with each row, so two sizes tell of all.

    Args:
        stage: the recipe's.
        gpu: bytes of a GPU.
        batch: the rows to start from.
    """
    rows = []
    for one, two in zip(stage.moments(batch), stage.moments(2 * batch), strict=True):
        row = (needed(two) - needed(one)) / batch
        fixed = needed(one) - row * batch
        if row > 0 or fixed > gpu:
            rows.append((gpu - fixed) / row if row > 0 else 0)
    return max(int(min(rows)), 0)


def format_plan(p: Plan, *, tflops: float, mfu: float, link: float) -> str:
    """The text that `mamba-hybrid plan` prints.

    Args:
        p: the figures.
        tflops: that a GPU can do at most, in 10^12 a second.
        mfu: the share of them that is reached.
        link: GB/s that come to a GPU.
    """
    peak = p.peak
    lines = [p.title, "", f"GB of one GPU at the fullest moment, {peak.name}:"]
    rows = {name: size for name, size in peak.bytes.items() if size} | {
        "allocated": peak.total,
        "not used by the allocator (10 %)": int(peak.total * FRAGMENTATION),
        "CUDA context, cuBLAS, NCCL": CONTEXT,
        "total": p.total,
    }
    width = max(map(len, rows))
    for name, size in rows.items():
        if name in ("allocated", "total"):
            lines.append("-" * (width + 9))
        lines.append(f"{name:{width}}  {size / GB:7.2f}")
    verdict = "fits" if p.total <= p.gpu else "does not fit"
    best = f"the largest batch_size that does is {p.largest}" if p.largest else "not even batch_size=1 does"
    lines += [f"{verdict} into {p.gpu / GB:g} GB; {best}", "", "allocated at other moments:"]
    moments = _last_of_kind(p.moments)
    wide = max(len(m.name) for m in moments)
    lines += [f"  {m.name:{wide}}  {m.total / GB:7.2f}" for m in moments]
    seconds, waits = p.flops / (tflops * 1e12 * mfu), p.traffic / (link * 1e9)
    lines += [
        "",
        f"host memory   {p.host / GB:.1f} GB of each process for the models, beside the data set",
        f"a step        {p.flops / 1e12:.0f} TFLOP a GPU: {seconds:.2f} s at {mfu:.0%} of {tflops:g} TFLOP/s, "
        f"{p.tokens / seconds:.0f} tokens/s a GPU",
        f"FSDP          {p.traffic / GB:.1f} GB to each GPU a step: {waits:.2f} s at {link:g} GB/s, beside computing",
    ]
    return "\n".join(lines)


def _last_of_kind(moments: list[Moment]) -> list[Moment]:
    """Of layers one after another the fullest only."""
    best: dict[str, Moment] = {}
    for m in moments:
        kind = re.sub(r"\d+$", "", m.name)
        if kind not in best or m.total > best[kind].total:
            best[kind] = m
    return list(best.values())

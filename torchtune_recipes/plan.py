"""What a recipe takes of each GPU, from its YAML and the models' config.json alone: `mamba-hybrid plan`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoConfig

from mamba_hybrid.config import ATTENTION, MIXER, HybridMambaConfig
from mamba_hybrid.convert import attention_layers
from mamba_hybrid.errors import UserError, first_line
from mamba_hybrid.source import hybrid_config

from .recipe import DTYPES, check_keys, override
from .stage import Moment, Stage
from .stages import STAGES
from .traffic import Layout, Load

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


@dataclass(frozen=True)
class Plan:
    """The figures that `mamba-hybrid plan` prints.

    Args:
        title: recipe, GPUs, batch.
        layout: of the GPUs.
        moments: of a step.
        gpu: bytes of a GPU.
        host: bytes of host memory that the models take of one process.
        largest: rows of the largest micro-batch that fits, 0 for none.
        flops: of one GPU in one step.
        traffic: of one GPU in one step.
        alone: what of it is moved while nothing can be computed.
        tokens: of one GPU in one step.
        loaded: bytes that all copies read of the models' files together.
        saved: bytes of a training checkpoint.
    """

    title: str
    layout: Layout
    moments: list[Moment]
    gpu: int
    host: int
    largest: int
    flops: float
    traffic: Load
    alone: Load
    tokens: int
    loaded: float
    saved: float

    @property
    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.moments, key=lambda m: m.total)

    @property
    def total(self) -> int:
        """Bytes of the GPU in use at that moment, what PyTorch does not count included."""
        return needed(self.peak)


@dataclass(frozen=True)
class Speeds:
    """What a plan's times follow from.

    Args:
        tflops: that a GPU can do at most, in 10^12 a second.
        mfu: the share of them that is reached.
        link, node_link: GB/s that come to a GPU, from its node and from others.
        hop: microseconds of a message without content.
        disk: GB/s that all processes together read and write of files.
    """

    tflops: float = 989
    mfu: float = 0.4
    link: float = 300
    node_link: float = 50
    hop: float = 5
    disk: float = 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")


def needed(moment: Moment) -> int:
    """Bytes of a GPU for a moment: what PyTorch allocates, CUDA's own and what the allocator cannot use."""
    return int(moment.total * (1 + FRAGMENTATION)) + CONTEXT


def plan(
    config: str | Path,
    overrides: list[str],
    *,
    recipe: str | None = None,
    gpus: int | None = None,
    node: int = 8,
    gpu_gb: float = 80,
    student_config: str | Path | None = None,
    teacher_config: str | Path | None = None,
    keep: float | None = None,
) -> Plan:
    """Work out a recipe's memory, traffic and FLOPs.

    Args:
        config: a recipe's YAML.
        overrides: key=value, as for `tune run`.
        recipe: its name; None takes it, and gpus, from the `tune run` line in the YAML's header.
        gpus: processes of the run, one a GPU.
        node: GPUs of a node.
        gpu_gb: memory of one, in 10^9 bytes.
        student_config, teacher_config: config.json of a model that is not where the YAML says.
        keep: share of attention of a student that is still a plain Transformer; None for what the recipe starts from.

    Raises:
        UserError: the YAML or a configuration cannot be read or does not fit.
    """
    cfg, header = _load(config, overrides)
    processes, named = _command(config, header)
    name = recipe or named
    if name not in STAGES:
        raise UserError(f"recipe {name!r} is none of {', '.join(STAGES)}{'' if name else '; name it with --recipe'}")
    kind = STAGES[name]
    check_keys(cfg, kind.recipe.required + kind.recipe.optional)
    if missing := [key for key in kind.recipe.required if cfg.get(key) is None]:
        raise UserError(f"{config} lacks {', '.join(missing)}")
    _check(config, cfg)
    count = processes if gpus is None else gpus
    if count < 1 or gpu_gb <= 0:
        raise UserError(f"--gpus {count} and --gpu-mem {gpu_gb} must be above 0")
    layout = Layout(count, cfg.get("data_parallel_shard") or count, node)
    student = read_config(student_config or cfg.student, kind.keep if keep is None else keep)
    which = kind.teacher_of(cfg)
    if which == "teacher" and cfg.get("teacher") is None:
        raise UserError(f"{config} lacks teacher, the reference; reference=student needs none")
    teachers = {"student": lambda: student, "teacher": lambda: read_config(teacher_config or cfg.teacher)}
    stage = kind(cfg, student, None if which is None else teachers[which](), layout)
    batch = int(cfg.batch_size)
    tokens = batch * stage.length * stage.accumulate
    gpu = int(gpu_gb * GB)
    over = f" of {node} a node" if count > node else ""
    copies = f", {layout.copies} copies of {layout.shard}" if layout.copies > 1 else ""
    return Plan(
        f"{config}: {name} on {count} GPU{'s' * (count > 1)}{over}{copies}, {batch} x {stage.length} tokens "
        f"{f'x {stage.accumulate} ' if stage.accumulate > 1 else ''}each, {cfg.dtype}",
        layout,
        list(stage.moments(batch)),
        gpu,
        stage.host(),
        largest(stage, gpu, batch),
        stage.flops() * tokens,
        layout.load(stage.exchange() * stage.accumulate),
        layout.load(stage.alone() * stage.accumulate),
        tokens,
        stage.loaded() * layout.copies,
        stage.saved(),
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
        plain = OmegaConf.create(text)
        assert isinstance(plain, DictConfig)
        cfg = override(plain, overrides)
        OmegaConf.resolve(cfg)
    except OSError as e:
        raise UserError(f"{config} cannot be read: {e.strerror}") from e
    except (OmegaConfBaseException, AssertionError, ValueError) as e:
        raise UserError(f"{config} is no recipe's configuration: {first_line(e)}") from e
    return cfg, text.split("\n\n")[0]


def _check(config: str | Path, cfg: DictConfig) -> None:
    """Raises UserError for what is not a GPU's, or no number."""
    if "max_seq_len" not in cfg.dataset:
        raise UserError(f"{config} lacks dataset.max_seq_len")
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype {cfg.dtype!r} is none of {', '.join(DTYPES)}")
    for key, value in (("batch_size", cfg.batch_size), ("dataset.max_seq_len", cfg.dataset.max_seq_len)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key} {value!r} must be a whole number above 0")
    if cfg.device != "cuda":
        raise UserError(f"device {cfg.device!r}: what is planned is a GPU's memory; add device=cuda")


def largest(stage: Stage, gpu: int, batch: int) -> int:
    """Rows of the largest micro-batch that fits into a GPU's bytes, 0 if not one row does.

    What is alive at a moment grows by the same bytes with each row, so two sizes tell of all; and two more, nearer to
    what they told, where a chunk of the loss is longer than few rows.

    Args:
        stage: the recipe's.
        gpu: bytes of a GPU.
        batch: the rows to start from.
    """
    fit = batch
    for _ in range(2):
        start, rows = min(max(fit, 1), 8 * batch), []
        for one, two in zip(stage.moments(start), stage.moments(2 * start), strict=True):
            row = (needed(two) - needed(one)) / start
            fixed = needed(one) - row * start
            if row > 0 or fixed > gpu:
                rows.append((gpu - fixed) / row if row > 0 else 0)
        fit = max(int(min(rows)), 0)
    return fit


def format_plan(p: Plan, speeds: Speeds) -> str:
    """The text that `mamba-hybrid plan` prints.

    Args:
        p: the figures.
        speeds: for the times.
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
    lines += ["", *_times(p, speeds)]
    return "\n".join(lines)


def _times(p: Plan, v: Speeds) -> list[str]:
    """The lines about files, computing and FSDP."""
    compute = p.flops / (v.tflops * 1e12 * v.mfu)
    waits, alone = (load.seconds(v.link * GB, v.node_link * GB, v.hop / 1e6) for load in (p.traffic, p.alone))
    # what can be moved beside computing is, or nothing is
    best, worst = max(compute, waits - alone) + alone, compute + waits
    t, n = p.traffic, p.layout.gpus
    lines = [
        f"host memory   {p.host / GB:.1f} GB of each process for the models, beside the data set",
        f"files         {p.loaded / GB:.0f} GB read at the start: {p.loaded / GB / v.disk:.0f} s at {v.disk:g} GB/s; "
        f"{p.saved / GB:.0f} GB of a checkpoint: {p.saved / GB / v.disk:.0f} s",
        f"computing     {p.flops / 1e12:.0f} TFLOP a GPU and step: {compute:.2f} s at {v.mfu:.1%} of {v.tflops:g}",
    ]
    if n > 1:
        lines += [
            f"FSDP, within  {t.within / GB:.1f} GB to a GPU and step: {t.within / GB / v.link:.2f} s at {v.link:g}",
            f"      between {t.between / GB:.1f} GB: {t.between / GB / v.node_link:.2f} s at {v.node_link:g}",
            f"      hops    {t.hops}: {t.hops * v.hop / 1e6:.2f} s at {v.hop:g} us",
            f"      waits   {waits:.2f} s, of which {alone:.2f} s with nothing to compute beside",
        ]
    lines.append(
        f"a step        {best:.2f} to {worst:.2f} s for {n * p.tokens} tokens: {p.tokens / best:.0f} to "
        f"{p.tokens / worst:.0f} tokens/s a GPU"
        if n > 1
        else f"a step        {compute:.2f} s for {p.tokens} tokens: {p.tokens / compute:.0f} tokens/s"
    )
    return lines


def _last_of_kind(moments: list[Moment]) -> list[Moment]:
    """Of layers one after another the fullest only."""
    best: dict[str, Moment] = {}
    for m in moments:
        kind = re.sub(r"\d+$", "", m.name)
        if kind not in best or m.total > best[kind].total:
            best[kind] = m
    return list(best.values())

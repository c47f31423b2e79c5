"""What the recipes share: a hybrid student that learns from a frozen teacher, on 1..n processes.

Shapes: B rows, L tokens of a row.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path, _merge_yaml_and_cli_args
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm
from yaml import YAMLError

from mamba_hybrid.checkpoint import FP32, load_config, open_model, save_model
from mamba_hybrid.compare import check_vocabularies
from mamba_hybrid.errors import UserError, first_line
from mamba_hybrid.flops import peak_flops
from mamba_hybrid.model import HybridMambaForCausalLM
from mamba_hybrid.source import Source

from .checkpoints import Checkpoints
from .data import load_tokenizer
from .loading import fill
from .models import PARTS, Wrapped, gradient_norms, plain_name
from .packing import PackedRows
from .side_stream import SideStream
from .stream import StreamedRows, StreamError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REQUIRED = (
    "output_dir", "student", "teacher", "dataset", "optimizer", "mixer_lr", "batch_size", "device", "dtype",
)  # fmt: skip
OPTIONAL = (
    "gradient_accumulation_steps", "max_steps", "epochs", "lr_scheduler", "clip_grad_norm", "seed", "compile",
    "checkpoint_every_n_steps", "async_checkpoints", "keep_last_n", "resume", "log_every", "metric_loggers",
    "data_parallel_shard", "offload_teacher", "peak_tflops",
)  # fmt: skip
SWITCHES = ("compile", "async_checkpoints", "resume", "offload_teacher", "fp8", "enable_activation_checkpointing")
# of the configuration, what a resumed run must have as the run before, beside its data
FIXED = ("optimizer", "lr_scheduler", "mixer_lr", "clip_grad_norm", "dtype", "seed")


class HybridRecipe(FTRecipeInterface):
    """A stage of training; one class for one process and for many: a process alone is a group of one.

    A stage says which keys its configuration has beside the common ones (`required`, `optional`, `fixed`), what it
    trains (`build`, `frozen`), and what it learns from a batch (`learn`, whose sums are named by `measured`).

    Args:
        cfg: the YAML's content; `configs/` has commented ones.

    Raises:
        UserError: a missing or contradicting key, before anything is loaded.
    """

    doing = "training"
    takes: Any = (PackedRows, StreamedRows)  # what the data set may be, and what makes it
    makers: tuple[str, ...] = ("data.text_dataset", "data.chat_dataset", "data.mixed_dataset")
    result = "hybrid"  # what `export` writes into output_dir
    required: tuple[str, ...] = REQUIRED
    optional: tuple[str, ...] = OPTIONAL
    fixed: tuple[str, ...] = FIXED
    measured: tuple[str, ...] = ("loss",)  # what is logged of `learn`; the first must be finite
    counts = "tokens"  # what `valid_R` of the data set counts
    teacher_path: str | None  # none where there is nothing to learn from a teacher
    student: Wrapped
    teacher: Wrapped

    def __init__(self, cfg: DictConfig) -> None:
        missing = [key for key in self.required if cfg.get(key) is None]
        if missing:
            raise UserError(f"the config lacks {', '.join(missing)}")
        check_keys(cfg, self.required + self.optional)
        if cfg.dtype not in DTYPES:
            raise UserError(f"dtype {cfg.dtype!r} is none of {', '.join(DTYPES)}")
        for key in (
            "batch_size",
            "gradient_accumulation_steps",
            "max_steps",
            "epochs",
            "log_every",
            "data_parallel_shard",
        ):
            value = cfg.get(key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{key} {value!r} must be a whole number above 0")
        for key in ("checkpoint_every_n_steps", "keep_last_n"):
            value = cfg.get(key)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise UserError(f"{key} {value!r} must be a whole number, 0 or null for none")
        for key in (key for key in self.required if key.endswith("_lr")):
            if not isinstance(cfg[key], (int, float)) or not 0 <= cfg[key] < math.inf:
                raise UserError(f"{key} {cfg[key]!r} must be a number of at least 0")
        seed = cfg.get("seed", 0)
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"seed {seed!r} must be a whole number of at least 0")
        for key in SWITCHES:
            if cfg.get(key) is not None and not isinstance(cfg[key], bool):
                raise UserError(f"{key} {cfg[key]!r} must be True or False")
        peak = cfg.get("peak_tflops")
        if peak is not None and (not isinstance(peak, (int, float)) or peak <= 0):
            raise UserError(f"peak_tflops {peak!r} must be a number above 0, or null for what the device is known for")
        if cfg.get("max_steps") is None and cfg.get("epochs") is None:
            raise UserError("the config needs max_steps or epochs")
        self.cfg = cfg
        if odd := sorted(set(self.frozen()) - set(PARTS)):
            raise UserError(f"freeze names {odd}; there are {', '.join(PARTS)}")
        self.teacher_path = cfg.get("teacher")
        self.accumulate = cfg.get("gradient_accumulation_steps") or 1
        self.dtype = DTYPES[cfg.dtype]
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.sharded = cfg.get("data_parallel_shard") or self.world
        if self.world % self.sharded:
            raise UserError(
                f"data_parallel_shard {self.sharded} does not divide the {self.world} processes (nproc_per_node x "
                "nnodes)"
            )
        self.offload = bool(cfg.get("offload_teacher"))
        self.blockwise = str(OmegaConf.select(cfg, "optimizer._component_")).startswith("torchao.")
        if self.blockwise:
            self._check_torchao()
        if cfg.device not in ("cpu", "cuda") or (cfg.device == "cuda" and not torch.cuda.is_available()):
            raise UserError(f"device {cfg.device!r} is not here; set device=cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cpu") if cfg.device == "cpu" else torch.device("cuda", local)
        self.step = 0
        self.stopped = False
        self.loggers: list[Any] = []
        self.parts: tuple[str, ...] = ()  # of the student, keys of PARTS, whose gradient norms are logged
        self._handlers: dict[int, Any] = {}
        self._known_peak = (
            peak_flops(torch.cuda.get_device_name(self.device), self.dtype) if self.device.type == "cuda" else None
        )
        self._read_at = 0.0
        self._bar = tqdm(disable=True)
        self._unread: list[tuple[Tensor, dict[str, float]]] = []  # of steps whose metrics are still on the device

    def _check_torchao(self) -> None:
        if self.cfg.device == "cpu":
            raise UserError(
                f"optimizer {self.cfg.optimizer._component_} compiles its step, which does not build for device cpu; "
                "take torch.optim.AdamW there"
            )

    def build(self, student: HybridMambaForCausalLM, teacher: HybridMambaForCausalLM, mesh: DeviceMesh) -> None:
        """Wrap and shard both: self.student with fp32 masters of what is to be trained, and self.teacher.

        They are on the meta device, and get their numbers when they are sharded.

        Args:
            student, teacher: one and the same where `teacher_path` is None.
            mesh: of all processes.

        Raises:
            UserError: two models that do not fit together for this stage.
        """
        raise NotImplementedError

    def fill(self, student: Source, teacher: Source) -> None:
        """Give the sharded models the numbers of their checkpoints."""
        fill(self.student, student, self.device)
        if self.teacher_path is not None:
            fill(self.teacher, teacher, self.device, offload=self.offload)

    def frozen(self) -> list[str]:
        """Parts of the student (keys of `PARTS`) that are not trained: those that the configuration names."""
        return list(self.cfg.get("freeze") or [])

    def flops(self) -> float | None:
        """Model FLOPs of one token of a step (see `mamba_hybrid.flops`), None where nobody has worked them out."""
        return None

    def learn(self, batch: Any, counted: int) -> Tensor:
        """Accumulate the gradients of a batch's loss, which is a mean over the `counted` labels of all processes' step.

        Args:
            batch: what the data set's `batch` makes, on the device.
            counted: what `valid` of the data set counts (labels), over all processes and micro-batches.

        Returns:
            (len(measured),) fp32: sums over the batch's labels.
        """
        raise NotImplementedError

    def setup(self, **_: Any) -> None:
        """Load student, teacher and data, shard, and resume where the last run stopped."""
        cfg = self.cfg
        torch.manual_seed(cfg.get("seed", 0))
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:  # alone: a group in memory, so that there is one code path
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if self.sharded == self.world:
            mesh = init_device_mesh(self.device.type, (self.world,))
        else:
            shape = (self.world // self.sharded, self.sharded)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

        self.checkpoints = Checkpoints(
            cfg.output_dir, cfg.get("keep_last_n", 2), background=bool(cfg.get("async_checkpoints"))
        )
        self._check_output()
        self.stored_dtype = load_config(cfg.student).dtype or torch.float32
        student, student_weights = open_model(cfg.student, self.stored_dtype)
        teacher, teacher_weights = student, student_weights
        if self.teacher_path is not None:
            teacher, teacher_weights = open_model(self.teacher_path, self.dtype)
            check_vocabularies(Path(self.teacher_path), teacher, Path(cfg.student), student)
        tokenizer = load_tokenizer(cfg.student)
        length = cfg.dataset.get("max_seq_len")
        if not isinstance(length, int):
            raise UserError(f"dataset.max_seq_len {length!r} must be a whole number")
        limit = min(student.config.max_position_embeddings, teacher.config.max_position_embeddings)
        if length > limit:
            raise UserError(f"dataset.max_seq_len {length} is over the models' context {limit}")
        self.data = component("dataset", cfg.dataset, tokenizer)
        if not isinstance(self.data, self.takes):
            if isinstance(self.data, StreamedRows) and issubclass(PackedRows, self.takes):
                raise UserError(f"{self.doing} takes no stream; set dataset.streaming=False")
            makers = " or ".join(f"torchtune_recipes.{name}" for name in self.makers)
            raise UserError(f"dataset {cfg.dataset._component_} makes no rows for {self.doing}; use {makers}")
        self.data.check_vocabulary(student.vocab_size)
        self.order = self.data.order(cfg.batch_size, self.accumulate, cfg.get("seed", 0), self.rank, self.world)
        self.rows_per_step = self.order.rows_per_step
        self.steps = self.order.steps(cfg.get("max_steps"), cfg.get("epochs"))

        for part in self.frozen():
            for name, p in student.named_parameters():
                if any(key in name for key in PARTS[part]):
                    p.requires_grad_(False)
        self.build(student, teacher, mesh)
        self.fill(student_weights, teacher_weights)
        self.side = SideStream(self.device, on=self.world == 1 and not self.offload)  # FSDP has streams of its own
        self.optimizer = component("optimizer", cfg.optimizer, self._parameter_groups())
        self.load_checkpoint()
        self.scheduler = self._scheduler()
        if self.rank == 0:
            self.loggers = [component("metric_loggers", node) for node in cfg.get("metric_loggers") or []]
            for logger in self.loggers:
                if hasattr(logger, "rewind"):
                    logger.rewind(self.step)
                logger.log_config(cfg)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._stop)

    def _check_output(self) -> None:
        out = Path(self.cfg.output_dir)
        if out.exists() and not out.is_dir():
            raise UserError(f"output_dir {out} is a file")
        if self.rank == 0:
            self.checkpoints.sweep()
        if not self.cfg.get("resume", True) and (steps := self.checkpoints.steps()):
            raise UserError(
                f"output_dir {out} holds a run up to step {steps[-1]}; resume=True goes on with it, "
                "another output_dir starts anew"
            )

    def _scheduler(self) -> Any:
        """The schedule, standing at the step to come: the first has a rate above 0, the one after the last has 0."""
        node = self.cfg.get("lr_scheduler")
        if not node or ("_component_" in node and node["_component_"] is None):  # as torchtune reads lr_scheduler=null
            return None
        for group in self.optimizer.param_groups:
            rate = group["initial_lr"] = self.cfg[f"{group['name']}_lr"]
            if isinstance(group["lr"], Tensor):  # as torchao's optimisers have it, for torch.compile
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return component(
            "lr_scheduler", node, self.optimizer,
            num_training_steps=self.steps + 1, last_epoch=self.step,
        )  # fmt: skip

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Mixers and the rest with rates of their own; no weight decay on vectors and on the mixers' cores."""
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, p in self.student.named_parameters():
            if not p.requires_grad:
                continue
            part = "mixer" if ".mixer." in name else "rest"
            plain = p.dim() < 2 or ".core." in name
            group = {"name": part, "params": [], "lr": self.cfg[f"{part}_lr"]}
            if plain:
                group["weight_decay"] = 0.0
            groups.setdefault((part, plain), group)["params"].append(p)
        if not groups:
            raise UserError(f"freeze {self.frozen()} leaves nothing to train")
        return list(groups.values())

    def _stop(self, *_: Any) -> None:
        self.stopped = True

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have as the run before, or its losses would not be those of one run."""
        cfg = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(cfg, dict)
        return {
            "rows a step (batch_size x gradient_accumulation_steps x processes)": self.rows_per_step,
            "data": self.data.digest(),
            "steps": self.steps,
            # torchao's states are in blocks of what one process holds, and cannot be cut anew
            "data_parallel_shard (all processes where it is not set)": self.sharded if self.blockwise else None,
        } | {key: cfg.get(key) for key in self.fixed}

    def load_checkpoint(self, **_: Any) -> None:
        """Resume from the newest whole checkpoint, if there is one."""
        self.step = self.checkpoints.load_latest(self.student, self.optimizer, self._settings())
        if self.step:
            self.data.resume(self.step * self.rows_per_step, self.checkpoints.state(self.step).get("data_place"))
        if self.step and self.rank == 0:
            print(f"resuming after step {self.step} of {self.steps}", flush=True)

    def save_checkpoint(self, **_: Any) -> None:
        """Write training state for this step, its metrics first."""
        self.read_metrics()
        place = {"data_place": self.data.place(self.step * self.rows_per_step)}
        self.checkpoints.save(self.step, self.student, self.optimizer, self._settings() | place)

    def export(self) -> None:
        """Write the student as a checkpoint that transformers and vLLM load: output_dir/hybrid."""
        tensors = self._whole_tensors()
        try:
            if self.rank == 0:
                model, like = self.student.model, self.cfg.student
                save_model(f"{self.cfg.output_dir}/hybrid", copy.deepcopy(model.config), tensors, like, overwrite=True)
        finally:
            for _ in tensors:  # the other processes take part in gathering each tensor
                pass
        dist.barrier()

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The student's tensors, one gathered at a time, as they are stored."""
        for name, p in self.student.model.named_parameters():
            whole = p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
            name = plain_name(name)
            yield name, whole if FP32 in name else whole.to(self.stored_dtype)

    def train_step(self) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step on the step's rows.

        Returns:
            Sums over this process's labels (see `learn`), each divided by the labels of all processes, the gradient
            norms of all for each of `parts` and together: fp32 on the device; and the rates it was made with.
        """
        # every process knows the whole step's rows: there is nothing to exchange
        counted = max(self._counted(self.step), 1)
        sums = torch.zeros(len(self.measured), device=self.device)
        for rows in self.order.micro_batches(self.step):
            batch = self.side(functools.partial(self.data.batch(rows).to, self.device))
            sums += self.learn(batch, counted)
        for p in (p for group in self.optimizer.param_groups for p in group["params"] if p.grad is None):
            p.grad = torch.zeros_like(p)  # rows no longer than the window reach no state; checkpoints hold all moments
        norms = gradient_norms(self.student)
        norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        if limit := self.cfg.get("clip_grad_norm"):
            if getattr(self.optimizer, "_step_supports_amp_scaling", False):
                # a fused optimiser divides by it as it reads the gradients, which saves a pass over them
                self.optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1)  # type: ignore[attr-defined]
            else:
                nn.utils.clip_grads_with_norm_(self.student.parameters(), limit, norm)
        rates = {f"lr_{group['name']}": float(group["lr"]) for group in self.optimizer.param_groups}
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parts = tuple(norms)
        return torch.cat([sums / counted, torch.stack([*norms.values(), norm])]), rates

    def _counted(self, step: int) -> int:
        """Tokens with a label in a step, over all processes."""
        return self.data.valid(self.order.step_rows(step))

    def read_metrics(self) -> None:
        """Wait for the device, and log a row for each step since the last time.

        Raises:
            UserError: a loss or gradient norm among them is not finite.
        """
        if not self._unread:
            return
        rows = torch.stack([row for row, _ in self._unread])
        total, norms = rows[:, : len(self.measured)].contiguous(), rows[:, len(self.measured) :].tolist()
        dist.all_reduce(total)
        now = time.perf_counter()
        speed = len(rows) * self.rows_per_step * self.data.length / (now - self._read_at)
        first = self.step - len(rows) + 1
        for i, (values, (*of_parts, norm)) in enumerate(zip(total.tolist(), norms, strict=True)):
            means = dict(zip(self.measured, values, strict=True))
            if not (math.isfinite(values[0]) and math.isfinite(norm)):
                rates = " and ".join(key for key in self.required if key.endswith("_lr"))
                raise UserError(
                    f"step {first + i}: loss {values[0]}, gradient norm {norm}; lower {rates}, set "
                    "clip_grad_norm, or resume from the checkpoint before"
                )
            # what a stage does not measure in every step is NaN in the others
            row = {name: value for name, value in means.items() if not math.isnan(value)} | {
                self.counts: self._counted(first + i - 1),
                "epoch": self.order.epoch(first + i - 1), "grad_norm": norm, "tokens_per_s": speed,
                "seconds": (now - self._read_at) / len(rows),
                **{f"grad_norm_{part}": value for part, value in zip(self.parts, of_parts, strict=True)},
                **self._unread[i][1],
            }  # fmt: skip
            row |= self._utilisation(speed)
            if self.device.type == "cuda":
                row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            for logger in self.loggers:
                logger.log_dict(row, first + i)
        self._unread.clear()
        self._read_at = now
        shown = {name: f"{value:.4f}" for name, value in means.items() if name in ("loss", "kl")}
        self._bar.set_postfix(**shown, tok_s=f"{speed:.0f}", refresh=False)

    def _utilisation(self, speed: float) -> dict[str, float]:
        """Model TFLOP/s of one device, and their share of what it can do at most, as far as both are known."""
        flops = self.flops()
        if flops is None:
            return {}
        reached = flops * speed / self.world
        peak = self.cfg.get("peak_tflops")
        most = peak * 1e12 if peak else self._known_peak
        return {"tflops": reached / 1e12} | ({"mfu": reached / most} if most else {})

    def train(self, **_: Any) -> None:
        """Run to the last step, or until a signal asks to stop; then save.

        Raises:
            UserError: a loss or gradient norm that is not finite.
        """
        every, log_every = self.cfg.get("checkpoint_every_n_steps") or 0, self.cfg.get("log_every") or 1
        began, self._read_at = self.step, time.perf_counter()
        self._bar = tqdm(total=self.steps, initial=began, desc=self.doing, unit="step", disable=self.rank != 0)
        with self._bar:
            while self.step < self.steps and not self._stop_together():
                try:
                    self._unread.append(self.train_step())
                except StreamError as e:  # before the step had begun
                    if self.step > began:
                        self.save_checkpoint()
                    raise UserError(f"{e} (step {self.step} is saved)" if self.step else str(e)) from e
                self.step += 1
                if self.step % log_every == 0:
                    self.read_metrics()
                self.after_step()
                self._bar.update()
                if every and self.step % every == 0 and self.step < self.steps:
                    self.save_checkpoint()
                    self._read_at = time.perf_counter()
            self.read_metrics()
        if self.step > began:
            self.save_checkpoint()
        if self.step == self.steps:
            self.export()
        self.checkpoints.wait()

    def after_step(self) -> None:
        """What a stage does between two steps, on all processes."""

    def _stop_together(self) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self.world == 1:
            return self.stopped
        flag = torch.tensor(float(self.stopped))  # on the CPU, where asking waits for no kernel
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def cleanup(self, **_: Any) -> None:
        """Let a checkpoint come to its end, close loggers and the process group, hand signals back."""
        if hasattr(self, "checkpoints"):
            self.checkpoints.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for logger in self.loggers:
            logger.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def component(key: str, node: DictConfig, *args: Any, **more: Any) -> Any:
    """What a `_component_` node of the configuration makes.

    Args:
        key: of the node, for messages.
        node: a dotted path under `_component_`, and keyword arguments.
        args, more: further arguments, which the configuration does not hold.

    Raises:
        UserError: there is no such component, or it does not take these arguments.
    """
    if not isinstance(node, DictConfig) or "_component_" not in node:
        raise UserError(f"{key} needs a _component_, it is {node!r}")
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    kwargs: dict[str, Any] = {str(k): v for k, v in plain.items()}
    name = kwargs.pop("_component_")
    if not isinstance(name, str) or not name:
        raise UserError(f"{key}._component_ must be a dotted path, it is {name!r}")
    try:
        target = _get_component_from_path(name)
        inspect.signature(target).bind(*args, **kwargs, **more)
    except (TypeError, InstantiationError, ImportError) as e:
        why = " ".join(str(e).split())
        raise UserError(f"{key}: {name} with {', '.join(map(str, kwargs)) or 'no arguments'}: {why}") from e
    try:
        return target(*args, **kwargs, **more)
    except ImportError as e:  # a logger, say, whose package is no dependency
        raise UserError(f"{key}: {name} needs a package that is not installed ({first_line(e)})") from e


def override(cfg: DictConfig, words: list[str]) -> DictConfig:
    """A configuration as `tune run` changes it: key=value, component=path, ~key to remove one.

    Raises:
        ValueError: a word that is none of these.
        OmegaConfBaseException: a value that is no YAML.
    """
    values = OmegaConf.to_container(cfg)
    assert isinstance(values, dict)
    return _merge_yaml_and_cli_args(Namespace(**{str(key): value for key, value in values.items()}), words)


def check_keys(node: Mapping[str, Any] | DictConfig, known: tuple[str, ...], where: str = "") -> None:
    """Raises UserError for a key that there is not; `where` stands before it."""
    odd = sorted(str(key) for key in set(node) - set(known))
    if odd:
        raise UserError(f"unknown config key {where}{odd[0]}; there are {', '.join(known)}")


def command(main: Callable[[DictConfig], int]) -> Callable[[], NoReturn]:
    """torchtune's `config.parse`, but for one line where the configuration or an override cannot be read.

    Args:
        main: a recipe's, which gets the configuration and returns the exit code.
    """

    @functools.wraps(main)
    def parsed() -> NoReturn:
        found: list[DictConfig] = []

        @functools.wraps(main)
        def note(cfg: DictConfig) -> None:
            found.append(cfg)

        try:
            config.parse(note)()
        except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as e:
            _print_error(" ".join(str(e).split()))
            sys.exit(1)
        except SystemExit:  # of `note`, or of --help and flags that are wrong
            if not found:
                raise
        sys.exit(main(found[0]))

    return parsed


def _print_error(line: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    print(f"error{f' (process {rank})' if rank else ''}: {line}", file=sys.stderr, flush=True)


def run(kind: type[HybridRecipe], cfg: DictConfig) -> int:
    """A recipe from setup to cleanup; prints one `error:` line where the user can mend something.

    Returns:
        0, 1 after an error, 130 after a signal.
    """
    recipe = None
    try:
        recipe = kind(cfg)
        recipe.setup()
        recipe.train()
        done = recipe.step == recipe.steps
    except (UserError, OmegaConfBaseException) as e:
        _print_error(first_line(e))
        return 1
    finally:
        if recipe is not None:
            recipe.cleanup()
    if recipe.rank == 0:
        where = (
            f"{cfg.output_dir}/{recipe.result}" if done else f"{cfg.output_dir}/step_{recipe.step}; run again to go on"
        )
        print(f"{'finished' if done else 'stopped'} at step {recipe.step} of {recipe.steps}: {where}", flush=True)
    return 0 if done else 130

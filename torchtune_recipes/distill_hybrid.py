"""KD-SFT: train a hybrid student to a frozen teacher's distributions, on 1..n processes.

Shapes: B rows, L tokens of a row.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torchtune import config
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm
from transformers import AutoTokenizer

from mamba_hybrid.checkpoint import load_model, save_model
from mamba_hybrid.compare import check_vocabularies
from mamba_hybrid.errors import UserError

from .checkpoints import Checkpoints
from .models import PARTS, Student, Teacher, shard
from .order import RowOrder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REQUIRED = (
    "output_dir", "student", "teacher", "dataset", "optimizer", "mixer_lr", "rest_lr", "batch_size", "device", "dtype",
)  # fmt: skip


class DistillHybrid(FTRecipeInterface):
    """One class for one process and for many: a process alone is a group of one.

    Args:
        cfg: the YAML's content; `configs/` has commented ones.

    Raises:
        UserError: a missing or contradicting key, before anything is loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        missing = [key for key in REQUIRED if cfg.get(key) is None]
        if missing:
            raise UserError(f"the config lacks {', '.join(missing)}")
        if cfg.dtype not in DTYPES:
            raise UserError(f"dtype {cfg.dtype!r} is none of {', '.join(DTYPES)}")
        odd = sorted(set(cfg.get("freeze") or []) - set(PARTS))
        if odd:
            raise UserError(f"freeze names {odd}; there are {', '.join(PARTS)}")
        for key in ("batch_size", "gradient_accumulation_steps", "max_steps", "epochs"):
            value = cfg.get(key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{key} {value!r} must be a whole number above 0")
        if cfg.get("max_steps") is None and cfg.get("epochs") is None:
            raise UserError("the config needs max_steps or epochs")
        self.cfg = cfg
        self.accumulate = cfg.get("gradient_accumulation_steps") or 1
        self.loss = OmegaConf.to_container(cfg.get("loss") or OmegaConf.create({}))
        self.dtype = DTYPES[cfg.dtype]
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if cfg.device not in ("cpu", "cuda") or (cfg.device == "cuda" and not torch.cuda.is_available()):
            raise UserError(f"device {cfg.device!r} is not here; set device=cpu")
        self.device = torch.device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)) if cfg.device == "cuda" else None)
        self.step = 0
        self.stopped = False

    def setup(self, **_: Any) -> None:
        """Load student, teacher and data, shard, and resume where the last run stopped."""
        cfg = self.cfg
        torch.manual_seed(cfg.get("seed", 0))
        torch.set_float32_matmul_precision("high")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(backend, **alone)
        mesh = init_device_mesh(self.device.type, (self.world,))

        student = load_model(cfg.student)
        teacher = load_model(cfg.teacher, self.dtype)
        check_vocabularies(Path(cfg.teacher), teacher, Path(cfg.student), student)
        self.stored_dtype = student.config.dtype
        try:
            tokenizer = AutoTokenizer.from_pretrained(cfg.student)
        except Exception as e:
            raise UserError(f"student {cfg.student} has no tokenizer that transformers can load: {e}") from e
        limit = min(student.config.max_position_embeddings, teacher.config.max_position_embeddings)
        if cfg.dataset.max_seq_len > limit:
            raise UserError(f"dataset.max_seq_len {cfg.dataset.max_seq_len} is over the models' context {limit}")
        self.data = config.instantiate(cfg.dataset, tokenizer)
        self.order = RowOrder(
            len(self.data), cfg.batch_size, self.accumulate, cfg.get("seed", 0), self.rank, self.world
        )
        self.rows_per_step, self.steps_per_epoch = self.order.rows_per_step, self.order.steps_per_epoch
        limits = [cfg.get("max_steps"), cfg.get("epochs") and cfg.epochs * self.steps_per_epoch]
        self.steps = min(n for n in limits if n)

        for part in cfg.get("freeze") or []:
            for name, p in student.named_parameters():
                if any(key in name for key in PARTS[part]):
                    p.requires_grad_(False)
        self.student, self.teacher = Student(student.to(self.device)), Teacher(teacher.to(self.device))
        shard(
            self.student, mesh, self.dtype,
            compute_layers=bool(cfg.get("compile")),
            checkpoint_activations=bool(cfg.get("enable_activation_checkpointing")),
        )  # fmt: skip
        shard(self.teacher, mesh, self.dtype, compute_layers=bool(cfg.get("compile")))
        self.optimizer = config.instantiate(cfg.optimizer, self._parameter_groups())
        self.scheduler = None
        if cfg.get("lr_scheduler"):
            self.scheduler = config.instantiate(
                cfg.lr_scheduler, self.optimizer, num_training_steps=self.steps, last_epoch=-1
            )
        self.checkpoints = Checkpoints(cfg.output_dir, cfg.get("keep_last_n", 2))
        if cfg.get("resume", True):
            self.load_checkpoint()
        self.loggers = []
        if self.rank == 0:
            self.loggers = [config.instantiate(node) for node in cfg.get("metric_loggers") or []]
            for logger in self.loggers:
                if hasattr(logger, "rewind"):
                    logger.rewind(self.step)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Mixers and the rest with rates of their own; no weight decay on vectors and on the mixers' cores."""
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, p in self.student.named_parameters():
            if not p.requires_grad:
                continue
            part = "mixer" if ".mixer." in name else "rest"
            plain = p.dim() < 2 or ".core." in name
            group = groups.setdefault(
                (part, plain), {"params": [], "lr": self.cfg[f"{part}_lr"], **({"weight_decay": 0.0} if plain else {})}
            )
            group["params"].append(p)
        if not groups:
            raise UserError(f"freeze {list(self.cfg.freeze)} leaves nothing to train")
        return list(groups.values())

    def _stop(self, *_: Any) -> None:
        self.stopped = True

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have as the run before: it decides which data a step sees, and the schedule."""
        return {
            "seed": self.cfg.get("seed", 0),
            "rows_per_step": self.rows_per_step,
            "dataset_rows": len(self.data),
            "max_seq_len": self.cfg.dataset.max_seq_len,
            "steps": self.steps,
        }

    def load_checkpoint(self, **_: Any) -> None:
        """Resume from the newest whole checkpoint, if there is one."""
        self.step = self.checkpoints.load_latest(self.student, self.optimizer, self._settings())
        if self.scheduler is not None and self.step:
            # the schedule is a function of the step: no state of its own
            self.scheduler.last_epoch = self.step
            for group, base, scale in zip(
                self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * scale(self.step)
            self.scheduler._last_lr = [g["lr"] for g in self.optimizer.param_groups]
        if self.step and self.rank == 0:
            print(f"resuming after step {self.step} of {self.steps}", flush=True)

    def save_checkpoint(self, **_: Any) -> None:
        """Write training state for this step."""
        self.checkpoints.save(self.step, self.student, self.optimizer, self._settings())

    def export(self) -> None:
        """Write the student as a checkpoint that transformers and vLLM load: output_dir/hybrid."""
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.student, options=full)
        if self.rank == 0:
            tensors = ((name.removeprefix("model."), t.to(self.stored_dtype)) for name, t in state.items())
            out = f"{self.cfg.output_dir}/hybrid"
            save_model(out, self.student.model.config, tensors, self.cfg.student, overwrite=True)
        dist.barrier()

    def _step(self) -> tuple[Tensor, Tensor]:
        """Forward and backward of one step; returns the loss sums over this process's tokens and the gradient norm."""
        # every process knows the whole step's rows: there is nothing to exchange
        counted = max(int(self.data.valid_R[self.order.step_rows(self.step)].sum()), 1)
        sums = torch.zeros(5, device=self.device)
        for rows in self.order.micro_batches(self.step):
            tokens, doc, labels = self.data.batch(rows).to(self.device)
            with torch.no_grad():
                target = self.teacher(tokens, doc)
            losses = self.student(tokens, doc, labels, target, **self.loss)
            (losses.loss / counted).backward()
            sums += torch.stack([v.detach().float() for v in losses])
        sums[:4] /= counted
        trained = [p for p in self.student.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, self.cfg.get("clip_grad_norm") or math.inf)
        return sums, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def train(self, **_: Any) -> None:
        """Run to the last step, or until a signal asks to stop; then save.

        Raises:
            UserError: a loss or gradient norm that is not finite.
        """
        cfg, began, tokens = self.cfg, time.perf_counter(), 0
        every, log_every = cfg.get("checkpoint_every_n_steps") or 0, cfg.get("log_every") or 1
        bar = tqdm(total=self.steps, initial=self.step, desc="distilling", unit="step", disable=self.rank != 0)
        while self.step < self.steps and not self._stop_together():
            sums, norm = self._step()
            # the check costs a wait for the device, so it is made where the metrics are read anyway
            rates = {"lr_mixer": 0.0, "lr_rest": 0.0} | self._rates()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            tokens += self.rows_per_step * cfg.dataset.max_seq_len
            if self.step % log_every == 0 or self.step == self.steps:
                dist.all_reduce(sums)
                loss, kl, ce, agree, count = sums.tolist()
                if not (math.isfinite(loss) and math.isfinite(float(norm))):
                    raise UserError(
                        f"step {self.step}: loss {loss}, gradient norm {float(norm)}; lower mixer_lr and rest_lr "
                        "or set clip_grad_norm"
                    )
                speed = tokens / (time.perf_counter() - began)
                row = {
                    "loss": loss, "kl": kl, "ce": ce, "agreement": agree, "tokens": count,
                    "grad_norm": float(norm), "tokens_per_s": speed, **rates,
                }  # fmt: skip
                if self.device.type == "cuda":
                    row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                for logger in self.loggers:
                    logger.log_dict(row, self.step)
                bar.set_postfix(loss=f"{loss:.4f}", kl=f"{kl:.4f}", tok_s=f"{speed:.0f}", refresh=False)
            bar.update()
            if every and self.step % every == 0 and self.step < self.steps:
                self.save_checkpoint()
        bar.close()
        self.save_checkpoint()
        if self.step == self.steps:
            self.export()

    def _rates(self) -> dict[str, float]:
        names = {self.cfg.mixer_lr: "lr_mixer", self.cfg.rest_lr: "lr_rest"}
        return {names[g.get("initial_lr", g["lr"])]: g["lr"] for g in self.optimizer.param_groups}

    def _stop_together(self) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self.world == 1:
            return self.stopped
        flag = torch.tensor(float(self.stopped))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def cleanup(self, **_: Any) -> None:
        """Close loggers and the process group."""
        for logger in getattr(self, "loggers", []):
            logger.close()
        if dist.is_initialized():
            dist.destroy_process_group()


@config.parse
def main(cfg: DictConfig) -> int:
    """Distil a hybrid: tune run [--nproc_per_node N] distill_hybrid --config FILE [key=value ...]"""
    recipe = None
    try:
        recipe = DistillHybrid(cfg)
        recipe.setup()
        recipe.train()
        done = recipe.step == recipe.steps
    except UserError as e:
        rank = int(os.environ.get("RANK", 0))
        print(f"error{f' (process {rank})' if rank else ''}: {e}", file=sys.stderr, flush=True)
        return 1
    finally:
        if recipe is not None:
            recipe.cleanup()
    if recipe.rank == 0:
        where = f"{cfg.output_dir}/hybrid" if done else f"{cfg.output_dir}/step_{recipe.step}; run again to go on"
        print(f"{'finished' if done else 'stopped'} at step {recipe.step} of {recipe.steps}: {where}", flush=True)
    return 0 if done else 130

"""`distill_hybrid` to be measured: `tune run [--nproc_per_node N] measured --config FILE`.

The same recipe, but each process leaves rank_R.json with what its GPU held, and neither checkpoint nor result is
written after the last step: of an 8B these are 115 GB. In fp32, where losses are compared, PyTorch's deterministic
algorithms are used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from torchtune_recipes.distill_hybrid import DistillHybrid
from torchtune_recipes.recipe import command, run


class Measured(DistillHybrid):
    """Distillation that measures itself."""

    def save_checkpoint(self, **more: Any) -> None:
        if self.step < self.steps:
            super().save_checkpoint(**more)

    def export(self) -> None:
        """After the last step: write what this process's GPU held, in GiB, instead of the result."""
        held = {}
        if self.device.type == "cuda":
            free, whole = torch.cuda.mem_get_info()
            held = {
                "gpu": torch.cuda.get_device_name(),
                "allocated": torch.cuda.max_memory_allocated() / 2**30,
                "used": (whole - free) / 2**30,  # with the allocator's spare blocks, CUDA's own and NCCL's
                "whole": whole / 2**30,
            }
        Path(self.cfg.output_dir, f"rank_{self.rank}.json").write_text(json.dumps(held))


@command
def main(cfg: DictConfig) -> int:
    """See the module."""
    torch.use_deterministic_algorithms(cfg.get("dtype") == "fp32", warn_only=True)
    return run(Measured, cfg)


if __name__ == "__main__":
    sys.exit(main())

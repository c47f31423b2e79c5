"""LoRA's arithmetic on a CPU, for batches in which some requests have no adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class CpuPunica(PunicaWrapperCPU):
    """vLLM's, but tokens without an adapter get none.

    vLLM 0.32 gives them adapter -1 and then indexes with it, which is the last slot's (vllm-project/vllm#49656).
    Here an adapter reads zeros in their place, and so adds zeros.
    """

    def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: Any, scale: float, **kwargs: Any) -> None:
        if not self.no_lora:
            super().add_shrink(y, _kept(x, self.token_lora_indices), lora_a_stacked, scale, **kwargs)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        if not self.no_lora:
            super().add_lora_embedding(y, _kept(x, self.token_lora_indices), lora_b_stacked, add_inputs, **kwargs)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_logits(y, _kept(x, self.sampler_indices), *args, **kwargs)


def _kept(x: Tensor, adapters: Tensor) -> Tensor:
    """x with zeros in the rows that have no adapter."""
    return x.flatten(0, -2).masked_fill((adapters < 0)[:, None], 0)


def choose_punica() -> None:
    """Make vLLM use `CpuPunica` in this process, which serves a hybrid, if it runs on a CPU."""
    if current_platform.is_cpu():
        name = f"{CpuPunica.__module__}.{CpuPunica.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)

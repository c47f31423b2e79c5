"""AdamW whose step torch.compile makes into one pass over parameters, gradients and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw


class CompiledAdamW(torch.optim.AdamW):
    """PyTorch's AdamW, compiled: a step moves the 28 bytes of each fp32 parameter that it must, at memory speed.

    Clipping costs no pass of its own: gradients are divided by `grad_scale` as they are read. FSDP's parameters are
    stepped by their shards.

    Args:
        params: parameters or groups of them.
        lr: learning rate; kept as a tensor, so that a schedule compiles nothing anew.
        betas, eps, weight_decay: as `torch.optim.AdamW`'s.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, arXiv 1711.05101, algorithm 2.

    Example:
        >>> optimizer = CompiledAdamW(model.parameters(), lr=1e-4)  # doctest: +SKIP
        >>> optimizer.grad_scale = norm.clamp(min=1)  # clips to a norm of 1  # doctest: +SKIP
    """

    _step_supports_amp_scaling = True  # PyTorch's sign that a step divides by `grad_scale`
    grad_scale: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        # counts of steps are tensors beside their parameters: the compiler takes no numbers that change
        super().__init__(params, lr, (betas[0], betas[1]), eps, weight_decay, foreach=True, capturable=True)
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        self._compiled = torch.compile(_step, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        if closure is not None:
            raise TypeError("CompiledAdamW takes no closure")
        groups = []
        for group in self.param_groups:
            kinds: list[list[Tensor]] = [[] for _ in range(6)]  # in the order of PyTorch's own step
            self._init_group(group, *kinds)
            kinds = [[t.to_local() if isinstance(t, DTensor) else t for t in kind] for kind in kinds]
            groups.append((kinds, group["lr"], *group["betas"], group["eps"], group["weight_decay"]))
        self._compiled(groups, self.grad_scale)


def _step(groups: list[tuple[Any, ...]], grad_scale: Tensor | None) -> None:
    # eagerly (the planner's way) PyTorch takes a rate that is a tensor on one parameter at a time only
    compiled = torch.compiler.is_compiling()
    for (params, grads, averages, squares, maxima, counts), lr, beta1, beta2, eps, weight_decay in groups:
        if grad_scale is not None:
            grads = torch._foreach_mul(grads, 1 / grad_scale)
        adamw(
            params, grads, averages, squares, maxima, counts, foreach=compiled, capturable=compiled, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
        )  # fmt: skip

"""Who takes part in the training benchmark: forward and backward of one layer's scan over whole sequences.

Shapes: b sequences, L tokens of each, H query heads, G key/value heads, S state heads, P = N = WIDTH.

The peers know one state per query head and take x and B repeated to H heads. A model that has them per group must
repeat them, and the gradients are summed back: that is timed, and once more without, on inputs repeated beforehand.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import peers
import torch
from gate import must_match
from mamba_hybrid_kernels import ssd
from steps import DEVICE, GROUPS, HEADS, WIDTH

SEQUENCES, LENGTH = 8, 2048
# tolerances relative to the largest value; the gradient of A sums over every token
OUTPUT, GRADIENT, GRADIENT_OF_A = 1e-2, 2e-2, 1e-1
NAMES = ("x", "dt", "A", "B", "C", "D")


@dataclass
class Inputs:
    """Leaves in the order of NAMES, and the gradient of the output: x (b, L, G, P), dt (b, L, S) after softplus and
    fp32, A (S,), B (b, L, G, N), C (b, L, H, N), D (H,), dy (b, L, H, P)."""

    leaves: list[torch.Tensor]
    dy: torch.Tensor

    @classmethod
    def draw(cls, sequences: int, length: int, state_heads: int) -> Inputs:
        """Values of a trained layer's order of magnitude."""

        def rows(heads: int) -> torch.Tensor:
            return torch.randn(sequences, length, heads, WIDTH, device=DEVICE).bfloat16()

        dt = torch.rand(sequences, length, state_heads, device=DEVICE) * 0.2
        A = -torch.rand(state_heads, device=DEVICE) - 0.1
        leaves = [rows(GROUPS), dt, A, rows(GROUPS), rows(HEADS), torch.randn(HEADS, device=DEVICE)]
        return cls([t.requires_grad_() for t in leaves], rows(HEADS))

    def repeated(self) -> Inputs:
        """The same with x and B repeated to H heads beforehand."""
        x, dt, A, B, C, D = self.leaves
        x, B = (t.detach().repeat_interleave(HEADS // GROUPS, 2).requires_grad_() for t in (x, B))
        return Inputs([x, dt, A, B, C, D], self.dy)

    def float(self) -> Inputs:
        """The same in fp32."""
        return Inputs([t.detach().float().requires_grad_() for t in self.leaves], self.dy.float())


class Trainer(ABC):
    """One system's scan."""

    name: str
    how: str
    state_heads = HEADS
    delay = 0

    @abstractmethod
    def forward(self, x, dt, A, B, C, D) -> torch.Tensor:
        """y (b, L, H, P)."""

    def allowed(self) -> contextlib.AbstractContextManager:
        """A context in which the backward runs."""
        return contextlib.nullcontext()

    def step(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Forward and backward; y and the gradients."""
        with self.allowed():
            y = self.forward(*inputs.leaves)
            return y, *torch.autograd.grad(y, inputs.leaves, inputs.dy)

    def check(self) -> None:
        """Raise Wrong where outputs or gradients of one sequence are not the fp32 reference's."""
        inputs = Inputs.draw(1, LENGTH, self.state_heads)
        wanted = inputs.float()
        y, *_ = ssd(*wanted.leaves, delay=self.delay, backend="reference")
        want = torch.autograd.grad(y, wanted.leaves, wanted.dy)
        got_y, *got = self.step(inputs)
        must_match("y", got_y.detach(), y.detach(), OUTPUT)
        for name, mine, his in zip(NAMES, got, want, strict=True):
            must_match(f"the gradient of {name}", mine, his, GRADIENT_OF_A if name == "A" else GRADIENT)


class OurTrainer(Trainer):
    """`ssd` in Triton."""

    how = "triton"

    def __init__(self, state_heads: int, delay: int) -> None:
        self.state_heads, self.delay = state_heads, delay
        self.name = f"ours S={state_heads} delay={delay}"

    def forward(self, x, dt, A, B, C, D) -> torch.Tensor:
        return ssd(x, dt, A, B, C, D, delay=self.delay, backend="triton")[0]


def to_heads(t: torch.Tensor) -> torch.Tensor:
    """(b, L, G, .) repeated to H heads; H heads stay."""
    return t if t.shape[2] == HEADS else t.repeat_interleave(HEADS // t.shape[2], 2)


class MambaTrainer(Trainer):
    """mamba-ssm's chunked scan."""

    name = "mamba-ssm"

    def __init__(self, chunk: int) -> None:
        self.chunk, self.how = chunk, f"chunk {chunk}"

    def forward(self, x, dt, A, B, C, D) -> torch.Tensor:
        return peers.mamba_ssm_scan(to_heads(x), dt, A, to_heads(B), C, D, self.chunk)


class FlaTrainer(Trainer):
    """fla's chunk_simple_gla, which has no D and takes x times dt."""

    name, how = "fla", "chunk_simple_gla, unguarded"

    def forward(self, x, dt, A, B, C, D) -> torch.Tensor:
        x = to_heads(x)
        o = peers.fla_simple_gla(C, to_heads(B), (x * dt[..., None]).to(x.dtype), dt * A)
        return (o + D[:, None] * x).to(x.dtype)

    def allowed(self) -> contextlib.AbstractContextManager:
        return peers.fla_unguarded()


OURS = [OurTrainer(S, delay) for delay in (0, 64) for S in (HEADS, GROUPS)]
PEERS = [MambaTrainer(128), MambaTrainer(256), FlaTrainer()]

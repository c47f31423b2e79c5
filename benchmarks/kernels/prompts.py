"""Who takes part in the prefill benchmark: one prompt through one layer.

Shapes: L tokens of the prompt, H query heads, G key/value heads, S state heads, P = N = WIDTH, w the window.

vLLM's kernel knows one state per query head and takes x and B repeated to H heads, which is timed and once more not.
It has no window: ours with one does more work than what it is compared with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import peers
import torch
from gate import must_match
from mamba_hybrid_kernels import SlotLayout, SlotTensors, ssd, window_attention
from mamba_hybrid_kernels.prefill import prefill
from steps import DEVICE, GROUPS, HEADS, WIDTH

CHECKED = 2048  # tokens of a check
OUTPUT, STATE, PEER = 1e-2, 1e-3, 2e-2  # tolerances relative to the largest value


def prompt(length: int, state_heads: int) -> tuple[torch.Tensor, ...]:
    """x (L, G, P), dt (L, S) after softplus, A (S,), B (L, G, N), C (L, H, N), D (H,)."""
    x, B = (torch.randn(length, GROUPS, WIDTH, device=DEVICE).bfloat16() for _ in range(2))
    C = torch.randn(length, HEADS, WIDTH, device=DEVICE).bfloat16()
    dt = torch.rand(length, state_heads, device=DEVICE) * 0.2
    return x, dt, -torch.rand(state_heads, device=DEVICE) - 0.1, B, C, torch.randn(HEADS, device=DEVICE)


def reference(inputs: tuple[torch.Tensor, ...], tokens: int | None = None, delay: int = 0) -> tuple[torch.Tensor, ...]:
    """y (L, H, P) and the state (S, P, N) after the first tokens, in fp32."""
    x, dt, A, B, C, D = inputs
    x, dt, B, C = (t[None, :tokens].float() for t in (x, dt, B, C))
    y, state = ssd(x, dt, A, B, C, D, delay=delay, backend="reference")
    return y[0], state[0]


class Prefiller(ABC):
    """One system on a prompt.

    Args:
        length: L.
    """

    name: str
    how: str

    @abstractmethod
    def __init__(self, length: int) -> None: ...

    @abstractmethod
    def call(self) -> None:
        """The prefill, from inputs per group."""

    def call_repeated(self) -> None:
        """The same on inputs repeated beforehand."""
        self.call()

    @abstractmethod
    def check(self) -> None:
        """Raise Wrong where outputs or state are not the fp32 reference's."""


class OurPrefiller(Prefiller):
    """`prefill` of a slot."""

    how = "triton"
    state_heads: int
    window: int

    def __init__(self, length: int) -> None:
        self.layout = SlotLayout(GROUPS, self.state_heads, HEADS, WIDTH, WIDTH, self.window, dtype=torch.bfloat16)
        self.slots = SlotTensors.allocate(self.layout, 1, DEVICE)
        self.length, self.inputs = length, prompt(length, self.state_heads)
        self.slot = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.start = torch.zeros_like(self.slot)
        self.first = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
        self.far = torch.empty(length, HEADS, WIDTH, dtype=torch.bfloat16, device=DEVICE)
        self.near = torch.empty_like(self.far) if self.window else None

    def call(self) -> None:
        prefill(
            self.slots, self.layout, self.slot, self.start, self.first, [self.length], *self.inputs,
            near_MHP=self.near, far_MHP=self.far,
        )  # fmt: skip

    def check(self) -> None:
        self.call()
        x, dt, A, B, C, D = self.inputs
        far, _ = reference(self.inputs, delay=self.window)
        must_match("far", self.far, far, OUTPUT)
        if self.near is not None:
            near = window_attention(C[None].float(), B[None].float(), x[None].float(), self.window)[0]
            must_match("near", self.near, near, OUTPUT)
        held = self.length - self.layout.rewind - self.window  # by the rule in `slot.py`, for a prompt longer than that
        must_match("the position", self.slots.position, torch.full_like(self.slots.position, held), 0)
        must_match("the state", self.slots.state[0], reference(self.inputs, held)[1], STATE)
        kept = torch.arange(self.length - self.layout.ring, self.length, device=DEVICE)
        for name, ring, new in (("x", self.slots.x, x), ("B", self.slots.b, B), ("dt", self.slots.dt, dt)):
            must_match(f"the ring of {name}", ring[0, kept % self.layout.ring], new[kept], 0)


def ours(heads: int, win: int) -> type[OurPrefiller]:
    """The prefill with so many state heads and that window."""

    class Variant(OurPrefiller):
        name = f"ours S={heads} w={win}"
        state_heads, window = heads, win

    return Variant


class VllmPrefiller(Prefiller):
    """vLLM's mamba_chunk_scan_combined_varlen."""

    name = "vllm"
    chunk: int

    def __init__(self, length: int) -> None:
        self.inputs = prompt(length, HEADS)
        x, _, _, B, _, _ = self.inputs
        self.heads = self.repeat(x, B)
        self.metadata = peers.vllm_chunk_metadata([length], self.chunk, DEVICE)
        self.out = torch.empty(length, HEADS, WIDTH, dtype=torch.bfloat16, device=DEVICE)

    @staticmethod
    def repeat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.repeat_interleave(HEADS // GROUPS, 1) for t in tensors]

    def run(self, x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        _, dt, A, _, C, D = self.inputs
        return peers.vllm_prefill(x, dt, A, B, C, D, self.out, self.metadata, self.chunk)

    def call(self) -> None:
        x, _, _, B, _, _ = self.inputs
        self.run(*self.repeat(x, B))

    def call_repeated(self) -> None:
        self.run(*self.heads)

    def check(self) -> None:
        state = self.run(*self.heads)
        y, want = reference(self.inputs)
        must_match("the output", self.out, y, PEER)
        must_match("the state", state[0], want, PEER)


def vllm(rows: int) -> type[VllmPrefiller]:
    """vLLM's prefill with chunks of so many rows."""

    class Variant(VllmPrefiller):
        how = f"chunk {rows}"
        chunk = rows

    return Variant


OURS = [ours(S, w) for w in (0, 64) for S in (HEADS, GROUPS)]
PEERS = [vllm(chunk) for chunk in (128, 256)]

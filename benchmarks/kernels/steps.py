"""A steady state of decode or verify steps: slots, positions and inputs of one case of the verify benchmark."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from functools import cached_property

import torch
from mamba_hybrid_kernels import SlotLayout, SlotTensors

DEVICE = "cuda"
ACCEPT = 0.8  # probability that a drafted token is accepted, given that the one before it was
COLD = 600 << 20  # bytes that a graph's calls touch together, over ten times the L2 of an H100
SAMPLE = 2048  # rows drawn of a stationary distribution; more rows repeat them
HEADS, GROUPS, WIDTH = 32, 8, 128  # of the 8B's layers: H, G and P = N
ALIGNED = 16  # int32 in a row of slots, so that every row begins where Triton's aligned variants may be used


def advance(rng: random.Random, tokens: int) -> int:
    """Tokens that a verify step yields: the accepted drafts and one more."""
    accepted = 0
    while accepted < tokens - 1 and rng.random() < ACCEPT:
        accepted += 1
    return accepted + 1


@functools.cache
def _sample(layout: SlotLayout, tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    result = []
    for _ in range(SAMPLE):
        start, c = 10 * layout.ring, 10 * layout.ring - layout.window - layout.rewind
        for _ in range(60 + rng.randrange(60)):
            end = start + tokens
            if end + layout.step - c > layout.ring:
                c = end - layout.rewind - layout.window
            start += advance(rng, tokens)
        result.append(start - c)
    return result


def lags(layout: SlotLayout, tokens: int, rows: int, seed: int = 0) -> list[int]:
    """start - c of rows drawn from the stationary distribution of a decode, by the rule in `slot.py`."""
    sample = _sample(layout, tokens, seed)
    return [sample[i % SAMPLE] for i in range(rows)]


def spread(values: list[int], count: int) -> list[int]:
    """So many quantiles of the values, least and most included."""
    ordered = sorted(values)
    return [ordered[i * (len(ordered) - 1) // max(count - 1, 1)] for i in range(count)]


def sets_for(bytes_of_set: int) -> int:
    """Disjoint sets of slots that a graph walks through, so that it finds none of them in L2."""
    return max(2, -(-COLD // bytes_of_set))


def slot_rows(sets: int, rows: int, live: int, *, first: int, absent: int) -> torch.Tensor:
    """(sets, rows) int32 slots: `live` of each set in random order from `first` on, `absent` in the other rows."""
    room = -(-rows // ALIGNED) * ALIGNED
    slot = torch.full((sets, room), absent, dtype=torch.int32, device=DEVICE)
    slot[:, :live] = first + torch.randperm(sets * live, device=DEVICE).int().view(sets, live)
    return slot[:, :rows]


@dataclass(frozen=True)
class Step:
    """One case at the 8B shapes.

    Args:
        rows: sequences of the batch.
        tokens: of each row.
        state_heads: S, between 8 (per KV group) and 32 (per query head).
        window: tokens of attention.
        ring: rows of the ring, a multiple of 16; None for the layout's own.
        state_dtype: of the state.
        live: rows of each set that have a slot, the others are padding; None for all, drawn as they come. With a
            number the slots' positions are spread over all that occur, those that flush included.
        count: disjoint sets of slots; None for as many as keep L2 cold.
    """

    rows: int
    tokens: int
    state_heads: int
    window: int
    ring: int | None = None
    state_dtype: torch.dtype = torch.float32
    groups: int = GROUPS
    heads: int = HEADS
    width: int = WIDTH
    live: int | None = None
    count: int | None = None

    @cached_property
    def layout(self) -> SlotLayout:
        rewind = self.tokens if self.tokens > 1 else 0
        slack = {} if self.ring is None else {"slack": self.ring - self.window - rewind - self.tokens}
        if slack and (slack["slack"] < 0 or self.ring % 16):
            least = self.window + rewind + self.tokens
            raise ValueError(f"a ring of {self.ring} rows must be a multiple of 16 and at least {least}")
        return SlotLayout(
            self.groups, self.state_heads, self.heads, self.width, self.width, self.window,
            dtype=torch.bfloat16, state_dtype=self.state_dtype, step=self.tokens, rewind=rewind, **slack,
        )  # fmt: skip

    @cached_property
    def sets(self) -> int:
        """Disjoint sets of slots that a graph walks through."""
        return sets_for(self.rows * self.layout.bytes()) if self.count is None else self.count

    @cached_property
    def live_rows(self) -> int:
        """Rows of a set that have a slot."""
        return self.rows if self.live is None else self.live

    @cached_property
    def lags(self) -> list[int]:
        """start - c of every slot."""
        slots = self.live_rows * self.sets
        if self.live is None:
            return lags(self.layout, self.tokens, slots)
        return spread(lags(self.layout, self.tokens, SAMPLE), slots)

    def flushes(self, lag: int) -> bool:
        """Whether a row of that start - c flushes in this step."""
        return lag + self.tokens + self.layout.step > self.layout.ring

    @property
    def flushing(self) -> float:
        """Share of the rows that flush."""
        return sum(map(self.flushes, self.lags)) / len(self.lags)

    @property
    def bytes(self) -> float:
        """Bytes that a step has to move: state, ring rows read, tokens in and out, and the flushed states."""
        layout, b = self.layout, 2
        state = layout.state_heads * self.width**2 * self.state_dtype.itemsize
        live = sum(self.lags) / len(self.lags)
        row = self.groups * 2 * self.width * b + layout.state_heads * 4
        outputs = 2 if self.window else 1
        token = 2 * row + self.heads * self.width * b * (1 + outputs)  # read x, B, dt, C; write a ring row and outputs
        return self.rows * (state * (1 + self.flushing) + live * row + self.tokens * token)

    def inputs(self, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
        """x, dt, A, B, C and D of a step."""
        M, G, H, W = self.rows * self.tokens, self.groups, self.heads, self.width
        x, B = (torch.randn(M, G, W, device=DEVICE).to(dtype) for _ in range(2))
        C = torch.randn(M, H, W, device=DEVICE).to(dtype)
        dt = torch.rand(M, self.state_heads, device=DEVICE)
        return x, dt, -torch.rand(self.state_heads, device=DEVICE) * 0.2, B, C, torch.randn(H, device=DEVICE)

    @property
    def start(self) -> int:
        """Position of every row's first token; the slots' positions differ by their lags."""
        return 10 * self.layout.ring

    def slots(self) -> SlotTensors:
        """Filled slots of all sets at the positions of the steady state."""
        held = self.lags or [self.layout.window + self.layout.rewind]  # without live rows one that nothing reads
        slots = SlotTensors.allocate(self.layout, len(held), DEVICE)
        for t in (slots.state, slots.x, slots.b):
            t.normal_()
        slots.dt.uniform_()
        slots.position[:] = (self.start - torch.tensor(held, device=DEVICE, dtype=torch.int32))[:, None, None]
        return slots

    def rows_of(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """slot (sets, R), start (R) and first token (R + 1) of the rows, on the device."""
        slot = slot_rows(self.sets, self.rows, self.live_rows, first=0, absent=-1)
        start = torch.full((self.rows,), self.start, device=DEVICE, dtype=torch.int32)
        first = torch.arange(self.rows + 1, device=DEVICE, dtype=torch.int32).clamp(max=self.live_rows) * self.tokens
        return slot, start, first

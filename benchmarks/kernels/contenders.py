"""Who takes part in the verify benchmark: this project's kernel and its peers, each with its check.

Shapes: B rows of the batch, T tokens of each, M = B T tokens, H query heads, P = N = WIDTH, R rows of a peer's ring.

A contender is built for a batch on disjoint sets of slots; its ways are the launches or algorithms that it can be run
in. With `live` rows fewer than the batch the others are padding: so a check of a few rows runs the very launch that
the batch is timed with, and a contender without live rows only compiles.

What each is given: the peers know one state per query head, x, B and C are handed to them repeated to H heads, which
is not timed. They apply bias and softplus to dt; ours takes dt with both applied.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator

import peers
import torch
from gate import must_match
from mamba_hybrid_kernels import SlotTensors, StepRows, replay
from mamba_hybrid_kernels.verify import verify
from steps import DEVICE, HEADS, SAMPLE, WIDTH, Step, advance, sets_for, slot_rows, spread

CHECKED = 12  # rows of a check
# rows of the ring by (state heads, window, tokens); where a case is missing, the layout's own
RINGS: dict[tuple[int, int, int], int] = {}
OUTPUTS, STATE = 1e-2, 1e-3  # what ours may be off by, relative to the largest value
PEERS = 2e-2  # what a peer may be off by
STATE_BYTES = HEADS * WIDTH * WIDTH * 4  # of a sequence with one fp32 state per query head
TOKEN_BYTES = HEADS * (4 * WIDTH * 2 + 2)  # x, B, C and dt of a token in, its output out
MOST_BYTES = 40 << 30  # of the slots of one contender


class Contender(ABC):
    """One system on a batch.

    Args:
        batch: B.
        tokens: T.
        live: rows of a set that have a slot, the others are padding; None for all.
        sets: disjoint sets of slots; None for as many as keep L2 cold.
    """

    name: str
    ways: dict[str, object]
    sets: int

    @abstractmethod
    def __init__(self, batch: int, tokens: int, live: int | None = None, sets: int | None = None) -> None: ...

    @abstractmethod
    def call(self, i: int, way: str) -> None:
        """The step of the i-th set."""

    @abstractmethod
    def check(self, way: str) -> None:
        """Run every set and raise Wrong where outputs or slots are not the reference's."""

    def reset(self) -> None:  # noqa: B027
        """Undo what a step moved, so that it can be run again."""

    @classmethod
    def serves(cls, tokens: int) -> bool:
        """Whether the system has steps of so many tokens."""
        return True

    @property
    @abstractmethod
    def bytes(self) -> float:
        """Bytes that a step has to move."""

    @property
    def flushing(self) -> float | None:
        """Share of the rows that write their state, None where that is not up to the rows."""
        return None


def checking(batch: int) -> dict[str, int]:
    """live and sets of a check of about CHECKED rows."""
    live = min(batch, CHECKED)
    return {"live": live, "sets": -(-CHECKED // live)}


class Ours(Contender):
    """The verify kernel with the launch that the committed table has for the case."""

    ways = {"launch table": None}
    state_heads: int
    window: int

    def __init__(self, batch: int, tokens: int, live: int | None = None, sets: int | None = None) -> None:
        ring = RINGS.get((self.state_heads, self.window, tokens))
        self.step = Step(batch, tokens, self.state_heads, self.window, ring, live=live, count=sets)
        self.sets = self.step.sets
        self.slots, self.inputs = self.step.slots(), self.step.inputs()
        self.slot, self.start, self.first = self.step.rows_of()
        self.far = torch.empty(batch * tokens, HEADS, WIDTH, dtype=torch.bfloat16, device=DEVICE)
        self.near = torch.empty_like(self.far) if self.window else None
        self.position = self.slots.position.clone()

    def call(self, i: int, way: str) -> None:
        verify(
            self.slots, self.step.layout, self.slot[i], self.start, self.first, *self.inputs,
            max_tokens=self.step.tokens, near_MHP=self.near, far_MHP=self.far,
        )  # fmt: skip

    def reset(self) -> None:
        self.slots.position.copy_(self.position)

    def check(self, way: str) -> None:
        live, T = self.step.live_rows, self.step.tokens
        x, dt, A, B, C, D = self.inputs
        span = slice(0, live * T)
        want = SlotTensors(**{name: t.clone() for name, t in vars(self.slots).items() if t is not None})
        for i in range(self.sets):
            self.call(i, way)
            slot = self.slot[i, :live].tolist()
            near, far = replay(
                want, self.step.layout, StepRows.of(slot, [self.step.start] * live, [T] * live, DEVICE),
                x[span], dt[span], A, B[span], C[span], D, backend="reference",
            )  # fmt: skip
            must_match("far", self.far[span], far, OUTPUTS)
            if self.near is not None:
                must_match("near", self.near[span], near, OUTPUTS)
        for name, t in vars(want).items():
            if t is not None:
                must_match(name, vars(self.slots)[name], t, STATE if name == "state" else 0)

    @property
    def bytes(self) -> float:
        return self.step.bytes

    @property
    def flushing(self) -> float:
        return self.step.flushing


def ours(heads: int, win: int) -> type[Ours]:
    """The contender with so many state heads and that window."""

    class Variant(Ours):
        name = f"ours S={heads} w={win}"
        state_heads, window = heads, win

    return Variant


def recurrence(state, x, dt, A, B, C, D) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence token by token in fp32.

    Args:
        state (b, H, P, N), x (b, t, H, P), dt (b, t, H) after softplus, A (H,), B and C (b, t, H, N), D (H,).

    Returns:
        y (b, t, H, P) and the states after every token (b, t, H, P, N).
    """
    state, ys, states = state.float(), [], []
    for t in range(x.shape[1]):
        keep = (dt[:, t] * A).exp()[..., None, None]
        state = state * keep + (dt[:, t, :, None] * x[:, t].float())[..., None] * B[:, t].float()[..., None, :]
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t].float()) + D.float()[:, None] * x[:, t].float())
        states.append(state)
    return torch.stack(ys, 1), torch.stack(states, 1)


class Peer(Contender):
    """What the peers share: inputs with one state per query head, slots from 1 on (0 is their null slot)."""

    def __init__(self, batch: int, tokens: int, live: int | None = None, sets: int | None = None) -> None:
        self.batch, self.tokens = batch, tokens
        self.live = batch if live is None else live
        if sets is None:
            size = batch * self.slot_bytes
            sets = sets_for(size) if 2 * size <= MOST_BYTES else 1
        self.sets = sets
        B, T, H = batch, tokens, HEADS
        self.x, self.B, self.C = (torch.randn(B, T, H, WIDTH, device=DEVICE).bfloat16() for _ in range(3))
        self.dt = torch.randn(B, T, H, device=DEVICE).bfloat16()
        self.out = torch.empty_like(self.x)
        self.A = -torch.rand(H, device=DEVICE) - 0.1
        self.D, bias = torch.randn(H, device=DEVICE).bfloat16(), (torch.randn(H, device=DEVICE) * 0.5).bfloat16()
        self.step_sizes = torch.nn.functional.softplus(self.dt.float() + bias.float())
        self.A_HPN, self.D_HP = self.A[:, None, None].expand(H, WIDTH, WIDTH), self.D[:, None].expand(H, WIDTH)
        self.bias_HP, self.dt_BTHP = bias[:, None].expand(H, WIDTH), self.dt[..., None].expand(B, T, H, WIDTH)

    @property
    def slot_bytes(self) -> int:
        """Bytes that a sequence keeps."""
        return STATE_BYTES

    def states(self, slots: int) -> torch.Tensor:
        """(1 + slots, H, P, N) fp32 states."""
        return torch.empty(1 + slots, HEADS, WIDTH, WIDTH, device=DEVICE).normal_()

    def reference(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`recurrence` of this step's live rows from these states."""
        n = self.live
        return recurrence(state, self.x[:n], self.step_sizes[:n], self.A, self.B[:n], self.C[:n], self.D)


class Plain(Peer):
    """vLLM's update of one token without speculation, whatever the case's T: what a step costs without drafts."""

    name = "vllm plain"
    ways = {
        "default": None,
        **{f"BLOCK_SIZE_M {m} warps {w}": (m, w) for m, w in ((4, 4), (8, 4), (16, 4), (32, 4), (8, 2), (16, 8))},
    }

    def __init__(self, batch: int, tokens: int, live: int | None = None, sets: int | None = None) -> None:
        super().__init__(batch, 1, live, sets)
        self.state = self.states(self.live * self.sets)
        self.slot = slot_rows(self.sets, batch, self.live, first=1, absent=peers.NULL_SLOT)

    def call(self, i: int, way: str) -> None:
        peers.vllm_update(
            self.state, self.x[:, 0], self.dt_BTHP[:, 0], self.A_HPN, self.B[:, 0], self.C[:, 0], self.D_HP,
            self.bias_HP, self.slot[i], self.out[:, 0], config=self.ways[way],
        )  # fmt: skip

    def check(self, way: str) -> None:
        for i in range(self.sets):
            slot = self.slot[i, : self.live].long()
            y, states = self.reference(self.state[slot])
            self.call(i, way)
            must_match("the output", self.out[: self.live], y, PEERS)
            must_match("the state", self.state[slot], states[:, 0], PEERS)

    @property
    def bytes(self) -> float:
        return self.batch * (2 * STATE_BYTES + TOKEN_BYTES)


class Speculative(Peer):
    """vLLM's update of T tokens, which stores the state after every one of them."""

    name = "vllm speculative"
    ways = {"default": None}

    def __init__(self, batch: int, tokens: int, live: int | None = None, sets: int | None = None) -> None:
        super().__init__(batch, tokens, live, sets)
        self.state = self.states(self.live * self.sets * tokens)
        slot = slot_rows(self.sets, batch * tokens, self.live * tokens, first=1, absent=peers.NULL_SLOT)
        self.slot = [row.view(batch, tokens) for row in slot]
        rng = random.Random(0)
        accepted = [advance(rng, tokens) for _ in range(batch)]
        self.accepted = torch.tensor(accepted, dtype=torch.int32, device=DEVICE)
        self.first = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * tokens

    @classmethod
    def serves(cls, tokens: int) -> bool:
        return tokens > 1

    @property
    def slot_bytes(self) -> int:
        return self.tokens * STATE_BYTES

    def call(self, i: int, way: str) -> None:
        x, B, C, dt, out = (t.flatten(0, 1) for t in (self.x, self.B, self.C, self.dt, self.out))
        dt_MHP = dt[..., None].expand(-1, HEADS, WIDTH)
        peers.vllm_verify(
            self.state, x, dt_MHP, self.A_HPN, B, C, self.D_HP, self.bias_HP,
            self.slot[i], self.accepted, self.first, out,
        )  # fmt: skip

    def check(self, way: str) -> None:
        for i in range(self.sets):
            slot = self.slot[i][: self.live].long()
            begin = slot.gather(1, self.accepted[: self.live, None].long() - 1)[:, 0]
            y, states = self.reference(self.state[begin])
            self.call(i, way)
            must_match("the outputs", self.out[: self.live], y, PEERS)
            must_match("the states", self.state[slot], states, PEERS)

    @property
    def bytes(self) -> float:
        return self.batch * ((1 + self.tokens) * STATE_BYTES + self.tokens * TOKEN_BYTES)


@functools.cache
def live_tokens(tokens: int, window: int, seed: int = 0) -> list[int]:
    """FlashInfer's prev_accepted of SAMPLE rows drawn from its stationary distribution: a row flushes iff
    prev_accepted + T exceeds the window, and then keeps what was accepted of this step only."""
    rng = random.Random(seed)
    result = []
    for _ in range(SAMPLE):
        live = 0
        for _ in range(60 + rng.randrange(60)):
            live = advance(rng, tokens) + (0 if live + tokens > window else live)
        result.append(live)
    return result


@contextlib.contextmanager
def environment(name: str, value: int) -> Iterator[None]:
    """An environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class FlashInfer(Peer):
    """FlashInfer's checkpointing_ssu with its widest window, in every algorithm."""

    name = "flashinfer"
    window = 16
    # algorithm, d_split and pipeline stages of the main kernel
    ways = {
        "monolith d_split 1": ("monolith", 1, 1),
        "monolith d_split 2": ("monolith", 2, 1),
        "two-kernel stages 1": ("two-kernel", None, 1),
        "two-kernel stages 2": ("two-kernel", None, 2),
    }

    def __init__(self, batch: int, tokens: int, live: int | None = None, sets: int | None = None) -> None:
        self.ring = self.window + tokens
        super().__init__(batch, tokens, live, sets)
        n, R = self.live * self.sets, self.ring
        self.state = self.states(n)
        self.x_ring, self.B_ring = (
            torch.randn(1 + n, HEADS, R, WIDTH, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
        )
        self.dt_ring = torch.rand(1 + n, HEADS, R, device=DEVICE)
        # with a number of live rows, a check, all that occur
        drawn = live_tokens(tokens, self.window)
        self.held = [drawn[i % SAMPLE] for i in range(n)] if live is None else spread(drawn, n)
        self.prev_accepted = torch.tensor([0, *self.held], dtype=torch.int32, device=DEVICE)
        self.ring_start = torch.randint(R, (1 + n,), dtype=torch.int32, device=DEVICE)
        self.slot = slot_rows(self.sets, batch, self.live, first=1, absent=peers.NULL_SLOT)
        self.scratch = peers.flashinfer_scratch(batch, HEADS, tokens, self.window, DEVICE)

    @property
    def slot_bytes(self) -> int:
        return STATE_BYTES + self.ring * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a ring row: x and B of every head, dt in fp32."""
        return HEADS * (2 * WIDTH * 2 + 4)

    def call(self, i: int, way: str) -> None:
        algorithm, d_split, stages = self.ways[way]
        with environment("FLASHINFER_SSU_MAIN_PIPELINE_STAGES", stages):
            peers.flashinfer_update(
                self.state, self.x_ring, self.B_ring, self.dt_ring, self.ring_start, self.prev_accepted,
                self.x, self.dt_BTHP, self.A_HPN, self.B, self.C, self.out, D=self.D_HP, dt_bias=self.bias_HP,
                slots=self.slot[i], scratch=None if algorithm == "monolith" else self.scratch,
                algorithm=algorithm, d_split=d_split,
            )  # fmt: skip

    def check(self, way: str) -> None:
        for i in range(self.sets):
            slot = self.slot[i, : self.live].long()
            held = self.prev_accepted[slot]
            place = (self.ring_start[slot].long()[:, None] + torch.arange(self.window, device=DEVICE)) % self.ring
            x, B = (t[slot[:, None], :, place] for t in (self.x_ring, self.B_ring))  # b window H .
            dt = self.dt_ring[slot[:, None], :, place]
            dt = torch.where(torch.arange(self.window, device=DEVICE)[:, None] < held[:, None, None], dt, 0)
            before = self.state[slot]
            _, states = recurrence(before, x, dt, self.A, B, B, self.D)
            y, _ = self.reference(states[:, -1])
            flushes = (held + self.tokens > self.window)[:, None, None, None]
            self.call(i, way)
            must_match("the outputs", self.out[: self.live], y, PEERS)
            must_match("the state", self.state[slot], torch.where(flushes, states[:, -1], before), PEERS)

    @property
    def flushing(self) -> float:
        return sum(held + self.tokens > self.window for held in self.held) / len(self.held)

    @property
    def bytes(self) -> float:
        live = sum(self.held) / len(self.held)
        tokens = self.tokens * (TOKEN_BYTES + self.row_bytes)
        return self.batch * (STATE_BYTES * (1 + self.flushing) + live * self.row_bytes + tokens)


CONTENDERS: list[type[Contender]] = [ours(S, w) for w in (0, 64) for S in (32, 8)] + [Plain, Speculative, FlashInfer]

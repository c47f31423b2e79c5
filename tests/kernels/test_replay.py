"""A fuzz of the step against whole sequences: random arrivals, lengths, prefill chunks, rejected drafts, rewinds,
recycled slots, poisoned memory."""

import random

import pytest
import torch
from mamba_hybrid_kernels import SlotLayout, SlotTensors, StepRows, delay, replay

from .naive import naive_ssd, naive_window

LENGTH = 400


def poisoned(layout: SlotLayout, slots: int) -> SlotTensors:
    tensors = SlotTensors.allocate(layout, slots)
    for t in vars(tensors).values():
        if t is not None:
            t.fill_(float("nan") if t.is_floating_point() else 12345)
    return tensors


class Sequence:
    """Random inputs and what every position must put out."""

    def __init__(self, layout: SlotLayout, A, D, prompt: int) -> None:
        G, S, H, P, N, w = (
            layout.groups, layout.state_heads, layout.query_heads, layout.head_dim, layout.state_size, layout.window,
        )  # fmt: skip
        self.data = (
            torch.randn(LENGTH, G, P),
            torch.rand(LENGTH, S),
            torch.randn(LENGTH, G, N),
            torch.randn(LENGTH, H, N),
        )
        x, dt, B, C = (t[None].double() for t in self.data)
        self.far = naive_ssd(delay(x, w), delay(dt, w), A.double(), delay(B, w), C, D.double())[0][0]
        self.near = naive_window(C, B, x, w)[0] if w else None
        self.prompt, self.position = prompt, 0

    def step(self, rng: random.Random, most: int) -> tuple[int, int]:
        """(tokens, accepted) of the next step: a chunk of the prompt, or a verify step with a rejected tail."""
        if self.position < self.prompt:
            tokens = min(self.prompt - self.position, rng.choice([1, 7, 64]))
            return tokens, tokens
        tokens = rng.randint(1, most)
        return tokens, rng.randint(1, tokens)

    def inputs(self, tokens: int, accepted: int) -> list[torch.Tensor]:
        rows = [t[self.position : self.position + tokens].clone() for t in self.data]
        for row in rows:
            row[accepted:] = torch.rand_like(row[accepted:]) * 3  # drafts that the target will not agree with
        return rows


@pytest.mark.parametrize("seed", range(24))
def test_fuzz_against_whole_sequences(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    G, per_group, per_state = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 3])
    drafts = rng.choice([0, 0, 2, 4, 7])
    layout = SlotLayout(
        G, G * per_group, G * per_group * per_state, 8, 8, rng.choice([0, 1, 4, 16, 64]),
        step=drafts + 1, rewind=drafts + 1 if drafts else 0, slack=rng.choice([0, 15]),
    )  # fmt: skip
    slots, free, running = poisoned(layout, 5), list(range(5)), {}
    A, D = -torch.rand(layout.state_heads) * 0.3, torch.randn(layout.query_heads)
    checked = 0
    for _ in range(60):
        while free and rng.random() < 0.4:
            slot = free.pop(rng.randrange(len(free)))
            running[slot] = Sequence(layout, A, D, rng.choice([1, 3, 30, 100, 200]))
        rows = [slot for slot in running if rng.random() < 0.8]
        if not rows:
            continue
        rng.shuffle(rows)
        steps = [running[slot].step(rng, layout.step) for slot in rows]
        parts = [running[slot].inputs(*step) for slot, step in zip(rows, steps, strict=True)]
        x, dt, B, C = (torch.cat(t) for t in zip(*parts, strict=True))
        starts, lengths = [running[slot].position for slot in rows], [tokens for tokens, _ in steps]
        near, far = replay(slots, layout, StepRows.of(rows, starts, lengths), x, dt, A, B, C, D)
        assert (near is None) == (layout.window == 0)
        at = 0
        for slot, (tokens, accepted) in zip(rows, steps, strict=True):
            seq = running[slot]
            span = slice(seq.position, seq.position + accepted)
            torch.testing.assert_close(far[at : at + accepted].double(), seq.far[span], rtol=1e-4, atol=1e-4)
            if near is not None:
                torch.testing.assert_close(near[at : at + accepted].double(), seq.near[span], rtol=1e-4, atol=1e-4)
            at += tokens
            seq.position += accepted
            checked += accepted
            if seq.position > LENGTH - 70 or rng.random() < 0.03:
                del running[slot]
                free.append(slot)
    assert checked > 200


def test_a_drafter_may_be_rewound_past_its_own_drafts():
    """A drafter runs K single steps on its own guesses and then starts again where the target stopped."""
    torch.manual_seed(0)
    drafts = 4
    layout = SlotLayout(1, 1, 2, 8, 8, 16, step=drafts + 2, rewind=drafts + 2, slack=0)
    slots, A, D = poisoned(layout, 1), -torch.rand(1) * 0.3, torch.randn(2)
    seq, position = Sequence(layout, A, D, 0), 0
    for step in range(60):
        accepted = 1 + step % (drafts + 1)
        rows = [t[position : position + accepted] for t in seq.data]
        near, far = replay(slots, layout, StepRows.of([0], [position], [accepted]), *rows[:2], A, *rows[2:], D)
        torch.testing.assert_close(far.double(), seq.far[position : position + accepted], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(near.double(), seq.near[position : position + accepted], rtol=1e-4, atol=1e-4)
        position += accepted
        for guess in range(drafts):
            noise = [torch.rand_like(t[:1]) for t in seq.data]
            replay(slots, layout, StepRows.of([0], [position + guess], [1]), *noise[:2], A, *noise[2:], D)


def test_rows_must_add_up():
    layout = SlotLayout(1, 1, 1, 4, 4, 4)
    x = torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match=r"\[4\] .* 3 tokens"):
        replay(
            poisoned(layout, 1), layout, StepRows.of([0], [0], [4]), x, x[..., 0], -torch.ones(1), x, x, torch.ones(1)
        )


def test_layout_arithmetic():
    llama_8b = SlotLayout(8, 32, 32, 128, 128, 64, dtype=torch.bfloat16)
    row = 2 * 8 * 128 * 2 + 32 * 4
    assert llama_8b.ring == 80 and llama_8b.bytes() == 32 * 128 * 128 * 4 + 80 * row + 32 * 8 * 4
    assert SlotLayout(8, 8, 32, 128, 128, 64, step=5, rewind=5).ring >= 64 + 5 + 5
    with pytest.raises(ValueError, match="rewind 0"):
        SlotLayout(1, 1, 1, 4, 4, 4, step=2)

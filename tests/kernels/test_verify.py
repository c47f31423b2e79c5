"""The verify kernel against its reference and, through a fuzz, against naive token loops: mixed row lengths, rejected
drafts, rewinds, recycled slots, padding rows, poisoned memory. In Triton's interpreter on a CPU."""

import random
from dataclasses import replace

import pytest
import torch
from mamba_hybrid_kernels import SlotLayout, SlotTensors, StepRows, replay

from .test_replay import Sequence, poisoned

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def to(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(device) for t in tensors]


def move(slots: SlotTensors, device: str) -> SlotTensors:
    return SlotTensors(**{name: t.to(device) for name, t in vars(slots).items() if t is not None})


def strided(slots: SlotTensors, gap: int) -> SlotTensors:
    """The same slots with NaN between them, as in a cache whose pages hold more than a slot."""
    views = {}
    for name, t in vars(slots).items():
        if t is not None:
            bad = float("nan") if t.is_floating_point() else 54321
            room = torch.full((len(t), t[0].numel() + gap), bad, dtype=t.dtype, device=t.device)
            room[:, : t[0].numel()] = t.flatten(1)
            views[name] = room[:, : t[0].numel()].view_as(t)
    return SlotTensors(**views)


def run_verify(slots, layout, rows, starts, lengths, parts, A, D, *, pad=2, **kw):
    """`verify` on rows followed by padding rows, over NaN-filled outputs and inputs with rows to spare."""
    from mamba_hybrid_kernels.verify import verify

    first = torch.tensor([0, *lengths]).cumsum(0).tolist()
    slot_R = torch.tensor(rows + [-1] * pad, dtype=torch.int32)
    start_R = torch.tensor(starts + [7] * pad, dtype=torch.int32)
    first_R1 = torch.tensor(first + first[-1:] * pad, dtype=torch.int32)
    x, dt, B, C = (torch.cat([t, torch.full_like(t[:1], float("nan"))]).to(DEVICE) for t in parts)
    out = torch.full((*C.shape[:2], layout.head_dim), float("nan"), dtype=torch.float32, device=DEVICE)
    near, far = verify(
        slots, layout, *to(DEVICE, slot_R, start_R, first_R1), x, dt, A.to(DEVICE), B, C, D.to(DEVICE),
        max_tokens=max(lengths), near_MHP=out.clone() if layout.window else None, far_MHP=out, **kw,
    )  # fmt: skip
    assert far[first[-1] :].isnan().all(), "a padding token was written"
    return None if near is None else near[: first[-1]].cpu(), far[: first[-1]].cpu()


def run_reference(slots, layout, rows, starts, lengths, parts, A, D):
    """`replay` in plain PyTorch where the kernels run."""
    x, dt, B, C, A, D = to(DEVICE, *parts, A, D)
    where = StepRows.of(rows, starts, lengths, DEVICE)
    return replay(slots, layout, where, x, dt, A, B, C, D, backend="reference")


def layout_of(G, per_group, per_state, P, N, window, drafts, slack, **kw) -> SlotLayout:
    return SlotLayout(
        G, G * per_group, G * per_group * per_state, P, N, window,
        step=drafts + 1, rewind=drafts + 1 if drafts else 0, slack=slack, **kw,
    )  # fmt: skip


def fuzz(seed: int, steps: int, **shape) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    G, per_group, per_state = rng.choice([(1, 1, 1), (2, 2, 2), (1, 3, 1), (2, 1, 3), (1, 1, 8), (1, 4, 2), (1, 5, 1)])
    P, N = rng.choice([(32, 32), (64, 32), (96, 96), (32, 64), (128, 128)])
    layout = layout_of(
        G, per_group, per_state, P, N, rng.choice([0, 1, 5, 16, 64]), rng.choice([0, 1, 3, 7, 15]), rng.choice([0, 20])
    )
    from mamba_hybrid_kernels.verify import VerifyLaunch

    launch = VerifyLaunch(
        block_p=rng.choice([16, 32, 128]), block_c=rng.choice([32, 128]),
        eager=rng.random() < 0.5, warps=rng.choice([2, 4, 8]), stages=rng.choice([1, 2, 3]),
    )  # fmt: skip
    slots, free, running = strided(move(poisoned(layout, 4), DEVICE), 48), list(range(4)), {}
    A, D = -torch.rand(layout.state_heads) * 0.3, torch.randn(layout.query_heads)
    checked = 0
    for _ in range(steps):
        while free and rng.random() < 0.5:
            slot = free.pop(rng.randrange(len(free)))
            running[slot] = Sequence(layout, A, D, rng.choice([0, 1, 3, 30]))
        rows = [slot for slot in running if rng.random() < 0.8]
        rng.shuffle(rows)
        plan = {slot: running[slot].step(rng, layout.step) for slot in rows}
        for short in (True, False):
            part = [slot for slot in rows if (plan[slot][0] <= layout.step) == short]
            if not part:
                continue
            inputs = [running[slot].inputs(*plan[slot]) for slot in part]
            parts = [torch.cat(t) for t in zip(*inputs, strict=True)]
            starts, lengths = [running[slot].position for slot in part], [plan[slot][0] for slot in part]
            if short:
                near, far = run_verify(slots, layout, part, starts, lengths, parts, A, D, launch=launch)
            else:
                near, far = run_reference(slots, layout, part, starts, lengths, parts, A, D)
            at = 0
            for slot in part:
                tokens, accepted = plan[slot]
                seq = running[slot]
                span = slice(seq.position, seq.position + accepted)
                want = seq.far[span]
                got = far[at : at + accepted].double().cpu()
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
                if near is not None:
                    got = near[at : at + accepted].double().cpu()
                    torch.testing.assert_close(got, seq.near[span], rtol=1e-4, atol=1e-4)
                at += tokens
                seq.position += accepted
                checked += accepted
                if seq.position > 300 or rng.random() < 0.03:
                    del running[slot]
                    free.append(slot)
    assert checked >= steps


@pytest.mark.parametrize("seed", range(6))
def test_fuzz_against_token_loops(seed):
    fuzz(seed, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 140))
def test_long_fuzz_against_token_loops(seed):
    fuzz(seed, 200)


def one_step(dtype, state_dtype=torch.float32, *, window=16, seed=None):
    """A verify step of two rows, one of which flushes, by the kernel and by the reference, from equal slots."""
    from mamba_hybrid_kernels.verify import verify

    torch.manual_seed(0)
    layout = layout_of(2, 1, 2, 64, 64, window, 3, 0, dtype=dtype, state_dtype=state_dtype)
    slots = SlotTensors.allocate(layout, 3)
    for name, t in vars(slots).items():
        if t is not None and name != "position":
            t.copy_(torch.rand(t.shape) if name == "dt" else torch.randn(t.shape))
    end = layout.ring + 40
    slots.position[:] = torch.tensor([end - layout.ring, 0, end - layout.rewind - window])[:, None, None]
    rows, lengths = [2, 0], [3, 4]
    parts = [torch.randn(7, 2, 64).to(dtype), torch.rand(7, 2), torch.randn(7, 2, 64).to(dtype)]
    parts.append(torch.randn(7, 4, 64).to(dtype))
    A, D = -torch.rand(2) * 0.2, torch.randn(4)
    fields = {name: t for name, t in vars(slots).items() if t is not None}
    copies = {name: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for name, t in fields.items()}
    exact = SlotTensors(**copies)
    starts = [end - 3, end - 4]
    x, dt, B, C = (t.float() for t in parts)
    want = replay(exact, layout, StepRows.of(rows, starts, lengths), x, dt, A, B, C, D)
    slots = move(slots, DEVICE)
    slot_R, start_R, first_R1 = (torch.tensor(t, dtype=torch.int32) for t in (rows, starts, [0, 3, 7]))
    x, dt, B, C = to(DEVICE, *parts)
    got = verify(
        slots, layout, *to(DEVICE, slot_R, start_R, first_R1), x, dt, A.to(DEVICE), B, C, D.to(DEVICE),
        max_tokens=4, seed=seed,
    )  # fmt: skip
    return slots, exact, got, want


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float32, 1e-5),
        (torch.float16, 2e-3),
        pytest.param(torch.bfloat16, 6e-3, marks=pytest.mark.gpu),  # the interpreter multiplies bf16 as integers
    ],
)
def test_one_step_in_each_dtype(dtype, limit):
    slots, exact, got, want = one_step(dtype)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert error(g, w) < limit
    assert slots.position[[0, 2], 0, 0].tolist() == exact.position[[0, 2], 0, 0].tolist()
    assert exact.position[0, 0, 0] > 40  # the second row has flushed
    # the state gains from 16-bit rows in more than their 8 or 11 bits
    assert error(slots.state[0], exact.state[0]) < 1e-4
    torch.testing.assert_close(slots.x[[0, 2]].cpu().float(), exact.x[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(slots.dt[[0, 2]].cpu(), exact.dt[[0, 2]], rtol=0, atol=0)


def test_a_state_rounded_at_random_is_right_on_average():
    runs = [one_step(torch.float32, torch.bfloat16, seed=seed)[0].state[0].cpu().double() for seed in range(24)]
    _, exact, _, _ = one_step(torch.float32, torch.bfloat16)
    nearest = one_step(torch.float32, torch.bfloat16)[0].state[0].cpu()
    again = one_step(torch.float32, torch.bfloat16, seed=3)[0].state[0].cpu().double()
    assert torch.equal(again, runs[3])
    assert not torch.equal(runs[0], runs[1])
    assert error(torch.stack(runs).mean(0), exact.state[0].double()) < error(nearest, exact.state[0].double())


def test_replay_launches_verify_for_short_rows_and_prefill_for_long_ones():
    torch.manual_seed(0)
    layout = layout_of(2, 1, 2, 32, 32, 16, 3, 0)
    slots = strided(move(poisoned(layout, 3), DEVICE), 48)
    want = SlotTensors(**{name: t.clone() for name, t in vars(slots).items() if t is not None})
    A, D = -torch.rand(2, device=DEVICE), torch.randn(4, device=DEVICE)
    starts = [0, 0]
    for lengths in ([40, 2], [3, 70], [4, 1], [25, 30], [2, 4]):
        M = sum(lengths)
        x, B = torch.randn(M, 2, 64, device=DEVICE).split(32, 2)
        parts = [
            x.contiguous(),
            torch.rand(M, 2, device=DEVICE),
            A,
            B.contiguous(),
            torch.randn(M, 4, 32, device=DEVICE),
            D,
        ]
        rows = StepRows.of([2, 0], starts, lengths, DEVICE)
        got = replay(slots, layout, rows, *parts, backend="triton")
        expected = replay(want, layout, rows, *parts, backend="reference")
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
        assert torch.equal(slots.position[[0, 2]], want.position[[0, 2]])
        starts = [start + T for start, T in zip(starts, lengths, strict=True)]
    with pytest.raises(ValueError, match="nonsense"):
        replay(slots, layout, rows, *parts, backend="nonsense")


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("held", [0, -(2**31), 2**31 - 1, 4000])
def test_a_slot_of_another_history_is_taken_as_the_nearest_that_a_step_may_find(drafts, held):
    """Its rows are wrong then, but a step stays within what is set aside for it."""
    torch.manual_seed(0)
    layout = layout_of(2, 2, 1, 32, 32, 16, drafts, 0)
    slots = SlotTensors(**{name: torch.rand(3, *shape).to(dtype) for name, (shape, dtype) in layout.fields().items()})
    slots.position.fill_(held)
    starts, lengths = [4392, 4400, 9], [40, 1, 20]
    M = sum(lengths)
    parts = to(DEVICE, torch.randn(M, 2, 32), torch.rand(M, 4), -torch.rand(4), torch.randn(M, 2, 32))
    parts += to(DEVICE, torch.randn(M, 4, 32), torch.randn(4))
    rows = StepRows.of([2, 0, 1], starts, lengths, DEVICE)
    nearest = replace(slots, position=slots.position.clone())
    for slot, start in zip([2, 0, 1], starts, strict=True):
        nearest.position[slot] = min(max(held, start + layout.step - layout.ring, 0), max(start - 16, 0))
    results = []
    for given, backend in ((slots, "triton"), (slots, "reference"), (nearest, "reference")):
        given = SlotTensors(**{name: t.clone() for name, t in vars(move(given, DEVICE)).items() if t is not None})
        results.append((given, *replay(given, layout, rows, *parts, backend=backend)))
    for got, *outputs in results[:2]:
        for g, e in zip(outputs, results[2][1:], strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
        for name, t in vars(results[2][0]).items():
            if t is not None:
                torch.testing.assert_close(vars(got)[name], t, rtol=1e-4, atol=1e-4, msg=name)


def test_what_it_cannot_serve_is_one_clear_error():
    from mamba_hybrid_kernels.verify import verify

    layout = SlotLayout(1, 1, 1, 24, 32, 0)
    slots = SlotTensors.allocate(layout, 1)
    x, dt, BC, one = torch.zeros(1, 1, 24), torch.zeros(1, 1), torch.zeros(1, 1, 32), torch.zeros(1)
    index = torch.zeros(2, dtype=torch.int32)
    args = (slots, layout, index[:1], index[:1], index, x, dt, one, BC, BC, one)
    with pytest.raises(ValueError, match="head_dim 24"):
        verify(*args, max_tokens=1)
    with pytest.raises(ValueError, match="rows of 2 tokens; the layout takes 1"):
        verify(*args, max_tokens=2)

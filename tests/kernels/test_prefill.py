"""The prefill kernels against their reference and against naive token loops: rows that begin and that continue, cuts
at a flush, tokens taken back, recycled slots, padding rows, poisoned memory. In Triton's interpreter on a CPU."""

import random
import sys
from dataclasses import replace

import pytest
import torch
from mamba_hybrid_kernels import SlotLayout, SlotTensors, StepRows, replay

from .test_replay import Sequence, poisoned
from .test_verify import error, layout_of, move, run_reference, strided, to

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_prefill(slots, layout, rows, starts, lengths, parts, A, D, *, index=torch.int32, dtype=torch.float32, **kw):
    """`prefill` on rows around a padding row, over NaN-filled outputs, x and B side by side with a NaN row after."""
    from mamba_hybrid_kernels.prefill import prefill

    rows, starts, lengths = [-1, *rows, -1], [7, *starts, 7], [0, *lengths, 0]
    first = torch.tensor([0, *lengths]).cumsum(0)
    x, dt, B, C = (torch.cat([t, torch.full_like(t[:1], float("nan"))]) for t in parts)
    x, B = torch.cat([x.flatten(1), B.flatten(1)], 1).to(DEVICE).split([x[0].numel(), B[0].numel()], 1)
    x, B = x.unflatten(1, (layout.groups, -1)), B.unflatten(1, (layout.groups, -1))
    dt = dt.t().contiguous().t()
    out = torch.full((*C.shape[:2], layout.head_dim), float("nan"), dtype=dtype, device=DEVICE)
    near, far = prefill(
        slots, layout, *to(DEVICE, *(torch.as_tensor(t).to(index) for t in (rows, starts, first))), lengths,
        x, dt.to(DEVICE), A.to(DEVICE), B, C.to(DEVICE), D.to(DEVICE),
        near_MHP=out.clone() if layout.window else None, far_MHP=out, **kw,
    )  # fmt: skip
    tokens = sum(lengths)
    assert far[tokens:].isnan().all(), "a padding token was written"
    return None if near is None else near[:tokens], far[:tokens]


def same_slots(got: SlotTensors, want: SlotTensors, tolerance: float = 1e-5) -> None:
    """Equal in every bit but the states, NaN and what no row owns included."""
    for name, t in vars(want).items():
        if name == "state":
            scale = float(t.nan_to_num().abs().max())
            torch.testing.assert_close(got.state, t, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        elif t is not None:
            torch.testing.assert_close(vars(got)[name], t, rtol=0, atol=0, equal_nan=True, msg=name)


def fuzz(seed: int, steps: int, prompts: list[int]) -> None:
    from mamba_hybrid_kernels.prefill import NearLaunch
    from mamba_hybrid_kernels.ssd_forward import OutputsLaunch, StatesLaunch

    rng = random.Random(seed)
    torch.manual_seed(seed)
    G, per_group, per_state = rng.choice([(1, 1, 1), (2, 2, 2), (1, 3, 1), (2, 1, 3), (1, 1, 8), (1, 5, 1)])
    P, N = rng.choice([(32, 32), (64, 32), (96, 32), (32, 96)])
    layout = layout_of(
        G, per_group, per_state, P, N, rng.choice([0, 1, 5, 16, 64]), rng.choice([0, 1, 7]), rng.choice([0, 20, 90])
    )
    kw = {
        "chunk": rng.choice([16, 32, 64]),
        "near": NearLaunch(*rng.choice([(16, 16), (16, 64), (64, 32), (64, 64)]), stages=1),
        "walk": StatesLaunch(block_p=rng.choice([32, 64]), block_n=rng.choice([32, 64]), block_j=rng.choice([16, 64])),
        "launch": OutputsLaunch(block_p=rng.choice([32, 64]), block_j=rng.choice([16, 32]), stages=1),
        "index": rng.choice([torch.int32, torch.int64]),
    }
    kw["walk"] = replace(kw["walk"], pieces=rng.choice([1, 2, 4]))
    kw["launch"] = replace(kw["launch"], heads=rng.choice([1, 2, 3, 8]))
    slots, free, running = strided(move(poisoned(layout, 4), DEVICE), 48), list(range(4)), {}
    A, D = -torch.rand(layout.state_heads) * 0.3, torch.randn(layout.query_heads)
    for _ in range(steps):
        while free and rng.random() < 0.6:
            slot = free.pop(rng.randrange(len(free)))
            running[slot] = Sequence(layout, A, D, 0)
        rows = rng.sample(sorted(running), rng.randint(0, len(running)))
        if not rows:
            continue
        long = rng.random() < 0.6
        plan = {}
        for slot in rows:
            tokens = rng.choice(prompts) if long else rng.randint(1, layout.step)
            # the last tokens of a prefill may be taken back like drafts
            kept = tokens - rng.randint(0, min(layout.rewind, tokens - 1)) if rng.random() < 0.5 else tokens
            plan[slot] = (tokens, kept)
        inputs = [running[slot].inputs(*plan[slot]) for slot in rows]
        parts = [torch.cat(t) for t in zip(*inputs, strict=True)]
        starts, lengths = [running[slot].position for slot in rows], [plan[slot][0] for slot in rows]
        wanted = SlotTensors(**{name: t.clone() for name, t in vars(slots).items() if t is not None})
        want = run_reference(wanted, layout, rows, starts, lengths, parts, A, D)
        if long:
            got = run_prefill(slots, layout, rows, starts, lengths, parts, A, D, **kw)
            for g, e in zip(got, want, strict=True):
                if e is not None:
                    torch.testing.assert_close(g, e, rtol=1e-4, atol=2e-5 * max(float(e.abs().max()), 1))
            same_slots(slots, wanted)
        else:
            for name, t in vars(wanted).items():
                if t is not None:
                    vars(slots)[name].copy_(t)
            got = want
        at = 0
        for slot in rows:
            tokens, kept = plan[slot]
            seq = running[slot]
            span = slice(seq.position, seq.position + kept)
            far = seq.far[span]
            torch.testing.assert_close(
                got[1][at : at + kept].double().cpu(), far, rtol=1e-4, atol=1e-4 * max(float(far.abs().max()), 1)
            )
            if layout.window:
                torch.testing.assert_close(got[0][at : at + kept].double().cpu(), seq.near[span], rtol=1e-4, atol=1e-4)
            at += tokens
            seq.position += kept
            if seq.position > 400 - max(*prompts, layout.step) or rng.random() < 0.05:
                del running[slot]
                free.append(slot)


@pytest.mark.parametrize("seed", range(8))
def test_fuzz_against_reference_and_token_loops(seed):
    fuzz(seed, 5, [1, 3, 17, 40, 70])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 140))
def test_long_fuzz_against_reference_and_token_loops(seed):
    fuzz(seed, 60, [1, 3, 17, 64, 130, 200])


@pytest.mark.parametrize("more", [0, 1])
def test_flush_at_the_rings_limit(more):
    torch.manual_seed(0)
    layout = layout_of(1, 1, 1, 32, 32, 5, 3, 0)
    tokens = layout.ring - layout.step + more
    slots, A, D = move(poisoned(layout, 2), DEVICE), -torch.rand(1), torch.randn(1)
    seq = Sequence(layout, A, D, 0)
    near, far = run_prefill(slots, layout, [1], [0], [tokens], seq.inputs(tokens, tokens), A, D, chunk=16)
    assert slots.position[1].unique().item() == (tokens - layout.rewind - 5 if more else 0)
    torch.testing.assert_close(far.double().cpu(), seq.far[:tokens], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(near.double().cpu(), seq.near[:tokens], rtol=1e-4, atol=1e-4)
    assert slots.state[1].isnan().all() == (more == 0)
    assert slots.state[0].isnan().all()


def in_dtype(dtype, P, N, tokens, state_dtype=torch.float32):
    """A row that begins and one that continues from a checkpoint, by the kernels and by the reference in fp32."""
    torch.manual_seed(0)
    layout = layout_of(1, 1, 2, P, N, 16, 3, 0, dtype=dtype, state_dtype=state_dtype)
    slots = SlotTensors.allocate(layout, 2)
    for name, t in vars(slots).items():
        if t is not None and name != "position":
            t.copy_(torch.rand(t.shape) if name == "dt" else torch.randn(t.shape))
    start = layout.ring + 40
    slots.position[:] = start + layout.step - layout.ring
    fields = {name: t for name, t in vars(slots).items() if t is not None}
    exact = SlotTensors(**{n: t.to(torch.float32 if t.is_floating_point() else t.dtype) for n, t in fields.items()})
    exact.position, exact.dt = exact.position.clone(), exact.dt.clone()
    exact.state = exact.state.clone()
    rows, starts, lengths = [1, 0], [0, start], [tokens, tokens + 9]
    total = sum(lengths)
    parts = [torch.randn(total, 1, P).to(dtype), torch.rand(total, 1), torch.randn(total, 1, N).to(dtype)]
    parts.append(torch.randn(total, 2, N).to(dtype))
    A, D = -torch.rand(1) * 0.2, torch.randn(2)
    slots = move(slots, DEVICE) if DEVICE == "cuda" else SlotTensors(**{n: t.clone() for n, t in fields.items()})
    got = run_prefill(slots, layout, rows, starts, lengths, parts, A, D, dtype=dtype)
    x, dt, B, C = (t.float() for t in parts)
    want = replay(exact, layout, StepRows.of(rows, starts, lengths), x, dt, A, B, C, D)
    return slots, exact, got, want


@pytest.mark.parametrize(
    ("dtype", "P", "N", "tokens", "limit"),
    [
        (torch.float32, 32, 32, 40, 1e-5),
        (torch.float16, 32, 64, 40, 2e-3),
        # the interpreter multiplies bf16 as integers
        pytest.param(torch.bfloat16, 128, 128, 40, 8e-3, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, 128, 128, 1000, 8e-3, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, 64, 256, 300, 8e-3, marks=pytest.mark.gpu),
        pytest.param(torch.float16, 256, 64, 300, 2e-3, marks=pytest.mark.gpu),
        pytest.param(torch.float32, 128, 128, 300, 1e-5, marks=pytest.mark.gpu),
    ],
)
def test_defaults_in_each_dtype(dtype, P, N, tokens, limit):
    slots, exact, got, want = in_dtype(dtype, P, N, tokens)
    for g, e in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert error(g, e) < limit
    assert error(slots.state, exact.state) < 1e-4, "the state gains from 16-bit rows in more than their bits"
    assert slots.position.tolist() == exact.position.tolist()
    assert slots.position.min() > 0
    torch.testing.assert_close(slots.x.float().cpu(), exact.x, rtol=0, atol=0)
    torch.testing.assert_close(slots.b.float().cpu(), exact.b, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[300], [4] * 12, [70, 1, 33, 9]])
@pytest.mark.parametrize("per_state", [1, 2])
def test_what_it_allocates_is_known_before(lengths, per_state, monkeypatch):
    from mamba_hybrid_kernels.prefill import most_workspace

    layout, new_empty, taken = layout_of(1, 2, per_state, 32, 32, 5, 2, 20), torch.Tensor.new_empty, []
    rows, M = list(range(len(lengths))), sum(lengths)
    parts = (torch.randn(M, 1, 32), torch.rand(M, 2), torch.randn(M, 1, 32), torch.randn(M, 2 * per_state, 32))

    def counted(self, *shape, **kw):
        made = new_empty(self, *shape, **kw)
        if sys._getframe(1).f_globals["__name__"] == "mamba_hybrid_kernels.prefill":  # and not the interpreter's
            taken.append(made)
        return made

    slots = move(SlotTensors.allocate(layout, len(rows)), DEVICE)
    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    run_prefill(slots, layout, rows, [0] * len(rows), lengths, parts, -torch.rand(2), torch.randn(2 * per_state))
    assert 0 < sum(t.nbytes for t in taken) <= most_workspace(layout, len(rows) + 2, M + 1)
    assert sum(t.nbytes for t in taken) >= 0.5 * most_workspace(layout, len(rows), M)


def test_what_it_cannot_serve_is_one_clear_error():
    from mamba_hybrid_kernels.prefill import prefill

    layout = SlotLayout(1, 1, 1, 32, 32, 0)
    slots = SlotTensors.allocate(layout, 1)
    x, dt, BC, one = torch.zeros(3, 1, 32), torch.zeros(3, 1), torch.zeros(3, 1, 32), torch.zeros(1)
    index = torch.zeros(2, dtype=torch.int32)
    rows = (slots, layout, index[:1], index[:1], index)
    with pytest.raises(ValueError, match=r"\[4\] tokens for 1 slots and 3 tokens"):
        prefill(*rows, [4], x, dt, one, BC, BC, one)
    with pytest.raises(ValueError, match="chunk 24"):
        prefill(*rows, [3], x, dt, one, BC, BC, one, chunk=24)
    with pytest.raises(ValueError, match="B is torch"):
        prefill(*rows, [3], x, dt, one, BC.double(), BC, one)
    near, far = prefill(*rows, [0], x, dt, one, BC, BC, one)
    assert near is None and far.shape == (3, 1, 32)


def test_a_launch_that_the_compiler_gets_wrong_is_refused():
    from mamba_hybrid_kernels.prefill import NearLaunch, prefill

    layout = SlotLayout(1, 1, 1, 16, 16, 4)
    x, dt, one = torch.zeros(3, 1, 16), torch.zeros(3, 1), torch.zeros(1)
    index = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="block_j of at least 32, not 16"):
        prefill(
            SlotTensors.allocate(layout, 1), layout, index[:1], index[:1], index, [3], x, dt, one, x, x, one,
            near=NearLaunch(block_q=64, block_j=16),
        )  # fmt: skip

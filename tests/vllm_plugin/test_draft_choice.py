"""As many drafts are made as bring most tokens a second, and that is found out again and again."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import pytest

from vllm_plugin.draft_choice import GLANCE, KEPT, LONGEST, PATIENCE, DraftChoice, Size, choices

DRAFTS = 4


class World:
    """Steps of some sequences, one after another, which take as long as they are told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.choice = DraftChoice(DRAFTS)
        self.made = DRAFTS  # drafts that the last step made

    def step(self, sequences: int, seconds: dict[int, float], accepted: int, new: bool = False, chunk: int = 0) -> int:
        """One step, in which a new prompt may have been read, or a chunk of one; how much it drafted."""
        verified, self.made = self.made, self.choice[sequences]
        step = SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(range(sequences)),
            scheduled_new_reqs=["prompt"] if new else [],
            num_spec_tokens_to_schedule=self.made,
            scheduled_spec_decode_tokens={i: [-1] * verified for i in range(sequences) if verified},
            total_num_scheduled_tokens=sequences * (verified + 1) + 7 * new + chunk,
        )
        self.choice.begin(step, self.now)
        self.now += seconds[verified]
        self.choice.end(step, sequences * (1 + min(accepted, verified)), self.now)
        return self.made

    def steps(self, count: int, sequences: int, seconds: dict[int, float], accepted: int) -> Counter:
        """So many steps; how many of them drafted how much, as shares."""
        made = Counter(self.step(sequences, seconds, accepted) for _ in range(count))
        return Counter({drafts: n / count for drafts, n in made.items()})


def test_choices():
    assert [choices(n) for n in (1, 2, 3, 8)] == [[1, 0], [2, 1, 0], [3, 2, 0], [8, 4, 0]]


@pytest.mark.parametrize("sequences", [1, 3, 16, 200])
def test_the_best_is_kept(sequences):
    world, trial = World(), Size(sequences, DRAFTS).trial
    seconds = {0: 1.0, 2: 1.3, 4: 2.5}
    soon, later = 5 * trial, 3 * LONGEST * trial
    world.steps(soon, sequences, seconds, accepted=0)
    assert world.steps(KEPT * trial, sequences, seconds, accepted=0)[0] > 0.75
    made = world.steps(later, sequences, seconds, accepted=0)
    assert made[0] > 0.95 and made[2] > 0 and made[4] > 0
    # the text becomes one that is guessed better and better
    world.steps(later, sequences, seconds, accepted=2)
    assert world.steps(later, sequences, seconds, accepted=2)[2] > 0.95
    world.steps(later, sequences, seconds | {4: 1.5}, accepted=4)
    assert world.steps(later, sequences, seconds | {4: 1.5}, accepted=4)[4] > 0.95
    # and worse: no wait until the next trial
    world.steps(soon, sequences, seconds, accepted=0)
    assert world.steps(KEPT * trial, sequences, seconds, accepted=0)[0] > 0.75


def test_a_hopeless_trial_of_a_large_batch_ends_soon():
    runs = {}
    for sequences in (16, 200):
        world = World()
        made = [world.step(sequences, {0: 1.0, 2: 1.1, 4: 2.5}, accepted=0) for _ in range(400)]
        runs[sequences] = [(drafts, len(list(steps))) for drafts, steps in groupby(made)]
    # the first step of a trial verifies as many drafts as were made before it, and is not counted
    assert {n for drafts, n in runs[200][1:] if drafts == 4} == {GLANCE + 1}
    assert {n for drafts, n in runs[16][1:] if drafts == 4} == {Size(16, DRAFTS).trial + 1}
    # two drafts are not so much worse
    assert {n for drafts, n in runs[200] if drafts == 2} == {Size(200, DRAFTS).trial + 1}


def test_sizes_of_batches_are_told_apart():
    world = World()
    for _ in range(300):
        world.step(2, {0: 1.0, 2: 1.0, 4: 1.0}, accepted=4)
        world.step(64, {0: 1.0, 2: 4.0, 4: 6.0}, accepted=2)
        world.step(60, {0: 1.0, 2: 4.0, 4: 6.0}, accepted=2)
    assert sorted(world.choice.sizes) == [2, 64]
    assert world.choice.sizes[2].best == 4 and world.choice.sizes[64].best == 0


def test_steps_that_read_prompts_do_not_count():
    world = World()
    for _ in range(100):
        world.step(8, {0: 50.0, 2: 50.0, 4: 1.0}, accepted=0)
        world.step(8, dict.fromkeys(choices(DRAFTS), 1000.0), accepted=0, new=True)
    assert not world.choice.begun
    assert world.choice.sizes[8].best == DRAFTS


@pytest.mark.parametrize("prompt", [{"new": True}, {"chunk": 3}])
def test_what_prompts_leave_behind_is_not_charged(prompt):
    """A step's draft round is paid by the next one."""
    world = World()
    for _ in range(100):
        world.step(8, {0: 1.0, 2: 1.0, 4: 1.0}, accepted=4, **prompt)
        world.step(8, {0: 90.0, 2: 90.0, 4: 90.0}, accepted=4)
        for _ in range(3):
            world.step(8, {0: 1.0, 2: 1.0, 4: 1.0}, accepted=4)
    assert world.choice.sizes[8].ways[DRAFTS].rate == pytest.approx(5)


def test_a_trial_that_never_ends_is_given_up():
    """Where every step reads a prompt, nothing can be measured: back to the best that is known."""
    world = World()
    size, seconds = Size(8, DRAFTS), dict.fromkeys(choices(DRAFTS), 1.0)
    while world.choice.sizes.get(8, size).drafts == DRAFTS:
        world.step(8, seconds, accepted=4)
    made = [world.step(8, seconds, accepted=4, new=True) for _ in range((PATIENCE + 1) * size.trial)]
    assert made[0] != DRAFTS and made[-1] == DRAFTS
    # and is taken up again
    assert min(world.step(8, seconds, accepted=4) for _ in range((KEPT + 4) * size.trial)) == 0


def test_idle_time_is_no_step():
    world = World()
    for _ in range(60):
        world.step(4, {0: 2.0, 2: 2.0, 4: 1.0}, accepted=1)
        world.now += 100
    assert world.choice.sizes[4].ways[DRAFTS].rate == pytest.approx(2)


def test_a_hiccup_changes_nothing():
    world, seconds = World(), {0: 1.0, 2: 1.25, 4: 1.5}
    world.steps(200, 64, seconds, accepted=4)
    made = Counter()
    for i in range(4000):
        made[world.step(64, {n: s * (10 if i % 150 == 0 else 1) for n, s in seconds.items()}, accepted=4)] += 1
    assert made[4] > 0.9 * 4000

"""Drafts are made where they bring more tokens a second, and that is found out again and again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_plugin.draft_choice import KEPT, DraftChoice, Size

DRAFTS = 4


class World:
    """Steps of some sequences, one after another, which take as long as they are told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.choice = DraftChoice(DRAFTS, lambda: self.now)
        self.made = DRAFTS  # drafts that the last step made

    def step(self, sequences: int, seconds: dict[bool, float], accepted: int, new: bool = False) -> bool:
        """One step; whether it drafted."""
        verified, self.made = self.made, self.choice[sequences]
        step = SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(range(sequences)),
            scheduled_new_reqs=["prompt"] if new else [],
            num_spec_tokens_to_schedule=self.made,
            total_num_scheduled_tokens=sequences * (verified + 1) + 7 * new,
        )
        self.choice.begin(step)
        self.now += seconds[verified > 0]
        self.choice.end(step, sequences * (1 + min(accepted, verified)))
        return self.made > 0


def share(world: World, steps: int, sequences: int, seconds: dict[bool, float], accepted: int) -> float:
    """Share of steps that draft, of so many."""
    return sum(world.step(sequences, seconds, accepted) for _ in range(steps)) / steps


@pytest.mark.parametrize("sequences", [1, 3, 16, 200])
def test_the_better_way_is_kept(sequences):
    world, trial = World(), Size(sequences).trial
    slow, fast = {True: 2.0, False: 1.0}, {True: 1.5, False: 1.0}
    share(world, 3 * trial, sequences, slow, accepted=0)
    period = (KEPT + 1) * trial
    assert share(world, 3 * period, sequences, slow, accepted=0) == pytest.approx(1 / (KEPT + 1), abs=0.03)
    # the text becomes one that is guessed well
    share(world, 2 * period, sequences, fast, accepted=DRAFTS)
    assert share(world, 3 * period, sequences, fast, accepted=DRAFTS) == pytest.approx(1 - 1 / (KEPT + 1), abs=0.03)


def test_sizes_of_batches_are_told_apart(caplog):
    world = World()
    for _ in range(300):
        world.step(2, {True: 1.0, False: 1.0}, accepted=2)
        world.step(64, {True: 4.0, False: 1.0}, accepted=2)
        world.step(60, {True: 4.0, False: 1.0}, accepted=2)
    assert sorted(world.choice.sizes) == [2, 64]
    assert world.choice.sizes[2].better and not world.choice.sizes[64].better


def test_steps_that_read_prompts_do_not_count():
    world = World()
    for _ in range(100):
        world.step(8, {True: 1.0, False: 50.0}, accepted=0)  # drafts are the better way
        world.step(8, {True: 1000.0, False: 1000.0}, accepted=0, new=True)
    assert not world.choice.begun
    assert world.choice.sizes[8].ways[True].rate == pytest.approx(8)


def test_idle_time_is_no_step():
    world = World()
    for _ in range(40):
        world.step(4, {True: 1.0, False: 2.0}, accepted=1)
        world.now += 100
    assert world.choice.sizes[4].ways[True].rate == pytest.approx(8)

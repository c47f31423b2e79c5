"""Checkpoints of a run: whole or not there, in the foreground and in the background."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mamba_hybrid.errors import UserError
from torchtune_recipes.distill_hybrid import DistillHybrid, run

from .conftest import CONFIG, ROOT, metrics, start


@pytest.fixture
def recipe(config):
    """A run that has made two steps, with a checkpoint of the second."""

    def make(**more) -> DistillHybrid:
        recipe = DistillHybrid(config(**more))
        recipe.setup()
        made.append(recipe)
        advance(recipe, 2)
        recipe.save_checkpoint()
        return recipe

    made: list[DistillHybrid] = []
    yield make
    for recipe in made:
        recipe.cleanup()


def advance(recipe, steps):
    for _ in range(steps):
        recipe._unread.append(recipe.train_step())
        recipe.step += 1


def weights(recipe):
    return [p.detach().clone() for p in recipe.student.parameters()]


def names(run):
    return sorted(p.name for p in run.iterdir() if "step" in p.name)


def test_in_the_background_a_checkpoint_is_of_its_step_and_has_its_name_when_whole(recipe, monkeypatch, tmp_path):
    """Writing is held up while training goes on."""
    go_on, save = threading.Event(), dcp.save
    at = []

    def held(*args, **kwargs):
        at.append(threading.current_thread())
        assert go_on.wait(60)
        return save(*args, **kwargs)

    monkeypatch.setattr("torch.distributed.checkpoint.state_dict_saver.save", held)
    running = recipe(async_checkpoints=True)
    expected = weights(running)
    advance(running, 1)
    assert any(not torch.equal(a, b) for a, b in zip(weights(running), expected, strict=True))
    assert names(tmp_path / "run") == [".step_2"] and running.checkpoints.steps() == []
    go_on.set()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "step_2").exists():  # by itself, before anybody asks
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert at[0] is not threading.main_thread()
    running.load_checkpoint()
    assert running.step == 2
    assert all(torch.equal(a, b) for a, b in zip(weights(running), expected, strict=True))


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_is_one_error_and_the_run_goes_on_from_before(background, recipe, config, tmp_path):
    settings = {"async_checkpoints": background, "max_steps": 5, "keep_last_n": 0}
    running = recipe(**settings)
    running.checkpoints.wait()
    advance(running, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    says = r"step_3 cannot be written \(.*large.*\).*goes on after step 2"
    try:
        if background:
            running.save_checkpoint()
            with pytest.raises(UserError, match=says):
                running.checkpoints.wait()
        else:
            with pytest.raises(UserError, match=says):
                running.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path / "run") == ["step_2"]
    running.cleanup()
    assert run(config(**settings)) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert names(tmp_path / "run") == ["step_2", "step_5"]


def test_a_run_that_fails_keeps_the_checkpoint_under_way(config, capsys, monkeypatch, tmp_path):
    train_step = DistillHybrid.train_step

    def failing(self):
        if self.step == 2:
            raise UserError("the third step")
        return train_step(self)

    monkeypatch.setattr(DistillHybrid, "train_step", failing)
    assert run(config(async_checkpoints=True, checkpoint_every_n_steps=2)) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: the third step"
    assert names(tmp_path / "run") == ["step_2"]


def test_background_checkpoints_of_two_processes_that_are_told_to_stop(overrides, config, tmp_path):
    """They leave a checkpoint of the step they stopped at, and one process goes on from it."""
    settings = {"max_steps": 1000, "checkpoint_every_n_steps": 3, "lr_scheduler.num_warmup_steps": 200}
    out = tmp_path / "run"
    two = start(overrides(**settings, async_checkpoints=True, batch_size=2), "--nproc_per_node", "2")
    deadline = time.monotonic() + 200
    while len(list(out.glob("step_*"))) < 2:
        assert two.poll() is None and time.monotonic() < deadline, two.communicate()[1]
        time.sleep(0.005)
    two.send_signal(signal.SIGTERM)
    two.communicate(timeout=60)
    done = metrics(out)
    goes_on, whole = (DistillHybrid(config(**settings, output_dir=str(d))) for d in (out, tmp_path / "whole"))
    try:
        goes_on.setup()
        assert goes_on.step == len(done) < 1000
        assert [p for p in names(out) if p.startswith(".")] == []
        got, _ = goes_on.train_step()
        goes_on.cleanup()
        whole.setup()
        for whole.step in range(len(done) + 1):
            expected, _ = whole.train_step()
    finally:
        whole.cleanup()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_killed_at_random_moments_it_loses_nothing(overrides, tmp_path):
    """KILLS=50 for more of them; see `kill_run`."""
    kills = int(os.environ.get("KILLS", 4))
    words = overrides(max_steps=30)
    words.pop("output_dir"), words.pop("checkpoint_every_n_steps")
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.torchtune_recipes.kill_run", str(kills), "0", str(tmp_path), str(CONFIG),
            *(f"{key}={value}" for key, value in words.items()),
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60 + 30 * kills,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stdout.startswith(f"{kills} kills")

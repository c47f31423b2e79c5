"""A stream beside the one that trains: what it makes is whole when it is read, and its memory not taken before."""

from __future__ import annotations

import pytest
import torch

from torchtune_recipes import recipe as recipe_module
from torchtune_recipes.distill_hybrid import DistillHybrid
from torchtune_recipes.side_stream import SideStream

from ..torchtune_recipes.conftest import config, models, one_thread, overrides  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_what_is_made_is_read_whole():
    """The stream that reads is kept busy, so that it is always behind the one that makes."""
    device = torch.device("cuda")
    side, busy, read = SideStream(device), torch.randn(4096, 4096, device=device), []
    assert side.stream is not None
    for i in range(200):
        made = side(lambda i=i: (torch.full((1 << 20,), float(i), device=device), (torch.ones(3, device=device),)))
        if i % 10 == 0:
            busy = busy @ busy * 1e-2
        read.append(made[0].mean() + made[1][0].sum())
        del made
    assert [float(v) for v in read] == [i + 3.0 for i in range(200)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_losses_are_those_of_one_stream(config, monkeypatch, dtype):  # noqa: F811
    losses = {}
    for on in (True, False):
        monkeypatch.setattr(recipe_module, "SideStream", lambda device, on, use=on: SideStream(device, on=on and use))
        cfg = config(device="cuda", dtype=dtype, output_dir=f"{config().output_dir}_{on}", max_steps=12)
        recipe = DistillHybrid(cfg)
        recipe.setup()
        assert (recipe.side.stream is not None) == on
        try:
            rows = []
            for _ in range(12):
                rows.append(recipe.train_step()[0])
                recipe.step += 1
            losses[on] = torch.stack(rows)[:, 0].tolist()
        finally:
            recipe.cleanup()
    assert losses[True] == pytest.approx(losses[False], rel=1e-4 if dtype == "fp32" else 2e-3)
    assert losses[True][-1] < losses[True][0]

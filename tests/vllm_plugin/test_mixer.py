"""The mixer layer where vLLM runs it without slots; what it computes is in `test_exact.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_plugin import mixer


@pytest.mark.parametrize("metadata", [None, {"model.layers.0.self_attn.attn": object()}])
def test_a_run_without_slots_gives_zeros(metadata, monkeypatch):
    """None where vLLM measures memory, the attention layers' alone where it tunes them."""
    monkeypatch.setattr(mixer, "get_forward_context", lambda: SimpleNamespace(attn_metadata=metadata))
    out = torch.full((3, 8), float("nan"))
    mixer.MixerLayer.conv_ssm_forward(SimpleNamespace(prefix="model.layers.1.mixer"), torch.zeros(3, 20), out)
    assert not out.any()

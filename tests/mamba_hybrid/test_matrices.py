import pytest
import torch

from mamba_hybrid.config import HybridMambaConfig
from mamba_hybrid.mixer import MixerCore
from tests.matrices import attention_matrices, mixer_matrices, relative

B, L, H, G, P = 2, 21, 4, 2, 6
KINDS = {
    "window": {"window": 5},
    "shared states": {"window": 4, "state_heads": 2, "gate": "silu"},
    "no gate": {"window": 1, "gate": "none", "ssm_rope": False},
    "window 0": {"window": 0},
    "norm after the gate": {"window": 0, "gate": "silu", "norm": "after_gate", "state_size": 3, "ssm_rope": False},
}


def core_and_inputs(kind: str) -> tuple[MixerCore, tuple]:
    """A core, and what its `forward` takes; the second row has three documents, one of them a single token."""
    torch.manual_seed(0)
    shape = dict(hidden_size=H * P, num_hidden_layers=1, num_attention_heads=H, num_key_value_heads=G, head_dim=P)
    core = MixerCore(c := HybridMambaConfig(**shape, **KINDS[kind]))
    for p in core.parameters():
        torch.nn.init.normal_(p, mean=0.3, std=0.5)
    N = c.state_size
    q, k, v, dt = (torch.randn(B, L, n) for n in (H * N, G * N, G * P, c.state_heads))
    z = None if c.gate == "none" else torch.randn(B, L, H * P)
    angle = torch.rand(B, L, N)
    doc = torch.tensor([[0] * L, [0] * 9 + [1] + [2] * (L - 10)])
    return core, (q, k, v, dt, z, angle.cos(), angle.sin(), doc)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_are_what_the_mixer_does_and_the_error_is_theirs(kind):
    core, inputs = core_and_inputs(kind)
    v, doc = inputs[2], inputs[-1]
    with torch.no_grad():
        M = mixer_matrices(core, *inputs)
        y = torch.einsum("bhtjp,bjhp->bthp", M, v.view(B, L, G, P).repeat_interleave(H // G, 2)).flatten(2)
        torch.testing.assert_close(core(*inputs)[0], y, rtol=1e-4, atol=1e-5)
        attention, counted = (torch.randn(B, L, H, P), torch.randn(B, L, G, P)), torch.rand(B, L) < 0.8
        expected = relative(M, attention_matrices(*attention, doc), counted)
        torch.testing.assert_close(core.matrix_error(*inputs, attention, counted), expected, rtol=1e-4, atol=1e-6)


def test_pieces_change_nothing(monkeypatch):
    found = []
    for rows in (L, 4):
        monkeypatch.setattr("mamba_hybrid.matrices.PIECE", B * H * L * rows)
        core, inputs = core_and_inputs("window")
        attention = torch.randn(B, L, H, P), torch.randn(B, L, G, P)
        error = core.matrix_error(*inputs, attention, torch.ones(B, L, dtype=torch.bool))
        error.sum().backward()
        found.append([error, *(p.grad for p in core.parameters())])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)

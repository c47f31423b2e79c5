import pytest

from mamba_hybrid import HybridMambaConfig
from tests.tiny import SHAPE


def test_defaults():
    config = HybridMambaConfig(**SHAPE)
    assert (config.window, config.state_heads, config.state_size, config.mixer_layers) == (64, 6, 8, [])


def test_round_trip(tmp_path):
    kinds = ["linear_attention", "full_attention"] * 2
    config = HybridMambaConfig(**SHAPE, layer_types=kinds, state_heads=2, window=0, state_size=16, ssm_rope=False)
    config.save_pretrained(tmp_path)
    again = HybridMambaConfig.from_pretrained(tmp_path)
    assert again.layer_types == kinds and (again.state_heads, again.state_size, again.window) == (2, 16, 0)


@pytest.mark.parametrize(
    "bad,message",
    [
        (dict(state_heads=4), "state_heads 4 must be a multiple of num_key_value_heads 2"),
        (dict(state_heads=12), "divide num_attention_heads 6"),
        (dict(layer_types=["full_attention"]), r"layer_types.* \(?1\)?"),
        (dict(layer_types=["sliding_attention"] * 4), "sliding_attention"),
        (dict(window=-1), "window -1"),
        (dict(short_conv=3), "short_conv 3"),
        (dict(gate="relu"), "gate 'relu'"),
        (dict(norm="after_gate"), "window 64"),
        (dict(state_size=16), "state_size 16 must be head_dim 8"),
        (dict(num_key_value_heads=4), "num_attention_heads 6 is no multiple"),
        (dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rope_type 'dynamic'"),
    ],
)
def test_contradictions_name_both_values(bad, message):
    with pytest.raises(Exception, match="(?s)" + message):
        HybridMambaConfig(**SHAPE | bad)

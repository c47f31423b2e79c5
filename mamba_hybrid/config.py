"""Configuration of a hybrid: Llama's own, plus which layers are mixers and what those are made of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from mamba_hybrid_kernels import SlotLayout
from transformers import LlamaConfig

ATTENTION, MIXER = "full_attention", "linear_attention"  # transformers' names, which vLLM counts layers by
GATES = ("sigmoid", "silu", "none")
NORMS = ("before_gate", "after_gate")
# these make cos and sin depend on the whole sequence's length, which a recurrence cannot revise
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


@strict
class HybridMambaConfig(LlamaConfig):
    """A Llama-family model some of whose attention layers are grouped-query SSD mixers.

    Args beyond `transformers.LlamaConfig`:
        layer_types: one of "full_attention" and "linear_attention" (a mixer) for each layer.
        window: tokens of softmax attention in a mixer; its state is fed with what has left them. 0 is the
            paper's pure SSM.
        state_heads: states of a mixer, a multiple of num_key_value_heads that divides num_attention_heads
            (0: num_attention_heads).
        state_size: width N of a state's keys (0: head_dim; must be head_dim with a window, whose attention
            uses the same keys).
        ssm_rope: rotate the mixers' B and C as the attention's keys and queries are.
        short_conv: width of the depthwise convolution on x, B and C, 0 for none.
        gate: "sigmoid" is 2 sigmoid(z), neutral at z = 0; "silu" is the paper's; "none".
        norm: per-head RMSNorm "before_gate", or "after_gate" (the paper's order, for window 0).
        qkv_bias, o_bias: biases of the projections (Qwen2 has the first only).

    Raises:
        ValueError: naming the values that contradict each other.

    Example:
        >>> HybridMambaConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]).mixer_layers
        [0]
    """

    model_type = "mamba_hybrid"

    layer_types: list[str] | None = None
    window: int = 64
    state_heads: int = 0
    state_size: int = 0
    ssm_rope: bool = True
    short_conv: int = 0
    gate: str = "sigmoid"
    norm: str = "before_gate"
    qkv_bias: bool = False
    o_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [ATTENTION] * self.num_hidden_layers
        self.state_heads = self.state_heads or self.num_attention_heads
        super().__post_init__(**kwargs)
        self.state_size = self.state_size or self.head_dim
        self.attention_bias = self.qkv_bias  # the name vLLM's Llama reads

    def validate_architecture(self) -> None:
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise ValueError(f"num_attention_heads {H} is no multiple of num_key_value_heads {G}")

    def validate_mixer(self) -> None:
        """Checked when a configuration is made."""
        H, G, S = self.num_attention_heads, self.num_key_value_heads, self.state_heads
        if S % G or H % S:
            raise ValueError(
                f"state_heads {S} must be a multiple of num_key_value_heads {G} and divide num_attention_heads {H}"
            )
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(f"layer_types names {len(self.layer_types)} of {self.num_hidden_layers} layers")
            odd = sorted(set(self.layer_types) - {ATTENTION, MIXER})
            if odd:
                raise ValueError(f"layer_types has {odd}; known are {ATTENTION!r} and {MIXER!r}")
        if self.window < 0:
            raise ValueError(f"window {self.window} must be 0 or more")
        if self.short_conv not in (0, 4):
            raise ValueError(f"short_conv {self.short_conv} must be 0 or 4")
        if self.gate not in GATES:
            raise ValueError(f"gate {self.gate!r} is none of {GATES}")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is none of {NORMS}")
        if self.norm == "after_gate" and self.window:
            raise ValueError(f"norm 'after_gate' is for window 0, not window {self.window}")
        if self.window and self.state_size not in (0, self.head_dim):
            raise ValueError(f"state_size {self.state_size} must be head_dim {self.head_dim} with window {self.window}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if self.ssm_rope and rope_type not in FIXED_ROPE:
            raise ValueError(f"rope_type {rope_type!r} depends on the sequence's length; mixers take {FIXED_ROPE}")

    def shard(self, devices: int) -> HybridMambaConfig:
        """What each of so many devices computes of a layer: its share of the KV groups, whole.

        Raises:
            ValueError: groups that do not divide among them.
        """
        G = self.num_key_value_heads
        if G % devices:
            raise ValueError(f"{G} key/value heads do not divide among {devices} devices")
        part = copy.deepcopy(self)
        part.num_attention_heads //= devices
        part.num_key_value_heads //= devices
        part.state_heads //= devices
        return part

    @property
    def mixer_layers(self) -> list[int]:
        """Indices of the mixer layers."""
        return [i for i, kind in enumerate(self.layer_types or []) if kind == MIXER]

    @property
    def reach(self) -> int:
        """Tokens before a chunk whose inputs a mixer looks back on: the window's and the convolution's."""
        return self.window + max(self.short_conv - 1, 0)

    def slot_layout(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        step: int = 1,
        rewind: int = 0,
    ) -> SlotLayout:
        """What one sequence keeps in one mixer layer; the arguments are SlotLayout's."""
        return SlotLayout(
            groups=self.num_key_value_heads,
            state_heads=self.state_heads,
            query_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            state_size=self.state_size,
            window=self.window,
            conv=self.short_conv,
            dtype=dtype,
            state_dtype=state_dtype,
            step=step,
            rewind=rewind,
        )

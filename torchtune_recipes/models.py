"""Student and teacher as the recipe runs them: wrapped so that FSDP has gathered what a forward needs, and sharded.

Shapes: B rows, L tokens, M = B L, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtune.training import set_activation_checkpointing

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.loss import Distillation, distillation_loss
from mamba_hybrid.mixer import MixerCore
from mamba_hybrid.model import HybridLayer

# what `freeze` may name, and the parameters it means
PARTS = {
    "embeddings": ("embed_tokens", "lm_head"),
    "attention": ("self_attn",),
    "mixers": ("mixer",),
    "mlp": ("mlp",),
    "norms": ("norm",),
}


class Teacher(nn.Module):
    """A frozen model that gives its last hidden states, and its head, gathered, for the loss."""

    def __init__(self, model: HybridMambaForCausalLM) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def forward(self, tokens_BL: Tensor, doc_BL: Tensor) -> tuple[Tensor, Tensor]:
        h_BLD = self.model.model(tokens_BL, document_ids=doc_BL).last_hidden_state
        return h_BLD.flatten(0, 1), self.model.lm_head.weight


class Student(nn.Module):
    """The model to train, with the loss inside its forward: there FSDP has gathered the head that the loss needs."""

    def __init__(self, model: HybridMambaForCausalLM) -> None:
        super().__init__()
        self.model = model.train()

    def forward(
        self, tokens_BL: Tensor, doc_BL: Tensor, labels_BL: Tensor, teacher: tuple[Tensor, Tensor], **loss: Any
    ) -> Distillation:
        h_BLD = self.model.model(tokens_BL, document_ids=doc_BL).last_hidden_state
        return distillation_loss(h_BLD.flatten(0, 1), self.model.lm_head.weight, *teacher, labels_BL.flatten(), **loss)


def shard(
    module: Student | Teacher,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    masters: bool = False,
    compute_layers: bool = False,
    checkpoint_activations: bool = False,
) -> None:
    """FSDP2, layer by layer, each moved to the mesh's device as it is sharded; the mixers' cores are units of their
    own that stay fp32.

    Args:
        module: on the CPU, in any dtype.
        mesh: one-dimensional.
        dtype: to compute in.
        masters: keep fp32 parameters, made layer by layer, so that no process holds the whole model in fp32.
        compute_layers: torch.compile each layer.
        checkpoint_activations: keep only the layers' inputs for the backward pass.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [m for m in module.modules() if isinstance(m, HybridLayer)]
    if checkpoint_activations:
        set_activation_checkpointing(module, auto_wrap_policy={HybridLayer})
    for layer in layers:
        if masters:
            layer.float()
        if compute_layers:
            layer.compile()
        for core in (m for m in layer.modules() if isinstance(m, MixerCore)):
            fully_shard(core, mesh=mesh, mp_policy=exact)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if masters:
        for outer in (module.model.model.embed_tokens, module.model.model.norm, module.model.lm_head):
            outer.float()
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            # the loss is divided by the global number of tokens, so gradients are summed; gloo knows no other way
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

"""Student and teacher as the recipes run them: wrapped so that FSDP has gathered what a forward needs, and sharded.

Shapes: B rows, L tokens, M = B L, D model width, V vocabulary, I aligned layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mamba_hybrid_kernels import PackedDocuments
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from torchtune.training import set_activation_checkpointing

from mamba_hybrid import HybridMambaForCausalLM
from mamba_hybrid.carry import Carry
from mamba_hybrid.loss import IGNORED, Distillation, distillation_loss
from mamba_hybrid.mixer import HybridMixer, MixerCore
from mamba_hybrid.model import Attention, HybridLayer

from .masters import compute_in

# what `freeze` may name, and the parameters it means
PARTS = {
    "embeddings": ("embed_tokens", "lm_head"),
    "attention": ("self_attn",),
    "mixers": ("mixer",),
    "mlp": ("mlp",),
    "norms": ("norm",),
}


class Wrapped(nn.Module):
    """A model with a forward of another kind."""

    model: HybridMambaForCausalLM

    @property
    def head(self) -> Tensor:
        """The head (V, D)."""
        return self.model.lm_head.weight


def plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing adds."""
    return name.replace("_checkpoint_wrapped_module.", "")


class Teacher(Wrapped):
    """A frozen model that gives its last hidden states, and its head, gathered, for the loss."""

    def __init__(self, model: HybridMambaForCausalLM) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def forward(
        self, tokens_BL: Tensor, documents: Tensor | PackedDocuments, carry: Carry | None = None
    ) -> tuple[Tensor, Tensor]:
        h_BLD = self.model.model(tokens_BL, document_ids=documents, carry=carry).last_hidden_state
        return h_BLD.flatten(0, 1), self.head


class Student(Wrapped):
    """The model to train, with the loss inside its forward: there FSDP has gathered the head that the loss needs."""

    def __init__(self, model: HybridMambaForCausalLM) -> None:
        super().__init__()
        self.model = model.train()

    def forward(
        self,
        tokens_BL: Tensor,
        documents: Tensor | PackedDocuments,
        labels_BL: Tensor,
        teacher: tuple[Tensor, Tensor],
        carry: Carry | None = None,
        **loss: Any,
    ) -> Distillation:
        h_BLD = self.model.model(tokens_BL, document_ids=documents, carry=carry).last_hidden_state
        return distillation_loss(h_BLD.flatten(0, 1), self.head, *teacher, labels_BL.flatten(), **loss)

    @torch.no_grad()
    def next_tokens(self, tokens_BL: Tensor, last_B: Tensor) -> Tensor:
        """The likeliest token (B,) behind position last_B of each row; what stands after it is not looked at."""
        h_BLD = self.model.model(tokens_BL).last_hidden_state
        h_BD = h_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
        return self.model.lm_head(h_BD).argmax(-1)

    def release(self) -> None:
        """Give back what FSDP gathered for `next_tokens`, which no backward pass follows."""
        if isinstance(self, FSDPModule):
            self.reshard()


def relative_error(mine_BLD: Tensor, output_BLD: Tensor, counted_BL: Tensor) -> Tensor:
    """Squared error of each row's counted tokens relative to the square of the output (B,)."""
    error_BL, whole_BL = ((t.float() ** 2).sum(-1) * counted_BL for t in (mine_BLD - output_BLD, output_BLD))
    return error_BL.sum(1) / whole_BL.sum(1).clamp(min=1e-30)


class Aligner(Wrapped):
    """A student whose mixers learn alone, each from the teacher's attention in its place.

    Nothing is learnt through other layers, so nothing of them is kept for a backward pass. On the teacher's inputs a
    mixer's gradients are taken while the teacher is at its layer; on the student's they are taken afterwards.

    Args:
        model: the student.
        matrices: learn the attention's matrix (see `mamba_hybrid.matrices`) and not its output. The mixers' v_proj and
            o_proj, which are no part of it, are frozen.
        compute: torch.compile the outputs' loss.
    """

    def __init__(self, model: HybridMambaForCausalLM, *, matrices: bool = False, compute: bool = False) -> None:
        super().__init__()
        self.model, self.matrices = model.train(), matrices
        if matrices:
            for mixer in (m for m in model.modules() if isinstance(m, HybridMixer)):
                mixer.v_proj.requires_grad_(False)
                mixer.o_proj.requires_grad_(False)
        self.error = torch.compile(relative_error) if compute else relative_error

    def forward(self, tokens_BL: Tensor, documents: Tensor | PackedDocuments) -> None:
        """The student's forward pass, for who watches it."""
        self.model.model(tokens_BL, document_ids=documents)

    def align(
        self,
        teacher: Teacher,
        tokens_BL: Tensor,
        documents: Tensor | PackedDocuments,
        labels_BL: Tensor,
        counted: int,
        *,
        on_student: bool = False,
    ) -> Tensor:
        """Accumulate the mixers' gradients on a batch.

        A layer's loss is the squared error of the mixer's output, as it is added to the residual stream, or of its
        matrix, relative to the square of the attention's: both are means over the labelled tokens of a row. The whole
        loss is the mean over the layers.

        Args:
            teacher: with attention where this has mixers.
            tokens_BL, documents, labels_BL: see `packing.Batch`.
            counted: labels of all processes' step; a row weighs as much as it has labels.
            on_student: mixer and attention both read what the mixer reads in the student as it is, instead of what the
                attention reads in the teacher.

        Returns:
            (I,) fp32, each layer's loss summed over the batch's labels.
        """
        layers = self.model.config.mixer_layers
        counted_BL = labels_BL != IGNORED
        weight_B = counted_BL.sum(1).float()
        sums: dict[int, Tensor] = {}

        def learn(layer: int, inputs: tuple[Tensor, Any], attention: Attention, output: Tensor | None = None) -> None:
            if self.matrices:
                goal: Any = attention.queries_and_keys(*inputs)
            else:
                goal = attention(*inputs) if output is None else output
            with torch.enable_grad():
                loss = (self._errors(layer, *inputs, goal, counted_BL) * weight_B).sum()
                (loss / (counted * len(layers))).backward()
            sums[layer] = loss.detach()

        attentions = {i: teacher.model.get_submodule(f"model.layers.{i}.self_attn") for i in layers}
        with torch.no_grad():
            if on_student:
                for layer, inputs in self._inputs(tokens_BL, documents).items():
                    learn(layer, inputs, attentions[layer])
                return torch.stack([sums[i] for i in layers])
            hooks = [
                module.register_forward_hook(lambda m, inputs, output, layer=i: learn(layer, inputs, m, output))
                for i, module in attentions.items()
            ]
            with removed(hooks):
                teacher(tokens_BL, documents)
        return torch.stack([sums[i] for i in layers])

    def _errors(self, layer: int, u: Tensor, batch: Any, goal: Any, counted_BL: Tensor) -> Tensor:
        """Of each row (B,), a mixer's error on the input u."""
        mixer = self.model.get_submodule(f"model.layers.{layer}.mixer")
        if self.matrices:
            return mixer.matrix_error(u, batch.cos, batch.sin, batch.doc_BL, goal, counted_BL)
        return self.error(mixer(u, batch.cos, batch.sin, batch.doc_BL, batch.first_D1), goal, counted_BL)

    def _inputs(self, tokens_BL: Tensor, documents: Tensor | PackedDocuments) -> dict[int, tuple[Tensor, Any]]:
        """What each mixer layer's mixer reads in the student: its normed input and the batch."""
        read: dict[int, tuple[Tensor, Any]] = {}
        hooks = []
        for i in self.model.config.mixer_layers:
            # a compiled mixer would pass over hooks of its own
            layer = self.model.get_submodule(f"model.layers.{i}")
            found: dict[str, Tensor] = {}
            norm = self.model.get_submodule(f"model.layers.{i}.input_layernorm")
            hooks.append(norm.register_forward_hook(lambda _, inputs, u, found=found: found.update(u=u)))
            hooks.append(
                layer.register_forward_hook(
                    lambda _, inputs, output, i=i, found=found: read.update({i: (found["u"], inputs[1])})
                )
            )
        with removed(hooks):
            self(tokens_BL, documents)
        return read


@contextmanager
def removed(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone after the block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compute_in_fp8(model: HybridMambaForCausalLM, *, pad: bool = False) -> None:
    """Let the layers' projections multiply in fp8 (torchao, scaled by tensor as they come), with parameters as before.

    Left alone are step sizes and the mixers' cores, which set the decay, embeddings and head, and what has a side that
    is no multiple of 16, which the hardware cannot do.

    Args:
        model: the student.
        pad: copy what is multiplied to whole multiples of 16 tokens, over which the weights' gradients sum.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def chosen(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        sides = (module.in_features, module.out_features)
        return name.split(".")[-1] != "dt_proj" and all(side % 16 == 0 for side in sides)

    for layer in model.model.layers:
        convert_to_float8_training(layer, module_filter_fn=chosen, config=Float8LinearConfig(pad_inner_dim=pad))


def compile_parts(model: HybridMambaForCausalLM) -> None:
    """torch.compile what lies between the places that hooks on attention layers watch: a hook breaks a graph."""
    for layer in model.model.layers:
        assert isinstance(layer, HybridLayer)
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile()
        if layer.is_mixer:
            layer.mixer.compile()
        else:
            layer.self_attn.heads = torch.compile(layer.self_attn.heads)  # type: ignore[method-assign]


def part_of(name: str) -> str:
    """The key of `PARTS` that a parameter of this name belongs to; the module's name outside of the model."""
    parts = ("mixers", "attention", "mlp", "embeddings", "norms")
    return next((part for part in parts if any(k in name for k in PARTS[part])), name.split(".")[0])


def gradient_norms(module: nn.Module) -> dict[str, Tensor]:
    """Euclidean norm of the gradients of each part (keys of `PARTS`) that is trained, over all processes.

    Returns:
        Part -> scalar fp32, in an order that is the same everywhere.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad and p.grad is not None:
            gradients.setdefault(part_of(name), []).append(p.grad)
    norms = {}
    for part, tensors in sorted(gradients.items()):
        norm = nn.utils.get_total_norm(tensors)
        norms[part] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()
    return norms


def shard(
    module: Wrapped,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    masters: bool = False,
    compute_layers: bool = False,
    checkpoint_activations: int = 0,
    mixers_alone: bool = False,
    attention_alone: bool = False,
    offload: bool = False,
) -> None:
    """FSDP2, layer by layer; the mixers' cores are units of their own that stay fp32.

    One process has nothing to shard, and leaves FSDP out: see `masters` for its mixed precision.

    Args:
        module: on the meta device, in any dtype; `loading.fill` gives it its numbers afterwards.
        mesh: of the processes to shard over; of two dimensions (replicas, processes to shard over) for HSDP.
        dtype: to compute in.
        masters: keep fp32 parameters.
        compute_layers: torch.compile each layer.
        checkpoint_activations: of every so many layers keep only the input for the backward pass, 0 for none.
        mixers_alone, attention_alone: mixers or attention run without the layers around them.
        offload: keep the parameters in host memory, and bring each layer's to the device when it runs.
    """
    place = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [m for m in module.modules() if isinstance(m, HybridLayer)]
    if checkpoint_activations:
        chosen = {layer for layer in layers if layer.layer % checkpoint_activations == 0}
        policy_of = functools.partial(lambda_auto_wrap_policy, lambda_fn=chosen.__contains__)
        set_activation_checkpointing(module, auto_wrap_policy=policy_of)
    if compute_layers:
        # or the partitioner takes the two casts of a parameter for one (see `masters`), and keeps what it makes
        functorch_config.ban_recompute_materialized_backward = False
        # graphs of all layers: two kinds, with gradients and without; of long rows the first chunk and those behind it,
        # at the first such length and at any
        dynamo_config.recompile_limit = 16
        for layer in layers:
            (layer.mixer if mixers_alone and layer.is_mixer else layer).compile()
    if masters:
        module.float()
    if mesh.size() == 1 and not offload:
        if masters:
            compute_in(module, dtype)
        else:
            module.to(dtype)
            for core in (m for m in module.modules() if isinstance(m, MixerCore)):
                core.float()
        return
    for layer in layers:
        for core in (m for m in layer.modules() if isinstance(m, MixerCore)):
            fully_shard(core, mesh=mesh, mp_policy=exact, offload_policy=place)
        if mixers_alone and layer.is_mixer:
            fully_shard(layer.mixer, mesh=mesh, mp_policy=policy, offload_policy=place)
            register_fsdp_forward_method(layer.mixer, "matrix_error")
            register_fsdp_forward_method(layer.mixer.core, "matrix_error")
        if attention_alone and not layer.is_mixer:
            fully_shard(layer.self_attn, mesh=mesh, mp_policy=policy, offload_policy=place)
            register_fsdp_forward_method(layer.self_attn, "queries_and_keys")
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=place)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=False)
    if isinstance(module, Student):
        register_fsdp_forward_method(module, "next_tokens")
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            # the loss is divided by the global number of tokens, so gradients are summed; gloo knows no other way
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

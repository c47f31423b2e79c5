"""Bytes of activations on a GPU, counted without one: the models' own code runs on tensors without memory.

Shapes: B rows, L tokens of a row, M = B L, D model width, E teacher width, V vocabulary, H query heads, P head width.

PyTorch's meta device makes every tensor that a step makes, with its size and without its content, and autograd keeps
and frees them as it would. `OnGPU` answers for the GPU where the code asks for one, so that what runs is what runs
there: the Triton SSD, SDPA's GPU kernels, half-precision products with fp32 sums.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mamba_hybrid_kernels import packed_runs
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba_hybrid.config import HybridMambaConfig
from mamba_hybrid.logprob import sequence_log_probs
from mamba_hybrid.loss import distillation_loss
from mamba_hybrid.model import Attention, Batch, HybridLayer, HybridMambaModel, LlamaRMSNorm

from .gates import blend, recall_loss
from .masters import compute_in
from .models import relative_error

META = torch.device("meta")
_IS_CUDA = vars(torch._C.TensorBase)["is_cuda"].__get__


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that are still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):  # what was there before is not counted
                self._note(t, 0)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t, t.untyped_storage().nbytes())
        return out

    def _note(self, t: Tensor, size: int) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            size = math.ceil(size / 512) * 512  # as the caching allocator rounds
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class OnGPU(TorchFunctionMode):
    """Makes the code under it take the ways that it takes on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return True
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in (torch.mm, torch.addmm) and "out_dtype" in kwargs:
            *_, a, b = args
            return kwargs["out"] if "out" in kwargs else a.new_empty(a.shape[0], b.shape[1], dtype=kwargs["out_dtype"])
        return func(*args, **kwargs)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What SDPA's dispatcher takes on a Hopper GPU: flash attention has no masks, cuDNN's has them, as addends."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    mask = torch.where(attn_mask, 0.0, -math.inf).to(q.dtype)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, mask, True, dropout_p, is_causal, False, scale=scale
    )[0]


@dataclass(frozen=True)
class Pass:
    """Bytes of one piece of a model, the parameters' own left out.

    Args:
        kept: alive after its forward pass until its backward pass.
        forward: the most at once in its forward pass.
        backward: the most at once in its backward pass, what it kept and its parameters' gradients included.
    """

    kept: int
    forward: int
    backward: int


def _measure(forward: Callable[[], Tensor], *, grad: bool) -> Pass:
    with Live() as live:
        with OnGPU(), torch.set_grad_enabled(grad):
            out = forward()
        kept, peak = live.now, live.peak
        if not grad:
            return Pass(kept, peak, 0)
        live.peak = live.now
        out.backward(torch.empty_like(out))  # which is in the peak, as the gradient that comes from above
        return Pass(kept, peak, live.peak)


class Shapes:
    """Pieces of a model on batches of one size.

    Args:
        config: the model's.
        batch, length: B and L.
        dtype: to compute in.
        trains: whether a parameter of this name is trained.
        masters: parameters are fp32, and cast where they are multiplied with (see `masters`).
    """

    def __init__(
        self,
        config: HybridMambaConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        trains: Callable[[str], bool] = lambda name: True,
        *,
        masters: bool = False,
    ) -> None:
        self.config, self.B, self.L, self.dtype, self.trains = config, batch, length, dtype, trains
        self.masters, self.stored = masters, torch.float32 if masters else dtype

    def hidden(self, *, grad: bool = False) -> Tensor:
        """Hidden states (B, L, D)."""
        return torch.empty(
            self.B, self.L, self.config.hidden_size, dtype=self.dtype, device=META, requires_grad=grad
        )  # fmt: skip

    def _shared(self) -> Batch:
        N = self.config.head_dim
        doc_BL = torch.zeros(self.B, self.L, dtype=torch.int64, device=META)
        cos = torch.empty(self.B, self.L, N, device=META)
        with OnGPU():
            packed = packed_runs(self.hidden(), N)
        mask = None if packed else HybridMambaModel._mask(self.L, 0, None, doc_BL, META)
        first_D1 = torch.empty(self.B + 1, dtype=torch.int32, device=META) if packed else None
        return Batch(cos, torch.empty_like(cos), mask, doc_BL, first_D1)

    def shared(self) -> int:
        """Bytes of what the layers of a forward pass share: mask, rotary tables, document ids."""
        b = self._shared()
        return sum(t.nbytes for t in (b.cos, b.sin, b.mask, b.doc_BL) if t is not None)

    def module(self, make: Callable[[], Any], prefix: str = "") -> Any:
        """A module on the meta device as it computes: the mixers' cores in fp32."""
        with META:
            module = make()
        for name, p in module.named_parameters():
            p.data = p.data.to(torch.float32 if "core." in name else self.stored)
            p.requires_grad_(self.trains(prefix + name))
        if self.masters:
            compute_in(module, self.dtype)
        return module

    def layer(self, index: int, *, grad: bool) -> Pass:
        """A layer, with the gradient of its input."""
        layer = self.module(lambda: HybridLayer(self.config, index), f"layers.{index}.")
        if not grad and layer.is_mixer:
            _no_readout_kernel(layer.mixer.core)
        h_BLD, batch = self.hidden(grad=grad), self._shared()
        return _measure(lambda: layer(h_BLD, batch), grad=grad)

    def blend(self, index: int) -> Pass:
        """A layer with a mixer and attention beside it, and a gate that is trained between them; the gradient of its
        input too, but for the first layer's, which needs none."""
        layer = self.module(lambda: HybridLayer(self.config, index), f"layers.{index}.")
        attention = self.module(lambda: Attention(self.config, index), f"layers.{index}.self_attn.")
        blend(layer, attention).gate = torch.empty((), device=META, requires_grad=True)
        h_BLD, batch = self.hidden(grad=index > 0), self._shared()
        return _measure(lambda: layer(h_BLD, batch), grad=True)

    def norm(self) -> Pass:
        """The norm after the last layer."""
        norm = self.module(lambda: LlamaRMSNorm(self.config.hidden_size), "norm.")
        h_BLD = self.hidden(grad=True)
        return _measure(lambda: norm(h_BLD), grad=True)

    def _head(self, *, grad: bool) -> Tensor:
        """The head (V, D); the losses cast it."""
        shape = self.config.vocab_size, self.config.hidden_size
        trained = grad and self.trains("lm_head.weight")
        return torch.empty(shape, dtype=self.stored, device=META, requires_grad=trained)

    def loss(self, teacher: HybridMambaConfig, *, grad: bool = True, **setting: Any) -> Pass:
        """The chunked loss behind the heads, with the gradients of hidden states and head."""
        M, V = self.B * self.L, self.config.vocab_size

        def of(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=self.dtype, device=META)

        h_MD, head_VD = of(M, self.config.hidden_size).requires_grad_(grad), self._head(grad=grad)
        t_ME, t_head_VE = of(M, teacher.hidden_size), of(V, teacher.hidden_size)
        labels_M = torch.empty(M, dtype=torch.int64, device=META)

        def loss() -> Tensor:
            return distillation_loss(h_MD, head_VD, t_ME, t_head_VE, labels_M, **setting).loss

        return _measure(loss, grad=grad)

    def log_probs(self, chunk: int, *, grad: bool) -> Pass:
        """The log-probabilities of answers that fill the rows (see `dpo_hybrid.Scorer`), as one sequence."""
        h_BLD, head_VD = self.hidden(grad=grad), self._head(grad=grad)
        at_M, labels_M = torch.empty(2, self.B * self.L, dtype=torch.int64, device=META).unbind()
        sizes_1 = torch.empty(1, dtype=torch.int64, device=META)

        def total() -> Tensor:
            h_MD = h_BLD.flatten(0, 1).index_select(0, at_M)
            return sequence_log_probs(h_MD, head_VD, labels_M, sizes_1, chunk_tokens=chunk)

        return _measure(total, grad=grad)

    def recall(self, pairs: int, *, grad: bool) -> Pass:
        """The logits of so many tokens of a row, that a row of recall asks for, and their cross-entropy."""
        h_BLD, head_VD = self.hidden(grad=grad), self._head(grad=grad)
        at_BA, answer_BA = torch.empty(2, self.B, pairs, dtype=torch.int64, device=META).unbind()
        return _measure(lambda: recall_loss(h_BLD, head_VD, at_BA, answer_BA)[0], grad=grad)

    def aligned(self, index: int) -> Pass:
        """A mixer beside the attention's output that it learns, with the loss (see `models.Aligner`)."""
        layer = self.module(lambda: HybridLayer(self.config, index), f"layers.{index}.")
        u_BLD, output_BLD, batch = self.hidden(), self.hidden(), self._shared()
        counted_BL = torch.empty(self.B, self.L, dtype=torch.bool, device=META)

        def loss() -> Tensor:
            mine = layer.mixer(u_BLD, batch.cos, batch.sin, batch.doc_BL, batch.first_D1)
            return relative_error(mine, output_BLD, counted_BL).sum()

        return _measure(loss, grad=True)


def _no_readout_kernel(core: Any) -> None:
    """Without gradients the readout is a Triton launch, which makes its output and nothing else."""

    def readout(near: Tensor | None, far: Tensor, z: Tensor | None) -> Tensor:
        out = far.flatten(-2)
        return torch.empty_like(out if z is None else z, dtype=torch.float32 if z is None else z.dtype)

    core.readout = readout

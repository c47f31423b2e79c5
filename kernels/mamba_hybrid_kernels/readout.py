"""The mixer's readout: norm of the state's output per head, weights of window and state, gate.

Shapes: M tokens (any leading dimensions in the reference), H query heads, P head width.

    norm before the gate:  out = (near n_h + RMSNorm(far_h) f_h) gate(z_h)
    norm after the gate:   out = RMSNorm(far_h gate(z_h)) f_h             (the paper's; it has no window)

with gate(z) = 2 sigmoid(z), silu(z) or 1. One launch instead of eight passes over M x H x P numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = ("none", "sigmoid", "silu")


def head_norm(y: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in fp32, without a weight."""
    y = y.float()
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


def open_gate(z: Tensor, gate: str) -> Tensor:
    """gate(z) in fp32."""
    return F.silu(z.float()) if gate == "silu" else 2 * torch.sigmoid(z.float())


def readout_reference(near, far, z, near_weight_HP, far_weight_HP, gate: str, norm: str, eps: float) -> Tensor:
    """`readout` in plain PyTorch, differentiable, any leading dimensions."""
    # on flat heads: no view of a weight leaves this function, which FSDP would warn about
    factor: Tensor | float = 1.0 if z is None else open_gate(z, gate)
    far_weight = far_weight_HP.float().flatten()
    if norm == "after_gate":
        out = head_norm((far.float().flatten(-2) * factor).view_as(far), eps).flatten(-2) * far_weight
    else:
        out = head_norm(far, eps).flatten(-2) * far_weight
        if near is not None:
            out = out + near.float().flatten(-2) * near_weight_HP.float().flatten()
        out = out * factor
    return out if z is None else out.to(z.dtype)


def readout(
    near: Tensor | None,
    far: Tensor,
    z: Tensor | None,
    near_weight_HP: Tensor | None,
    far_weight_HP: Tensor,
    *,
    gate: str = "sigmoid",
    norm: str = "before_gate",
    eps: float = 1e-5,
    live: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What o_proj reads.

    Args:
        near: (..., H, P) attention over the window, None without one.
        far: (..., H, P) what the state says.
        z: (..., H P) the gate's input, None without a gate.
        near_weight_HP, far_weight_HP: weights, fp32; near's is None without a window.
        gate: "sigmoid", "silu" or "none".
        norm: "before_gate" or "after_gate".
        eps: of the norm.
        live: (1,) integer on the device, how many of the M tokens are no padding; the others become 0.
        out: where to write, (M, H P), contiguous; allocated when None.
        backend: "reference" (plain PyTorch, differentiable) or "triton" (no gradients); None is Triton on a GPU where
            no gradient is asked for.

    Returns:
        (..., H P) in z's dtype, fp32 without a gate.

    Raises:
        ValueError: an unknown gate or backend.

    Example:
        >>> near = far = torch.ones(3, 2, 4)
        >>> readout(near, far, torch.zeros(3, 8), torch.ones(2, 4), torch.ones(2, 4)).shape
        torch.Size([3, 8])
    """
    if gate not in GATES or (gate == "none") != (z is None):
        raise ValueError(f"gate {gate!r} is none of {GATES}, or z does not fit it")
    backend = backend or ("triton" if far.is_cuda and not torch.is_grad_enabled() else "reference")
    if backend == "reference":
        result = readout_reference(near, far, z, near_weight_HP, far_weight_HP, gate, norm, eps)
        if live is not None:
            result[int(live) :] = 0
        return result if out is None else out.copy_(result)
    if backend != "triton":
        raise ValueError(f"backend {backend!r} is none of 'reference', 'triton'")
    from .readout_launch import launch  # Triton is needed to run, not to import

    return launch(near, far, z, near_weight_HP, far_weight_HP, live, out, gate, norm, eps)

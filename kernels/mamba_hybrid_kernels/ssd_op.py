"""The Triton SSD as a PyTorch operator with gradients: `torch.ops.mamba_hybrid.ssd`.

Shapes: B batch, L length, H query heads, G key/value heads, S state heads, P head width, N state width.

torch.compile sees one node forward and one backward, and selective activation checkpointing can name
`torch.ops.mamba_hybrid.ssd.default`. Kept for the backward are the inputs only: the states entering the chunks are
computed again, which costs a fraction of the forward and saves K S P N numbers a layer.
"""

import torch
from torch import Tensor


@torch.library.custom_op("mamba_hybrid::ssd", mutates_args=())
def ssd_op(
    x_BLGP: Tensor,
    dt_BLS: Tensor,
    A_S: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_H: Tensor,
    doc_BL: Tensor | None,
    state_BSPN: Tensor | None,
    delay: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`ssd_forward` without the states entering the chunks.

    Args:
        x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, doc_BL, state_BSPN, delay, chunk: as in `ssd_forward`.

    Returns:
        y (B, L, H, P) in x's dtype and the final states (B, S, P, N) fp32.
    """
    from .ssd_forward import ssd_forward  # Triton is needed to run, not to import

    with torch.cuda.device_of(x_BLGP):
        y_BLHP, final_BSPN, _ = ssd_forward(
            x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, delay=delay, doc_BL=doc_BL, state_BSPN=state_BSPN, chunk=chunk
        )
    return y_BLHP, final_BSPN


@ssd_op.register_fake
def _(x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, doc_BL, state_BSPN, delay, chunk):
    b, L, _, P = x_BLGP.shape
    final_BSPN = x_BLGP.new_empty(b, dt_BLS.shape[2], P, B_BLGN.shape[3], dtype=torch.float32)
    return x_BLGP.new_empty(b, L, C_BLHN.shape[2], P), final_BSPN


@torch.library.custom_op("mamba_hybrid::ssd_backward", mutates_args=())
def ssd_backward_op(
    dy_BLHP: Tensor,
    last_grad_BSPN: Tensor | None,
    x_BLGP: Tensor,
    dt_BLS: Tensor,
    A_S: Tensor,
    B_BLGN: Tensor,
    C_BLHN: Tensor,
    D_H: Tensor,
    doc_BL: Tensor | None,
    state_BSPN: Tensor | None,
    delay: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `ssd_op`.

    Args:
        dy_BLHP: gradient of y.
        last_grad_BSPN: gradient of the final states, None for zero.
        x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, doc_BL, state_BSPN, delay, chunk: as in `ssd_op`.

    Returns:
        Gradients of x, dt, A, B, C, D and the initial states.
    """
    from .ssd_backward import entering_states, ssd_backward

    with torch.cuda.device_of(x_BLGP):
        enter_BKSPN = entering_states(
            x_BLGP, dt_BLS, A_S, B_BLGN, delay=delay, doc_BL=doc_BL, state_BSPN=state_BSPN, chunk=chunk
        )
        return ssd_backward(
            dy_BLHP, last_grad_BSPN, x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, enter_BKSPN,
            delay=delay, doc_BL=doc_BL, chunk=chunk,
        )  # fmt: skip


@ssd_backward_op.register_fake
def _(dy_BLHP, last_grad_BSPN, x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H, doc_BL, state_BSPN, delay, chunk):
    b, _, _, P = x_BLGP.shape
    first_grad_BSPN = x_BLGP.new_empty(b, dt_BLS.shape[2], P, B_BLGN.shape[3], dtype=torch.float32)
    return *(t.new_empty(t.shape) for t in (x_BLGP, dt_BLS, A_S, B_BLGN, C_BLHN, D_H)), first_grad_BSPN


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.delay, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy_BLHP: Tensor | None, last_grad_BSPN: Tensor | None):
    x_BLGP, *others, state_BSPN = ctx.saved_tensors
    if dy_BLHP is None:
        dy_BLHP = x_BLGP.new_zeros(*others[3].shape[:3], x_BLGP.shape[3])
    *grads, first_grad_BSPN = ssd_backward_op(
        dy_BLHP, last_grad_BSPN, x_BLGP, *others, state_BSPN, ctx.delay, ctx.chunk
    )
    return *grads, None, None if state_BSPN is None else first_grad_BSPN, None, None


ssd_op.register_autograd(_backward, setup_context=_setup_context)

"""Closed-form calibration of one mixer against the attention layer that it replaces. No gradients.

Shapes: B batch, L length, D model width, H query heads, S state heads, P head width.

With near and far the two parts of a head on the calibration tokens and t the attention head's own output, a head
gets the weights (n_h, f_h) that minimise |n near + f far - t|^2, and a state the half-life at which its heads' sum
of these is least. Then the output projection is fitted again, pulled to the attention's own:

    W = argmin |Y W - target|^2 + lambda |W - W_0|^2,   lambda = ridge * mean diagonal of Y^T Y
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .mixer import HybridMixer

# in tokens; from a few words to as good as never forgetting
HALF_LIVES = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 100_000)


@dataclass
class Fit:
    """What calibrating one layer did.

    Args:
        before, after: relative squared error of the layer's output against the target, with the projections only
            copied and after the fit, |out - target|^2 / |target|^2.
        half_lives: the chosen half-life of each state, in tokens.
    """

    before: float
    after: float
    half_lives: list[int]


def relative_error(out: Tensor, target: Tensor) -> float:
    """|out - target|^2 / |target|^2."""
    return float((out - target).pow(2).sum() / target.pow(2).sum())


@torch.no_grad()
def calibrate_mixer(
    mixer: HybridMixer,
    u_BLD: Tensor,
    heads_BLHP: Tensor,
    target_BLD: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    ridge: float = 0.1,
    half_lives: tuple[int, ...] = HALF_LIVES,
) -> Fit:
    """Set a mixer's decays, near and far weights and output projection from data.

    Args:
        mixer: with the attention's projections copied; its core is reset.
        u_BLD: the layer's normed input, fp32.
        heads_BLHP: what the attention's heads put out at these tokens.
        target_BLD: what the layer's output should be.
        cos, sin: rotary tables (1, L, P).
        ridge: strength of the pull of o_proj to the attention's.
        half_lives: candidates, in tokens.

    Returns:
        Errors before and after, and the half-lives.
    """
    core = mixer.core
    core.reset()
    H, S = core.config.num_attention_heads, core.config.state_heads
    before = relative_error(mixer(u_BLD, cos, sin), target_BLD)
    q, k, v, dt, z = mixer.project(u_BLD)
    device = u_BLD.device
    best_S, a_log_S = torch.full((S,), float("inf"), device=device), torch.zeros(S, device=device)
    near_H, far_H = torch.ones(2, H, device=device)
    chosen = [0] * S
    sums = (0, 1, 3)
    t = heads_BLHP.float()
    tt = t.pow(2).sum(sums)
    x, b, c = core.inputs(q, k, v, cos, sin, None)
    near = core.near(x, b, c, None)
    if near is not None:
        near = near.float()
        nn, nt = near.pow(2).sum(sums), (near * t).sum(sums)
    for half_life in half_lives:
        core.A_log.fill_(math.log(math.log(2) / half_life))  # dt is 1
        far = core.norm(core.far(x, b, c, dt, None)[0])
        ff, ft = far.pow(2).sum(sums), (far * t).sum(sums)
        if near is None:
            n_H, f_H = torch.zeros_like(ff), ft / ff
            error_H = tt - f_H * ft
        else:
            nf = (near * far).sum(sums)
            det = nn * ff - nf * nf + 1e-6 * nn * ff
            n_H, f_H = (nt * ff - ft * nf) / det, (ft * nn - nt * nf) / det
            error_H = tt - n_H * nt - f_H * ft
        error_S = error_H.view(S, H // S).sum(1)
        better_S = error_S < best_S
        better_H = better_S.repeat_interleave(H // S)
        best_S = torch.where(better_S, error_S, best_S)
        a_log_S = torch.where(better_S, core.A_log, a_log_S)
        near_H, far_H = torch.where(better_H, n_H, near_H), torch.where(better_H, f_H, far_H)
        chosen = [half_life if b else c for b, c in zip(better_S.tolist(), chosen, strict=True)]
    core.A_log.copy_(a_log_S)
    core.far_weight.copy_(far_H[:, None].expand_as(core.far_weight))
    if core.config.window:
        core.near_weight.copy_(near_H[:, None].expand_as(core.near_weight))

    y = core(q, k, v, dt, z, cos, sin)[0].flatten(0, 1).double()
    want = target_BLD.flatten(0, 1).double()
    if mixer.o_proj.bias is not None:
        want = want - mixer.o_proj.bias.double()
    gram = y.T @ y
    pull = ridge * gram.diagonal().mean()
    gram.diagonal().add_(pull)
    w0 = mixer.o_proj.weight.double()
    mixer.o_proj.weight.copy_(torch.linalg.solve(gram, y.T @ want + pull * w0.T).T)
    return Fit(before, relative_error(mixer(u_BLD, cos, sin), target_BLD), chosen)

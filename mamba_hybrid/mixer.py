"""The mixer: grouped-query SSD with a window of softmax attention, started from attention's weights.

Shapes: B batch, L length, M tokens of a ragged step, D model width, H query heads, G key/value heads, S state
heads, P head width, N state width.

Per token, with u the normed hidden state: v -> x (G,P), k -> B (G,N), q -> C (H,N), gate z (H,P), step dt (S);
far is the SSD's output normed per head, near the softmax attention over the last `window` tokens:

    out = o_proj((near n_h + RMSNorm(far) f_h) gate(z))

The state sees a token only when it has left the window, so that no token counts twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mamba_hybrid_kernels import (
    SlotLayout,
    SlotTensors,
    StepRows,
    head_norm,
    open_gate,
    packed_attention,
    readout,
    replay,
    short_conv,
    short_conv_step,
    ssd,
    window_attention,
)
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .config import HybridMambaConfig
from .matrices import MixingFactors, matrix_error

STEP_BIAS = 0.541324854612918  # softplus(STEP_BIAS) = 1


class MixerCore(nn.Module):
    """Everything of a mixer between its projections. All its parameters need fp32 and no weight decay.

    Parameters: A_log (S), dt_bias (S), D (H), far_weight and, with a window, near_weight (H, P); with a short
    convolution conv_weight (channels, 4), conv_bias and conv_silu, the learned share of SiLU after it (1 is the
    paper's, 0 none).

    Args:
        config: the model's.
    """

    def __init__(self, config: HybridMambaConfig) -> None:
        super().__init__()
        self.config = config
        H, S, P = config.num_attention_heads, config.state_heads, config.head_dim
        self.A_log = nn.Parameter(torch.zeros(S))
        self.dt_bias = nn.Parameter(torch.full((S,), STEP_BIAS))
        self.D = nn.Parameter(torch.zeros(H))
        self.far_weight = nn.Parameter(torch.ones(H, P))
        if config.window:
            self.near_weight = nn.Parameter(torch.ones(H, P))
        if config.short_conv:
            channels = config.slot_layout().channels
            self.conv_weight = nn.Parameter(torch.zeros(channels, config.short_conv))
            self.conv_bias = nn.Parameter(torch.zeros(channels))
            self.conv_silu = nn.Parameter(torch.zeros(1))
        self.reset()

    def reset(self) -> None:
        """The neutral start: dt 1, decay exp(-1), near and far as they are, identity convolution.

        Through transformers' init functions, which leave alone what a checkpoint has filled."""
        init.zeros_(self.A_log)
        init.constant_(self.dt_bias, STEP_BIAS)
        init.zeros_(self.D)
        init.ones_(self.far_weight)
        if self.config.window:
            init.ones_(self.near_weight)
        if self.config.short_conv:
            identity = torch.zeros_like(self.conv_weight)
            identity[:, -1] = 1
            init.copy_(self.conv_weight, identity)
            init.zeros_(self.conv_bias)
            init.zeros_(self.conv_silu)

    @property
    def A_S(self) -> Tensor:
        """Decay rates, negative."""
        return -self.A_log.float().exp()

    def step_size(self, raw: Tensor) -> Tensor:
        """dt (..., S) from its projection, fp32."""
        return F.softplus(raw.float() + self.dt_bias.float())

    def split(self, q: Tensor, k: Tensor, v: Tensor, conv) -> tuple[Tensor, Tensor, Tensor]:
        """(x, B, C) with heads apart, from the projections' flat outputs, through the convolution if there is one.

        Args:
            q, k, v: (..., H N), (..., G N), (..., G P).
            conv: function of the raw channels (..., x|B|C) and the convolution's weight and bias.
        """
        c = self.config
        H, G, P, N = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.state_size
        if c.short_conv:
            y = conv(torch.cat([v, k, q], -1), self.conv_weight, self.conv_bias)
            y = torch.lerp(y, F.silu(y), self.conv_silu.to(y.dtype))
            v, k, q = y.split([G * P, G * N, H * N], -1)
        return v.unflatten(-1, (G, P)), k.unflatten(-1, (G, N)), q.unflatten(-1, (H, N))

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding on (..., heads, N) with cos, sin (..., N)."""
        if not self.config.ssm_rope:
            return q, k
        return apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype), unsqueeze_dim=-2)

    def inputs(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, doc_BL: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, G, P), B (B, L, G, N) and C (B, L, H, N) of whole sequences, convolved and rotated."""
        x, b, c = self.split(q, k, v, lambda raw, weight, bias: short_conv(raw, weight, bias, doc_BL=doc_BL))
        c, b = self.rotate(c, b, cos, sin)
        return x, b, c

    def near(
        self, x: Tensor, b: Tensor, c: Tensor, doc_BL: Tensor | None, first_D1: Tensor | None = None
    ) -> Tensor | None:
        """Attention over the window (B, L, H, P) before its weight, None without a window."""
        window = self.config.window
        if not window:
            return None
        if first_D1 is None or self.config.state_size != self.config.head_dim:
            return window_attention(c, b, x, window, doc_BL=doc_BL)
        return packed_attention(c, b, x, first_D1, window=window)

    def far(
        self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, doc_BL: Tensor | None, state_BSPN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The SSD on what has left the window (B, L, H, P), not normed, and the state after it (B, S, P, N)."""
        return ssd(
            x, self.step_size(dt), self.A_S, b, c, self.D,
            delay=self.config.window, doc_BL=doc_BL, state_BSPN=state_BSPN,
        )  # fmt: skip

    def norm(self, y: Tensor) -> Tensor:
        """RMSNorm per head, fp32, without its weight."""
        return head_norm(y, self.config.rms_norm_eps)

    def readout(self, near: Tensor | None, far: Tensor, z: Tensor | None) -> Tensor:
        """(..., H P) for o_proj, in z's dtype (fp32 without a gate)."""
        c = self.config
        near_weight = self.near_weight if c.window else None
        return readout(
            near, far, z, near_weight, self.far_weight, gate=c.gate, norm=c.norm, eps=c.rms_norm_eps
        )  # fmt: skip

    def forward(self, q, k, v, dt, z, cos, sin, doc_BL=None, first_D1=None, state_BSPN=None) -> tuple[Tensor, Tensor]:
        """Whole sequences, or a chunk that follows a state.

        Args:
            q, k, v, dt, z: the projections' outputs (B, L, ...); z None without a gate.
            cos, sin: rotary tables (B or 1, L, N).
            doc_BL: integer document ids (B, L), None for one document a row.
            first_D1: where documents begin, see `document_starts`; None for a window with a mask, as a chunk needs.
            state_BSPN: of what came before the inputs but for the convolution's taps; the inputs then begin with the
                `config.reach` tokens before the chunk. None at the start of a row.

        Returns:
            The input of o_proj (B, L, H P), after a state without the `reach` tokens before the chunk; and the state of
            all tokens but the last `window` (B, S, P, N).
        """
        x, b, c = self.inputs(q, k, v, cos, sin, doc_BL)
        if state_BSPN is not None and (taps := max(self.config.short_conv - 1, 0)):
            # these the convolution needed, and the state holds them
            x, b, c, dt = (t[:, taps:] for t in (x, b, c, dt))
            doc_BL = None if doc_BL is None else doc_BL[:, taps:]
        near, (far, last_BSPN) = self.near(x, b, c, doc_BL, first_D1), self.far(x, b, c, dt, doc_BL, state_BSPN)
        if state_BSPN is not None:
            near = None if near is None else near[:, self.config.window :]
            far = far[:, self.config.window :]
            z = None if z is None else z[:, self.config.reach :]
        return self.readout(near, far, z).to(q.dtype), last_BSPN

    def matrix_error(self, q, k, v, dt, z, cos, sin, doc_BL, attention, counted_BL) -> Tensor:
        """How far the mixer's matrices are from an attention's; the values learn nothing. Without a convolution.

        Args:
            q, k, v, dt, z, cos, sin, doc_BL: as `forward`.
            attention, counted_BL: see `matrices.matrix_error`.

        Returns:
            (B,) fp32.
        """
        c = self.config
        x, b, queries = self.inputs(q, k, v.detach(), cos, sin, doc_BL)
        gate_BLHP = None if z is None else open_gate(z, c.gate).unflatten(-1, (-1, c.head_dim))
        factors = MixingFactors(
            x, b, queries, self.step_size(dt), self.A_S, self.D, gate_BLHP, self.near_weight if c.window else None,
            self.far_weight, c.window, c.norm == "after_gate", c.rms_norm_eps,
        )  # fmt: skip
        return matrix_error(factors, attention, doc_BL, counted_BL)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        z: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        slots: SlotTensors,
        layout: SlotLayout,
        rows: StepRows,
    ) -> Tensor:
        """A ragged batch that continues from its slots, which it updates; see `mamba_hybrid_kernels.replay`.

        Args:
            q, k, v, dt, z: the projections' outputs for all rows' tokens one after another (M, ...).
            cos, sin: rotary tables (M, N).
            slots, layout, rows: as in `replay`.

        Returns:
            (M, H P), the input of o_proj.
        """

        def conv(raw: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return short_conv_step(slots, layout, rows, raw, weight, bias)

        x, b, c = self.split(q, k, v, conv)
        c, b = self.rotate(c, b, cos, sin)
        near, far = replay(slots, layout, rows, x, self.step_size(dt), self.A_S, b, c, self.D)
        return self.readout(near, far, z).to(q.dtype)


class MixerPast(NamedTuple):
    """What a mixer needs of the tokens before a chunk, without gradient.

    Args:
        u: its inputs of the last `config.reach` tokens (B, reach, D), which window and convolution look back on.
        cos, sin, doc: rotary tables and document ids of these.
        state: of the tokens before the last `window`, of the last token's document (B, S, P, N) fp32.
        last: that document (B,).
    """

    u: Tensor
    cos: Tensor
    sin: Tensor
    doc: Tensor
    state: Tensor
    last: Tensor


class ZeroLinear(nn.Linear):
    """A projection that starts at zero, so that what it steers starts neutral."""


class StepLinear(ZeroLinear):
    """The projection to step sizes: a handful of rows that set the decay, never quantised. transformers' way to leave
    it alone keeps it in fp32 when the rest is fp16, so its input is cast."""

    def forward(self, u: Tensor) -> Tensor:
        return F.linear(u.to(self.weight.dtype), self.weight)


class HybridMixer(nn.Module):
    """A mixer layer: attention's projections, a gate and a step-size projection, around `MixerCore`.

    Args:
        config: the model's.
    """

    def __init__(self, config: HybridMambaConfig) -> None:
        super().__init__()
        D, H, G = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        P, N = config.head_dim, config.state_size
        self.q_proj = nn.Linear(D, H * N, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * N, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * P, bias=config.qkv_bias)
        gate = ZeroLinear if config.gate == "sigmoid" else nn.Linear
        self.z_proj = gate(D, H * P, bias=False) if config.gate != "none" else None
        self.dt_proj = StepLinear(D, config.state_heads, bias=False)
        self.o_proj = nn.Linear(H * P, D, bias=config.o_bias)
        self.core = MixerCore(config)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(q, k, v, dt, z) of u (..., D)."""
        z = None if self.z_proj is None else self.z_proj(u)
        return self.q_proj(u), self.k_proj(u), self.v_proj(u), self.dt_proj(u), z

    def forward(
        self,
        u_BLD: Tensor,
        cos: Tensor,
        sin: Tensor,
        doc_BL: Tensor | None = None,
        first_D1: Tensor | None = None,
    ) -> Tensor:
        """Whole sequences, (B, L, D) -> (B, L, D)."""
        return self.o_proj(self.core(*self.project(u_BLD), cos, sin, doc_BL, first_D1)[0].to(u_BLD.dtype))

    def chunk(
        self, u_BLD: Tensor, cos: Tensor, sin: Tensor, doc_BL: Tensor, past: MixerPast | None
    ) -> tuple[Tensor, MixerPast]:
        """A chunk of a long row, (B, L, D) -> (B, L, D), and what the next chunk needs of it.

        Args:
            u_BLD, cos, sin, doc_BL: as `forward`, of the chunk alone.
            past: what the chunk before gave, None for the first.
        """
        reach, state, u, doc = self.core.config.reach, None, u_BLD, doc_BL
        if past is not None:
            u, cos, sin, doc = (
                torch.cat(pair, 1) for pair in ((past.u, u), (past.cos, cos), (past.sin, sin), (past.doc, doc))
            )
            # the scan gives an initial state to the document of its first token; without a window that is a new one
            first = doc[:, reach - self.core.config.window]
            state = torch.where((first == past.last)[:, None, None, None], past.state, 0)
        y, last = self.core(*self.project(u), cos, sin, doc, None, state)
        kept = slice(u.shape[1] - reach, None)
        after = MixerPast(
            u[:, kept].detach(), cos[:, kept], sin[:, kept], doc[:, kept], state=last.detach(), last=doc_BL[:, -1]
        )
        return self.o_proj(y.to(u.dtype)), after

    def matrix_error(self, u_BLD: Tensor, cos: Tensor, sin: Tensor, doc_BL: Tensor | None, *where) -> Tensor:
        """See `MixerCore.matrix_error`; `where` is attention and counted_BL."""
        return self.core.matrix_error(*self.project(u_BLD), cos, sin, doc_BL, *where)

    def step(self, u_MD: Tensor, cos: Tensor, sin: Tensor, *where) -> Tensor:
        """A ragged step, (M, D) -> (M, D); `where` is slots, layout and rows."""
        return self.o_proj(self.core.step(*self.project(u_MD), cos, sin, *where).to(u_MD.dtype))

"""Kernels of mamba_hybrid: each beside its plain-PyTorch reference, which is also the CPU path.

- `ssd`: the state-space recurrence over whole sequences (training, scoring).
- `window`: softmax attention over the last `window` tokens; `packed`: attention within documents, without a mask.
- `forward_kl`: divergence of two models' logits and its gradient.
- `readout`: norm, weights and gate after window and state.
- `slot`, `rows` and `replay`: what one sequence keeps between steps, the sequences of a step, and the step itself.
"""

from .conv import short_conv, short_conv_step
from .forward_kl import ForwardKL, forward_kl
from .packed import PackedDocuments, document_starts, packed_attention, packed_runs
from .readout import head_norm, open_gate, readout
from .replay import replay
from .rows import StepRows
from .slot import SlotLayout, SlotTensors
from .ssd import delay, ssd
from .window import window_attention

__all__ = [
    "ForwardKL",
    "PackedDocuments",
    "SlotLayout",
    "SlotTensors",
    "StepRows",
    "delay",
    "document_starts",
    "forward_kl",
    "head_norm",
    "open_gate",
    "packed_attention",
    "packed_runs",
    "readout",
    "replay",
    "short_conv",
    "short_conv_step",
    "ssd",
    "window_attention",
]

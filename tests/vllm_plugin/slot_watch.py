"""A worker extension that reads the first mixer layer's slots before and after each step, and writes what it saw: the
steps' replay lengths and flushes as they really were.

SLOT_WATCH names the file. Where a worker has no first mixer, or is not the first of several, it writes none.
"""

import json
import os
from collections import Counter

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context

from vllm_plugin.mixer import MixerLayer


class SlotWatch:
    """Named to vLLM as `--worker-extension-cls`, whose import is what is wanted."""


replayed: Counter[int] = Counter()
flushes: Counter[str] = Counter()
step = MixerLayer.conv_ssm_forward


def watched(layer, projected_states, output):
    metadata = get_forward_context().attn_metadata
    if metadata is None or layer.prefix != "model.layers.1.mixer" or get_tensor_model_parallel_rank():
        return step(layer, projected_states, output)
    layout, position = layer.layout, layer.kv_cache[list(layer.layout.fields()).index("position")]
    rows = metadata[layer.prefix].on_host()
    before = [0 if start == 0 else int(position[slot, 0, 0]) for slot, start, _, _ in rows]
    step(layer, projected_states, output)
    for (slot, start, _, T), c in zip(rows, before, strict=True):
        phase = "decode" if layout.step >= T else "prefill"
        if phase == "decode":
            replayed[max(start + T - layout.window - c, 0)] += 1
        flushes[phase] += int(position[slot, 0, 0]) != c
    with open(os.environ["SLOT_WATCH"], "w") as f:
        json.dump({"replayed": replayed, "flushes": flushes}, f)


MixerLayer.conv_ssm_forward = watched

"""A worker extension that reads the first mixer layer's slots before and after each step, and writes what it saw: the
steps' replay lengths and flushes as they really were.

SLOT_WATCH names the file.
"""

import json
import os
from collections import Counter

from vllm_plugin.mixer import MixerLayer


class SlotWatch:
    """Named to vLLM as `--worker-extension-cls`, whose import is what is wanted."""


replayed, flushes = Counter(), Counter()
step = MixerLayer.conv_ssm_forward


def watched(layer, projected_states, output):
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if metadata is None or layer.prefix != "model.layers.1.mixer":
        return step(layer, projected_states, output)
    position = layer.kv_cache[list(layer.layout.fields()).index("position")]
    rows = metadata[layer.prefix].on_host()
    before = [0 if start == 0 else int(position[slot, 0, 0]) for slot, start, _, _ in rows]
    step(layer, projected_states, output)
    for (slot, start, _, T), c in zip(rows, before, strict=True):
        phase = "decode" if layer.layout.step >= T else "prefill"
        if phase == "decode":
            replayed[max(start + T - layer.layout.window - c, 0)] += 1
        flushes[phase] += int(position[slot, 0, 0]) != c
    with open(os.environ["SLOT_WATCH"], "w") as f:
        json.dump({"replayed": replayed, "flushes": flushes}, f)


MixerLayer.conv_ssm_forward = watched

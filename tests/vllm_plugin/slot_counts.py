"""The metrics of the states against what `slot_watch` saw in the slots."""

import json
import os


def compare(states: dict[str, float], file: str | os.PathLike[str]) -> None:
    """Assert that the metrics, name and label side by side, are what was seen."""
    with open(file) as f:
        saw = json.load(f)
    lengths = {int(length): rows for length, rows in saw["replayed"].items()}
    assert states["mamba_hybrid:replayed_tokens_count"] == sum(lengths.values()) > 0
    assert states["mamba_hybrid:replayed_tokens_sum"] == sum(length * rows for length, rows in lengths.items())
    head = "mamba_hybrid:replayed_tokens_bucket"
    buckets = {float(name.removeprefix(head)): count for name, count in states.items() if name.startswith(head)}
    assert len(buckets) == 11
    for most, count in buckets.items():
        assert count == sum(rows for length, rows in lengths.items() if length <= most)
    for phase in ("decode", "prefill"):
        assert states[f"mamba_hybrid:state_flushes_total{phase}"] == saw["flushes"].get(phase, 0)
    assert states["mamba_hybrid:state_bytes_running"] == 0

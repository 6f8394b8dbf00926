#!/usr/bin/env bash
# Start one real vLLM server on one CPU core, in the foreground. Up after 20 to 60 s; about 3 GB of memory.
#
#   scripts/real_vllm/serve.sh NAME PORT CORE [vllm serve flags...]
#
# NAME is the model name it answers to. Stop it with SIGTERM; to kill it, kill its process group: the engine is a
# process of its own and outlives the API server. Install first: scripts/real_vllm/install.sh.
set -euo pipefail

if (($# < 3)); then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
name=$1 port=$2 core=$3
shift 3

venv=${VLLM_VENV:-$HOME/.cache/sagellm-control-plane/vllm-0.32.0}
model=${VLLM_TINY_MODEL:-$(dirname "$venv")/tiny-llama}
if [[ ! -x $venv/bin/vllm || ! -e $model/.made ]]; then
  echo "serve.sh: no vLLM in $venv or no model in $model; run scripts/real_vllm/install.sh first" >&2
  exit 1
fi

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=$core
exec "$venv/bin/vllm" serve "$model" --served-model-name "$name" --host 127.0.0.1 --port "$port" \
  --max-model-len "${VLLM_MAX_MODEL_LEN:-4096}" --enforce-eager --dtype bfloat16 "$@"

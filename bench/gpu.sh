#!/bin/sh
# Server, parity, throughput and kills on a GPU: run from the checkout with a Python that has sglang and monologue's [train] extra.
#   PYTHON=python sh bench/gpu.sh        the starter policies; add models of your own, e.g.
#   QUESTIONER=Qwen/Qwen3-8B ANSWERER=Qwen/Qwen2.5-VL-7B-Instruct sh bench/gpu.sh
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
share="--flag=--mem-fraction-static=${SHARE:-0.4}" # two servers on one card
small="--flag=--attention-backend=triton"           # heads of 32 numbers, as the starter policies have
"$python" bench/parity.py --device cuda --dtype float32 $share $small --python "$python" --json bench/results/parity-gpu-float32.json
"$python" bench/parity.py --device cuda --dtype bfloat16 $share $small --python "$python" --json bench/results/parity-gpu-bfloat16.json
"$python" bench/serving.py --device cuda --python "$python" $share $small --kills "${KILLS:-100}" --json bench/results/serving-gpu.json
if [ -n "${QUESTIONER:-}" ] && [ -n "${ANSWERER:-}" ]; then
    "$python" bench/serving.py --device cuda --python "$python" $share --kills 0 --episodes "${EPISODES:-512}" \
        --questioner-model "$QUESTIONER" --answerer-model "$ANSWERER" --json bench/results/serving-gpu-models.json
fi

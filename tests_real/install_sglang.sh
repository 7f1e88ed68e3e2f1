#!/bin/sh
# The real SGLang, for machines without a GPU: .venv-sglang with the CPU build of torch and none of SGLang's CUDA requirements.
# pip warns about the latter; backends/serving/cpu stands in for the few of their names that are looked up at import.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-sglang
if [ -f "$venv/installed" ] && [ "$venv/installed" -nt tests_real/sglang-requirements.txt ]; then exit 0; fi
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$venv/bin/pip" install --quiet --disable-pip-version-check -r tests_real/sglang-requirements.txt
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps sglang==0.5.21 torchvision==0.28.0 sglang-router==0.3.2
touch "$venv/installed"

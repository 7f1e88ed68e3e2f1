#!/bin/sh
# The tools that traces are exported to, in an environment of their own: Phoenix alone brings 900 MB that nobody needs to play or
# to train. Of ours come the light packages only, no torch. Versions are those that were tried; both tools move weekly.
set -eu
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv .venv-phoenix
.venv-phoenix/bin/pip install --quiet --disable-pip-version-check \
    'arize-phoenix==20.26.1' 'inspect_ai==0.3.285' 'pytest>=9.0' 'pytest-asyncio>=1.0' --editable '.[otlp,inspect]'
touch .venv-phoenix/installed

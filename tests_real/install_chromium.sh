#!/bin/sh
# What the tests of the page need: Debian's Chromium and a virtual environment with Playwright. Run from anywhere; does nothing twice.
set -eu
cd "$(dirname "$0")/.."
if ! command -v chromium >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
fi
if ! .venv-page/bin/python -c 'import playwright, pytest, pytest_asyncio, monologue' 2>/dev/null; then
    "${PYTHON:-python3}" -m venv .venv-page
    .venv-page/bin/pip install --quiet --disable-pip-version-check --editable . playwright 'pytest>=9.0' pytest-asyncio
fi
chromium --version

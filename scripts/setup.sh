#!/usr/bin/env bash
# Create .venv with the locked packages and this project; sourced by the other scripts, or run by itself.
# Needs Python 3.11 or newer and the network. Does nothing when all is there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "vit_cls needs Python 3.11 or newer; found: $(python3 --version 2>&1 || true). Install one and run this again." >&2
        exit 2
    fi
    "$python" -m venv .venv
fi

stamp=.venv/.locked
if ! cmp -s requirements.lock "$stamp" || [ ! -x .venv/bin/vit-cls ]; then
    echo "setting up .venv (several GB with PyTorch; a few minutes the first time)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
    .venv/bin/python -m uv pip sync --quiet --python .venv/bin/python requirements.lock
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    cp requirements.lock "$stamp"
fi

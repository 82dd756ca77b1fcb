#!/usr/bin/env bash
# Everything that must hold before a change lands: formatting, lint, types, tests. Sets itself up.
# Run:    bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

# Tiny tensors, and processes beside the tests': more threads would wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"

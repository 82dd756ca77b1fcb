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
if [ $# -gt 0 ]; then
    .venv/bin/python -m pytest "$@"
    exit
fi

# The commands' tests start processes and wait for them: the others run beside them, on the second core (parity is with
# the commands so that both end at about the same time). The commands
# stay in front, since what a script runs in the background does not see Ctrl-C, which some of them send.
log=$(mktemp)
.venv/bin/python -m pytest --durations=15 --ignore=tests/commands --ignore=tests/parity >"$log" 2>&1 &
others=$!
failed=0
.venv/bin/python -m pytest --durations=15 tests/commands tests/parity || failed=1
wait "$others" || failed=1
cat "$log"
rm -f "$log"
exit "$failed"

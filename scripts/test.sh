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

# The commands' tests start processes and wait for them: others run beside them, on the second core, so many that both
# end at about the same time. The commands stay in front, since what a script runs in the background does not see Ctrl-C,
# which some of them send.
front=(tests/commands tests/parity tests/weights tests/contracts tests/lab)
log=$(mktemp)
.venv/bin/python -m pytest --durations=15 "${front[@]/#/--ignore=}" >"$log" 2>&1 &
others=$!
failed=0
.venv/bin/python -m pytest --durations=15 "${front[@]}" || failed=1
wait "$others" || failed=1
cat "$log"
rm -f "$log"
exit "$failed"

#!/usr/bin/env bash
# From nothing to two evaluated classifiers: a CLS head and a GAP head on the embedded digits.
# Run:    bash scripts/quickstart.sh [SEED]
# Leaves: runs/quickstart_cls_SEED, runs/quickstart_gap_SEED, runs/digits_test (the held-out third as PNG files)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

seed=${1:-0}
if [ ! -d runs/digits_test ]; then
    .venv/bin/python -c "from vit_cls.data.digits import write_digits; write_digits('runs/digits_test')"
fi
for pool in cls gap; do
    run=runs/quickstart_${pool}_$seed
    echo "== training with a $pool head: $run"
    # auto: a second call shows the run that is there instead of repeating it
    .venv/bin/vit-cls fit --config configs/digits.yaml --model.pool "$pool" --seed "$seed" --run_dir "$run" --resume auto
done
for pool in cls gap; do
    run=runs/quickstart_${pool}_$seed
    echo "== $pool on the held-out digits: vit-cls evaluate --model $run --data runs/digits_test"
    .venv/bin/vit-cls evaluate --model "$run" --data runs/digits_test --output "$run/digits_test"
done

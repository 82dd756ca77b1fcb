#!/usr/bin/env bash
# What only a GPU can show, in one command: tests, real runs from JPEG to report, averages and mixing, steps that wait
# for nothing, bf16 beside fp32, training speed beside timm. Does without jsonargparse and simplejpeg.
# Run:    bash scripts/gpu_check.sh [--photos DIR] [--steps tests fit ...]   (on a CPU, tiny: --device cpu --quick)
# Expect: a table within 8 minutes on one GPU (what is not done by then is stopped, and said to be), and
#         scripts/results/gpu_check.json; exit 1 if a step failed. Takes
#         .venv/bin/python if it is there, else $PYTHON or python3; installs nothing and needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
# What CUDA's matrix products need to add up in one order, for the runs that must be equal to the bit.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
exec "$python" scripts/gpu_check.py "$@"

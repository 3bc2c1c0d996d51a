#!/usr/bin/env bash
# Which averaging strategy is worth running: trains, measures, and writes build/study/{full,quick}/study.md.
# About an hour on two cores; --quick takes minutes. What is finished is not computed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

./scripts/setup.sh study
export OMP_NUM_THREADS=1
PYTHONPATH=scripts exec .venv/bin/python -m study.run "$@"

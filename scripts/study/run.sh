#!/usr/bin/env bash
# Measure which averaging strategy is worth running: train, measure, and write build/study/{full,quick}/study.md.
# About an hour on two cores; --quick takes minutes. Finished trainings are not computed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

./scripts/setup.sh study
export OMP_NUM_THREADS=1
PYTHONPATH=scripts exec .venv/bin/python -m study.run "$@"

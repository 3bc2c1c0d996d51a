#!/usr/bin/env bash
# Measure which averaging strategy is worth running: fetch the data, train, measure, and write
# build/study/{full,quick}/study.md. Hours on two cores; `--domains` takes parts, `--quick` takes minutes. Finished
# trainings are not computed again. `run.sh recipes` measures the ways of training of docs/recipes.md, in half an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

./scripts/setup.sh study
./scripts/study/get_data.sh || echo "study: domains of real data will be missing" >&2
export OMP_NUM_THREADS=1
export PYTHONPATH=scripts
if [[ ${1:-} == recipes ]]; then exec .venv/bin/python -m study.recipes "${@:2}"; fi
exec .venv/bin/python -m study.run "$@"

#!/usr/bin/env bash
# Measure the study's two domains of a size for a GPU, a training or two of each, in about six minutes:
#   PYTHON=python3 ./scripts/gpu/study.sh OUT
# The data must be there (scripts/study/get_data.sh). Results are OUT/full/results.jsonl and OUT/full/study.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=${1:?the directory for the results}
export PYTHONPATH=scripts:.
timeout 360 "${PYTHON:-.venv/bin/python}" -m study.run --domains fashion-large,spam-lora-large --seeds 1 --workers 1 \
    --out "$out"

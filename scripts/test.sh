#!/usr/bin/env bash
# What CI runs: format, lint, types, tests. Arguments go to pytest: ./scripts/test.sh -k sewa
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh
echo "== format"
.venv/bin/ruff format --check .
echo "== lint"
.venv/bin/ruff check .
echo "== types"
.venv/bin/basedpyright
echo "== tests"
.venv/bin/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Run the checks of CI: format, lint, types, tests. Other arguments go to pytest: ./scripts/test.sh -k sewa
# --quick installs less and skips tests that are slow or need other frameworks: see tests/conftest.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=(dev)
if [[ " $* " == *" --quick "* ]]; then extras=(test lint); fi
./scripts/setup.sh "${extras[@]}"
echo "== format"
.venv/bin/ruff format --check .
echo "== lint"
.venv/bin/ruff check .
echo "== types"
.venv/bin/basedpyright
echo "== tests"
# one more process than CPUs: tests often wait for a subprocess
workers=$(.venv/bin/python -c 'from ckptavg.runtime.threads import processors; print(min(4, processors() + 1))')
.venv/bin/pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# What CI runs: format, lint, types, tests. Other arguments go to pytest: ./scripts/test.sh -k sewa
# --quick installs little and leaves out what takes long or needs other frameworks: see tests/conftest.py.
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
# one more process than processors: tests often wait for a program that they have started
workers=$(.venv/bin/python -c 'from ckptavg.runtime.threads import processors; print(min(4, processors() + 1))')
.venv/bin/pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Branch coverage of the readers, the writer and the journal by the tests that are about them; prints what is missed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

coverage() { .venv/bin/python -m coverage "$@"; }

rm -f .coverage .coverage.*
coverage run -m pytest -q tests/readers tests/hostile tests/frameworks/test_sharded.py tests/test_write.py \
    tests/test_resume.py tests/test_pipeline.py tests/test_discover.py tests/faults
coverage combine --quiet
coverage json --quiet -o coverage.json
coverage report

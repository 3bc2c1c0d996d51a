#!/usr/bin/env bash
# Branch coverage of the readers, the writer and the journal by the tests that are about them; prints what is missed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

coverage() { .venv/bin/python -m coverage "$@"; }

rm -f .coverage .coverage.*
coverage run -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile tests/readers tests/hostile \
    tests/frameworks tests/faults tests/distributed tests/test_write.py tests/test_resume.py tests/test_pipeline.py \
    tests/test_discover.py tests/test_awkward.py tests/test_surroundings.py tests/test_bad_input.py
coverage combine --quiet
coverage json --quiet -o coverage.json
coverage report

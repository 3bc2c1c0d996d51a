#!/usr/bin/env bash
# Measure branch coverage of the readers, the writer and the journal by their own tests; print JSON, and the missed
# lines on stderr. Bombs are left out: traced line by line they exceed the time limit of a hostile file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

coverage() { .venv/bin/python -m coverage "$@"; }

rm -f .coverage .coverage.*
coverage run -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile -k "not bomb" tests/readers \
    tests/hostile tests/frameworks tests/faults tests/distributed tests/output/test_safetensors_file.py \
    tests/journal/test_resume.py tests/filesystem tests/pipeline/test_pipeline.py \
    tests/checkpoints/test_discover.py tests/average/test_awkward.py tests/cli/test_surroundings.py \
    tests/cli/test_bad_input.py >&2
coverage combine --quiet >&2
coverage report >&2
coverage json --quiet -o coverage.json >&2
.venv/bin/python -c "
import json
totals = json.load(open('coverage.json'))['totals']
print(json.dumps({name: totals[name] for name in ('percent_covered', 'missing_lines', 'missing_branches')}))"

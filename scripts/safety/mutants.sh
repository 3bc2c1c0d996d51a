#!/usr/bin/env bash
# Changes readers, writer and journal in one place at a time, and counts the changes that a test notices; prints JSON.
# Takes an hour or two. `mutants.sh 'ckptavg.lock*'` is for some of them, `.venv/bin/mutmut results` lists what nobody saw.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

.venv/bin/python -c "import mutmut" 2>/dev/null || .venv/bin/pip install --quiet mutmut
mkdir -p mutants # Python forgets for good what it did not find when it began
export PYTHONPATH="$PWD/mutants" OMP_NUM_THREADS=1 EXAMPLES=0.1 FIXTURES="$PWD/build/fixtures"
.venv/bin/mutmut run "$@" >&2
.venv/bin/mutmut export-cicd-stats >&2
cat mutants/mutmut-cicd-stats.json

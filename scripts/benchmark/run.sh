#!/usr/bin/env bash
# Measure every table of docs/benchmarks.md: ./scripts/benchmark/run.sh [--quick] [TABLE ...]
# Writes build/benchmark/run.md, which is docs/benchmarks.md once copied there; its text is in page.md.in. It takes about
# 20 minutes on two idle cores, and 27 GB of disk; with --quick a few minutes, at sizes at which figures mean nothing.
# mergekit gets an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

./scripts/setup.sh
python=$PWD/.venv/bin/python peers=$PWD/build/benchmark/peers
if [[ ! -x $peers/bin/mergekit-yaml ]]; then
    "$python" -m venv "$peers"
    install=("$peers/bin/pip" install --quiet)
    if uv=$(command -v uv || command -v .venv/bin/uv); then # which has torch in its cache
        eval "$("$python" scripts/pip_to_uv.py)"
        install=("$uv" pip install --quiet --python "$peers/bin/python")
    fi
    torch=$(grep '^torch==' constraints.txt)
    "${install[@]}" "$torch" # first and alone
    "${install[@]}" "$torch" 'mergekit>=0.1.5'
fi
"$python" scripts/benchmark/page.py --spent "$SECONDS" "$@"
echo build/benchmark/run.md

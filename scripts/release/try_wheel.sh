#!/usr/bin/env bash
# Install a wheel into a new environment and run it in an empty directory, without access to the repository's source:
#   ./scripts/release/try_wheel.sh dist/ckptavg-0.1.0-py3-none-any.whl
# PYTHON=python3.12 selects the interpreter. Installs with uv if on PATH, else with pip; both read their own variables.
set -euo pipefail

if [[ $# -ne 1 || ! -f $1 ]]; then
    echo "usage: try_wheel.sh WHEEL, one file" >&2
    exit 2
fi
wheel=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH

step() {
    echo "\$ $*" >&2
    "$@"
}

"${PYTHON:-python3}" -m venv venv
if command -v uv >/dev/null; then
    step uv pip install --quiet --python venv/bin/python "$wheel"
else
    step venv/bin/python -m pip install --quiet "$wheel"
fi
export PATH="$folder/venv/bin:$PATH"

version=$(step ckptavg --version)
if [[ $(basename "$wheel") != "ckptavg-${version#ckptavg }-"* ]]; then
    echo "error: $wheel: the installed command calls itself '$version'" >&2
    exit 1
fi
step ckptavg demo
cd ckptavg-demo
step ckptavg inspect ./ckpts
output=$(step ckptavg sewa ./ckpts --k 5)
step ckptavg verify "$output" --sources ./ckpts
echo "$version works with $(python --version)"

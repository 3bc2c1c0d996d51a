#!/usr/bin/env bash
# Makes .venv at the repository's root with the pinned versions of constraints.txt, or brings it up to date.
# PYTHON=python3.12 chooses the interpreter. A second run with nothing changed does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.ckptavg-installed
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
if [[ -x .venv/bin/python && $(cat "$stamp" 2>/dev/null) == "$wanted" ]]; then
    exit 0
fi

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [[ -n $name ]] && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "setup: needs Python 3.11 or newer with venv (on Debian: apt-get install python3-venv)" >&2
    return 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # missing, or half made
    rm -rf .venv
    python=$(find_python)
    echo "setup: making .venv with $("$python" --version)" >&2
    "$python" -m venv .venv
fi
echo "setup: installing (the pinned torch first: an unpinned one brings gigabytes)" >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
echo "$wanted" >"$stamp"

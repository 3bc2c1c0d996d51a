#!/usr/bin/env bash
# Makes .venv at the repository's root with the pinned versions of constraints.txt, or brings it up to date.
# PYTHON=python3.12 chooses the interpreter when .venv is made. A second run with nothing changed does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.ckptavg-installed
wanted=$({ pwd && cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum) # pwd: a venv cannot be moved
if [[ -x .venv/bin/python && $(cat "$stamp" 2>/dev/null) == "$wanted" ]]; then
    exit 0
fi

suitable() { # Python 3.11 or newer, with all that venv needs
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}

install_torch() { # first and alone: an unpinned one brings gigabytes
    install "$(grep '^torch==' constraints.txt)"
}

make_venv() { # with the first interpreter that the pinned torch exists for
    local name names=(python3.11 python3.12 python3.13 python3)
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        suitable "$name" || continue
        rm -rf .venv
        echo "setup: making .venv with $("$name" --version)" >&2
        "$name" -m venv .venv && install_torch && return
    done
    echo "setup: none of ${names[*]} is Python 3.11 or newer with venv and a torch (on Debian: apt-get install python3-venv)" >&2
    return 1
}

usable() { # an old one, a moved one and one without pip are not
    suitable .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 \
        && { [[ ! -e .venv/bin/pip ]] || .venv/bin/pip --version >/dev/null 2>&1; }
}

rm -f "$stamp"
if usable; then install_torch; else make_venv; fi
echo "setup: installing the pinned versions" >&2
install --constraint constraints.txt --editable '.[dev]'
install --no-deps "$(grep '^timm==' constraints.txt)" # it asks for a torchvision that has no build for every torch
echo "$wanted" >"$stamp"

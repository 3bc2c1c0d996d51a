#!/usr/bin/env bash
# Create or update .venv at the repository's root with the pinned versions of constraints.txt:
#   ./scripts/setup.sh             everything (the extra `dev` of pyproject.toml)
#   ./scripts/setup.sh demo plot   the core and these extras only
# A run with nothing new to install does nothing. PYTHON=python3.12 selects the interpreter when .venv is created.
# Installs with uv if it is on PATH or pip can fetch it, else with pip. uv gets pip's settings unless its own are set;
# UV_TORCH_BACKEND=cpu (or cu130, auto, ...) selects the index of torch builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wishes=("${@:-dev}")
backend=${UV_TORCH_BACKEND:-}
stamp=.venv/.ckptavg-installed # two lines: a checksum of the inputs with torch's backend, and the installed extras
key="$({ pwd && cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum) $backend" # pwd: a venv cannot be moved
made='' present=''
[[ ! -x .venv/bin/python || ! -r $stamp ]] || { read -r made && read -r present; } <"$stamp" || true

satisfied() {
    local wish
    [[ $made == "${key% }" ]] || return 1
    for wish in "${wishes[@]}"; do [[ " $present " == *" $wish "* ]] || return 1; done
}
if satisfied; then exit 0; fi
# tests start hundreds of processes, and each would compile torch again where PYTHONDONTWRITEBYTECODE is set
if [[ " ${wishes[*]} " =~ " dev " || " ${wishes[*]} " =~ " test " ]]; then export UV_COMPILE_BYTECODE=1; fi

suitable() { # Python 3.11 or newer, with the modules that venv needs
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

pinned() {
    grep "^$1==" constraints.txt
}

with_pip() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}

find_uv() {
    uv=$(command -v uv) || { with_pip --only-binary :all: "$(pinned uv)" 2>/dev/null && uv=.venv/bin/uv; } || uv=
    if [[ -n $uv ]]; then
        local settings
        settings=$(.venv/bin/python scripts/pip_to_uv.py)
        eval "$settings"
    fi
}

install() {
    if [[ -n $uv ]]; then
        "$uv" pip install --quiet --python .venv/bin/python "$@" && return
        [[ -z $backend ]] || return 1 # pip would install another build of torch
        echo "setup: uv could not install this; trying pip" >&2
    fi
    with_pip "$@"
}

install_torch() { # first and alone: an unpinned torch downloads gigabytes
    find_uv
    if [[ -n $backend && -z $uv ]]; then
        echo "setup: UV_TORCH_BACKEND is set, but there is no uv" >&2
        return 1
    fi
    [[ -z $backend || $made == *" $backend" ]] || .venv/bin/python -m pip uninstall --quiet --yes torch 2>/dev/null
    echo "setup: installing torch" >&2
    install --constraint constraints.txt "$(pinned torch)"
}

make_venv() { # with the first interpreter that has a build of the pinned torch
    local name names=(python3.11 python3.12 python3.13 python3.14 python3)
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

usable() { # false for a .venv that is outdated, was moved or lacks pip
    suitable .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1 \
        && { [[ ! -e .venv/bin/pip ]] || .venv/bin/pip --version >/dev/null 2>&1; }
}

extras() { # union of the present and the requested extras, with the extras that they include
    .venv/bin/python - "$@" <<'END'
import re, sys, tomllib
with open("pyproject.toml", "rb") as file:
    known = tomllib.load(file)["project"]["optional-dependencies"]
present, wishes = (words.split() for words in sys.argv[1:])
names = list(dict.fromkeys([*(name for name in present if name in known), *wishes]))
for name in names:  # grows
    if name not in known:
        sys.exit(f"setup: pyproject.toml has no extra called {name}; it has {', '.join(known)}")
    inner = re.findall(r"ckptavg\[(.*?)\]", " ".join(known[name]))
    names += [part for part in ",".join(inner).split(",") if part and part not in names]
print(*names)
END
}

if usable; then
    wanted=$(extras "$present" "${wishes[*]}") # before any installation: fails on a misspelt extra
    printf 'unfinished\n%s\n' "$present" >"$stamp"
    install_torch
else
    make_venv
    wanted=$(extras "" "${wishes[*]}")
fi
echo "setup: installing ${wanted// /, }" >&2
install --constraint constraints.txt --editable ".[${wanted// /,}]"
if [[ " $wanted " == *" frameworks "* ]]; then
    install --no-deps "$(pinned timm)" # it requires torchvision, which has no build for every torch
fi
browser() { # the tests of the page draw it in a real one; without it they are skipped
    local name
    for name in chromium google-chrome chromium-browser google-chrome-stable; do
        if command -v "$name" >/dev/null; then return; fi
    done
    [[ $OSTYPE != darwin* || ! -d '/Applications/Google Chrome.app' ]] || return 0
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "setup: installing chromium" >&2
        local -x DEBIAN_FRONTEND=noninteractive
        { apt-get -qq update && apt-get -qq -y --no-install-recommends install chromium fonts-dejavu-core; } \
            </dev/null >/dev/null 2>&1 && return
    fi
    echo "setup: no browser for the tests of the page (on Debian: apt-get install chromium fonts-dejavu-core)" >&2
}
if [[ " $wanted " == *" test "* ]]; then browser; fi
printf '%s\n%s\n' "${key% }" "$wanted" >"$stamp"

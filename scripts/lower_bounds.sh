#!/usr/bin/env bash
# Install the oldest versions that pyproject.toml allows into build/lower-bounds, and run the quick tests there.
# Arguments go to pytest. PYTHON=3.12 selects the interpreter (default 3.11); UV_TORCH_BACKEND=cpu the build of torch,
# without which an old torch may download gigabytes of CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh test
PATH=$PATH:$PWD/.venv/bin
if ! command -v uv >/dev/null; then
    echo "lower bounds: uv is needed to install the oldest versions: pip install uv" >&2
    exit 1
fi
settings=$(.venv/bin/python scripts/pip_to_uv.py)
eval "$settings"
oldest=$(.venv/bin/python - <<'END'
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*(line.replace(">=", "==") for line in tomllib.load(file)["project"]["dependencies"]))
END
)
echo "lower bounds: $oldest" >&2
uv venv --quiet --clear --seed --python "${PYTHON:-3.11}" build/lower-bounds
# shellcheck disable=SC2086 # one word per package
uv pip install --quiet --python build/lower-bounds/bin/python --editable '.[test]' $oldest
PATH=$PWD/build/lower-bounds/bin:$PATH
pytest --quick --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# Measure every figure of docs/benchmarks.md, one table after the other: ./scripts/benchmark/run.sh [--quick]
# Writes build/benchmark/run.md. About an hour on two idle cores and 10 GB of disk; --quick: minutes, a tenth of it.
# mergekit and timm get a separate environment; timm's averaging script is not in its package, so
# TIMM_AVERAGER=path/to/avg_checkpoints.py adds its row.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

layers=12 rounds=3 candidates=(10 20 50 100) seeds=3 small=() busy=()
if [[ ${1:-} == --quick ]]; then layers=1 rounds=1 candidates=(10 20) seeds=1 small=(--quick) busy=(--rounds 1); fi

./scripts/setup.sh
python=$PWD/.venv/bin/python peers=$PWD/build/benchmark/peers llama=$PWD/build/benchmark/llama-$layers
mkdir -p build/benchmark
out=build/benchmark/run.md
: >"$out"

if [[ ! -x $peers/bin/mergekit-yaml ]]; then
    "$python" -m venv "$peers"
    "$peers/bin/pip" install --quiet "$(grep '^torch==' constraints.txt)" # first and alone
    "$peers/bin/pip" install --quiet "$(grep '^torch==' constraints.txt)" 'mergekit>=0.1.5'
    "$peers/bin/pip" install --quiet --no-deps "$(grep '^timm==' constraints.txt)" "$(grep '^pillow==' constraints.txt)"
    "$peers/bin/pip" uninstall --quiet --yes torchvision # a build for another torch breaks transformers
fi
[[ -d $llama ]] || "$python" scripts/benchmark/make_llama.py "$llama" --layers "$layers"
[[ -d $llama-half ]] || "$python" scripts/benchmark/make_llama.py "$llama-half" --layers "$((layers / 4))"
averagers=(--half "$llama-half" --mergekit "$peers/bin/mergekit-yaml")
[[ -z ${TIMM_AVERAGER:-} ]] || averagers+=(--timm "$peers/bin/python scripts/benchmark/without_torchvision.py $TIMM_AVERAGER")

table() { # title, then the command
    local title=$1
    shift
    { echo "## $title" && echo && echo "    ${*//$PWD\//}" && echo && echo '```'; } >>"$out"
    env PYTHONPATH=scripts "$@" | tee -a "$out"
    { echo '```' && echo; } >>"$out"
}

table "Averaging" "$python" scripts/benchmark/average.py "$llama" --rounds "$rounds" "${averagers[@]}"
table "Learning: one step" "$python" scripts/benchmark/step.py
table "Learning: evaluations" "$python" scripts/benchmark/evaluation.py
table "Learning: low bits" "$python" scripts/benchmark/lowbit.py
table "Starting" "$python" scripts/benchmark/start.py
table "A busy machine" "$python" scripts/benchmark/busy.py ${busy[@]+"${busy[@]}"}
table "Several workers" "$python" scripts/benchmark/scaling.py ${small[@]+"${small[@]}"}
table "Learning: SeWA's two solvers" "$python" scripts/benchmark/solver.py \
    --candidates "${candidates[@]}" --seeds "$seeds"
echo "$out"

#!/usr/bin/env bash
# Test and measure ckptavg on a GPU, in 7 minutes at most: scripts/gpu/check.sh [--device cpu] [tests] [process] [speed]
# Each part has its own time limit; without a name all parts run. Python must have torch, safetensors, blake3, typer, rich,
# pytest, hypothesis, scikit-learn and, for one test, torchmetrics; nothing is installed or fetched. Results are written
# to $OUT (build/gpu) as they come; `python scripts/gpu/report.py` writes docs/gpu.md. On a CPU sizes are tiny.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

device=cuda parts=()
while (($#)); do
    case $1 in
        --device) device=${2:?--device needs a name} && shift 2 ;;
        tests | process | speed) parts+=("$1") && shift ;;
        *) echo "error: no part $1: tests, process, speed" >&2 && exit 2 ;;
    esac
done
((${#parts[@]})) || parts=(tests process speed)
OUT=${OUT:-build/gpu}
mkdir -p "$OUT" && OUT=$(realpath "$OUT")
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH=.
failed=0

part() { # seconds, name, then the command
    local limit=$1 name=$2 code=0 start=$SECONDS
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after 5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed=1
    echo "{\"part\": \"$name\", \"device\": \"$device\", \"code\": $code, \"seconds\": $((SECONDS - start))}" >>"$OUT/parts.jsonl"
}

"$PYTHON" -m ckptavg env --json >"$OUT/machine.json" || exit
for name in "${parts[@]}"; do
    rm -f "$OUT/$name".*
    case $name in
        tests)
            mapfile -t files < <(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)
            several=()  # with pytest-xdist, on several cores
            if "$PYTHON" -c 'import xdist' 2>/dev/null && [[ $device != cpu ]]; then several=(-n 8 -p no:benchmark); fi
            part 180 tests "$PYTHON" -m pytest "${several[@]}" -m gpu --device "$device" -p no:cacheprovider --junitxml "$OUT/tests.xml" -q \
                "${files[@]}"
            ;;
        process)
            part 40 process "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 \
                scripts/gpu/one_process.py "$OUT" --device "$device"
            ;;
        speed) part 200 speed "$PYTHON" scripts/gpu/speed.py "$OUT" --device "$device" ;;
    esac
done
exit "$failed"

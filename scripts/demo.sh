#!/usr/bin/env bash
# Trains a small network on scikit-learn's digits, saves 24 checkpoints, and averages the best 5 of them.
# The directory it works in is ./demo, or the first argument.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/demo}

"$root/scripts/setup.sh"
mkdir -p "$folder"
cd "$folder"
rm -rf ckpts averaged.safetensors
cp "$root/scripts/demo/task.py" "$root/scripts/demo/train.py" .
export PATH="$root/.venv/bin:$PATH"

echo '$ python train.py' >&2
python train.py
echo '$ ckptavg sewa ./ckpts --k 5' >&2
ckptavg sewa ./ckpts --k 5

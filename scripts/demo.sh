#!/usr/bin/env bash
# Train a small network on scikit-learn's digits, save 24 checkpoints, and average the best 5; then run all strategies.
# All files are written to ./demo at the root of the repository.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"$root/scripts/setup.sh" demo
mkdir -p "$root/demo"
cd "$root/demo"
rm -rf ckpts averaged.safetensors best.safetensors
cp "$root/scripts/demo/task.py" "$root/scripts/demo/train.py" .
export PATH="$root/.venv/bin:$PATH"

echo '$ python train.py' >&2
python train.py
echo '$ ckptavg sewa ./ckpts --k 5' >&2
ckptavg sewa ./ckpts --k 5
echo '$ ckptavg compare ./ckpts -o best.safetensors' >&2
ckptavg compare ./ckpts -o best.safetensors

#!/usr/bin/env bash
# A shell pipeline: checkpoints of plain torch, scored by a script of one's own from the template: c_shell.sh NEW_FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir "${1:?name a new folder}"
cd "$1"

cp "$here/c_train.py" train.py
python train.py
ckptavg inspect ./ckpts
ckptavg init --score-cmd # its names are those of train.py: no line marked EDIT has to be changed
m=$(ckptavg soup ./ckpts --score-cmd 'python eval.py {}' --score-jobs 2 -o averaged.safetensors)
echo "accuracy of $m: $(python eval.py "$m")"

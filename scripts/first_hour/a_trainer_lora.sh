#!/usr/bin/env bash
# A LoRA adapter of transformers' Trainer, averaged exactly and loaded by PEFT: a_trainer_lora.sh NEW_FOLDER
# Needs pip install '.[hf,peft]' accelerate
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir "${1:?name a new folder}"
cd "$1"

python "$here/a_train.py"
ckptavg inspect ./run
ckptavg soup ./run --adapter exact --val val.jsonl --test test.jsonl --labels ham,spam -o averaged/
python - <<'END'
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained("averaged/", num_labels=2)
print("loaded: rank", model.peft_config["default"].r)
END

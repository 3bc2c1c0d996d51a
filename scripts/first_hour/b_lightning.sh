#!/usr/bin/env bash
# A Lightning training: a task file from the template, strategies compared, the winner loaded into the module:
# b_lightning.sh NEW_FOLDER. Needs pip install '.[demo]' lightning
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir "${1:?name a new folder}"
cd "$1"

cp "$here/b_train.py" train.py
python train.py
ckptavg inspect ./ckpts
ckptavg init --lightning
# the lines marked EDIT, as an editor would change them
sed -i.bak 's/import Data, Module/import Classifier, Digits/; s/Module()/Classifier(width=16)/; s/Data()/Digits()/' task.py
ckptavg compare ./ckpts --strategies last,swa,soup -o averaged.safetensors
ckptavg verify averaged.safetensors --sources ./ckpts
python - <<'END'
import torch
from safetensors.torch import load_file
from train import Classifier, Digits

model, data = Classifier(width=16), Digits()
model.load_state_dict(load_file("averaged.safetensors"))
model.eval()
data.setup("test")
with torch.no_grad():
    right = torch.cat([model(images).argmax(dim=1) == labels for images, labels in data.test_dataloader()])
print(f"loaded: test accuracy {right.float().mean():.4f}")
END

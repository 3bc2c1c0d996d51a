"""Score a model for ckptavg: `python eval.py FILE` prints one number. Fill in the lines marked EDIT.

ckptavg soup ./ckpts --score-cmd 'python eval.py {}'
"""

import sys

import torch
from safetensors.torch import load_model
from torch import nn
from train import Net, val_loader  # EDIT: your model and validation data; importing them must not train


def score(model: nn.Module) -> float:
    """Return the accuracy; any number in which larger is better will do, or smaller with `--score-goal min`."""
    right = count = 0
    for inputs, labels in val_loader():  # EDIT: as your batches are
        right += int((model(inputs).argmax(dim=1) == labels).sum())
        count += len(labels)
    return right / count


if __name__ == "__main__":
    model = Net()  # EDIT: with the arguments that it was trained with
    load_model(model, sys.argv[1])
    # EDIT: BatchNorm needs its statistics anew: torch.optim.swa_utils.update_bn(train_loader(), model)
    with torch.no_grad():
        print(score(model.eval()))

"""Average checkpoints in the program that trained them, without a task file: d_library.py NEW_FOLDER."""

import os
import sys
from pathlib import Path

import torch
from c_train import Net, spirals, train, val_loader
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ckptavg


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]).argmax(dim=1) == batch[1]).float()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir()
    os.chdir(sys.argv[1])
    train()
    test = DataLoader(spirals(1000, seed=2), batch_size=200)
    result = ckptavg.soup("ckpts", model=Net, loss=loss, metric=accuracy, val=val_loader(), test=test)
    print(result)
    model = Net()
    model.load_state_dict(load_file(result.output.path))
    with torch.no_grad():
        scores = torch.cat([accuracy(model, batch) for batch in test])
    print(f"loaded: accuracy {scores.mean():.4f} on test data, reported {result.scores['test'].value:.4f}")

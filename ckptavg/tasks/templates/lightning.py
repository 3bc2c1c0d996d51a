"""Task file for ckptavg: the module and data of a Lightning training. Fill in the lines marked EDIT.

The module is the one that was trained, so that checkpoints of ModelCheckpoint fit. Try it with: ckptavg check ./ckpts
"""

from functools import cache

import torch
from torch import nn
from torch.utils.data import DataLoader
from train import Data, Module  # EDIT: your LightningDataModule and LightningModule; importing them must not train


def model() -> nn.Module:
    """Return the module that was trained; its values do not matter, since they are replaced."""
    return Module()  # EDIT: with the arguments that it was trained with


@cache
def _data(stage: str):
    """Return the data of ``fit`` or ``test``. A random split needs a fixed seed, else it has training examples."""
    data = Data()  # EDIT: with the arguments of the training
    data.setup(stage)
    return data


def forward(model: nn.Module, batch):
    """Run the module once for `loss` and `metric`, which get its result."""
    inputs, _ = batch  # EDIT: as your batches are
    return model(inputs)


def loss(output, batch) -> torch.Tensor:
    """Return the loss of ``validation_step``: the mean of a batch, or (better) one loss per example."""
    _, labels = batch  # EDIT: as your batches are
    return nn.functional.cross_entropy(output, labels, reduction="none")


def accuracy(output, batch) -> torch.Tensor:
    """Optional: the metric to report, one value per example. A torchmetrics.Metric can take its place."""
    _, labels = batch  # EDIT: as your batches are
    return (output.argmax(dim=1) == labels).float()


metric = accuracy  # its name is in the tables


def val_dataloader() -> DataLoader:
    """Data to optimize coefficients on and to compute every score with."""
    return _data("fit").val_dataloader()


def train_dataloader() -> DataLoader:
    """Optional: data to recompute BatchNorm statistics with, and to optimize on with `--on train`."""
    return _data("fit").train_dataloader()


def test_dataloader() -> DataLoader:
    """Optional: data used for no choice, for an unbiased final score. Delete it if there are none."""
    return _data("test").test_dataloader()

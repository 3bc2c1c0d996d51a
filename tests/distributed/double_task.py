"""The transformer's task in double precision, with a number of batches that no world size divides evenly."""

from __future__ import annotations

from jobs.transformer import Transformer, _text, loss
from torch import nn
from torch.utils.data import DataLoader

__all__ = ["loss", "model", "test_dataloader", "train_dataloader", "val_dataloader"]


def model() -> nn.Module:
    return Transformer().double()


def train_dataloader() -> DataLoader:
    return DataLoader(_text(0, 250), batch_size=60, shuffle=True)


def val_dataloader() -> DataLoader:
    return DataLoader(_text(250, 401), batch_size=50)


def test_dataloader() -> DataLoader:
    return DataLoader(_text(401, 450), batch_size=20)

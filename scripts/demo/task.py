"""The demo's task: scikit-learn's handwritten digits, with one training label in five replaced by a random one."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NOISE = 0.2
SPLITS = {"train": slice(0, 997), "val": slice(997, 1397), "test": slice(1397, 1797)}


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels, reduction="none")


def accuracy(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Return 1 for each correctly classified example."""
    images, labels = batch
    return (model(images).argmax(dim=1) == labels).float()


metric = accuracy  # its name is the metric's in reports


def train_dataloader() -> DataLoader:
    return DataLoader(_digits("train"), batch_size=64, shuffle=True, drop_last=True)


def val_dataloader() -> DataLoader:
    return DataLoader(_digits("val"), batch_size=100)


def test_dataloader() -> DataLoader:
    return DataLoader(_digits("test"), batch_size=100)


def _digits(split: str) -> TensorDataset:
    """Return one split of the 1797 digits, always the same; only training labels are noisy."""
    images, labels = load_digits(return_X_y=True)
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(labels), generator=random)[SPLITS[split]]
    labels = torch.tensor(labels)[chosen]
    if split == "train":
        replaced = torch.rand(len(labels), generator=random) < NOISE
        labels = torch.where(replaced, torch.randint(10, labels.shape, generator=random), labels)
    return TensorDataset(torch.tensor(images, dtype=torch.float32)[chosen].view(-1, 1, 8, 8) / 16, labels)

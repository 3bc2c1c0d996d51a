"""scikit-learn's 1797 handwritten digits, with one training label in five replaced by a random one."""

from __future__ import annotations

from typing import Final

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from study.job import Batches

NOISE: Final = 0.2
TRAIN, VAL = 997, 1397  # the other 400 are for the test


def digits(seed: int) -> tuple[Batches, Batches, Batches]:
    """Return train, validation and test batches; ``seed`` sets the split and noise, only training labels are noisy."""
    pixels, numbers = load_digits(return_X_y=True)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(numbers), generator=random)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(numbers)[order]
    replaced = torch.rand(TRAIN, generator=random) < NOISE
    noisy = torch.where(replaced, torch.randint(10, (TRAIN,), generator=random), labels[:TRAIN])

    def rest(part: slice) -> tuple[Tensor, Tensor]:
        return images[part], labels[part]

    return (
        Batches(images[:TRAIN], noisy, size=64, shuffle=True),
        Batches(*rest(slice(TRAIN, VAL)), size=100),
        Batches(*rest(slice(VAL, None)), size=200),
    )

"""CIFAR-10 and CIFAR-100 from their binary versions; needs a GPU in practice.

The python versions are not supported: they are Python 2 pickles, and unpickling can run arbitrary code.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from study.domains.residual import residual_network
from study.job import Batches, Domain, Job, accuracy, cross_entropy

PIXELS: Final = 3 * 32 * 32
VAL: Final = 0.1  # fraction of the training images
# name: (training files, test files, label bytes before an image: the last is the class)
VERSIONS: Final = {
    10: ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    100: (["train.bin"], ["test.bin"], 2),
}
MEAN: Final = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1)
SPREAD: Final = 0.26


def read(path: Path, labels: int) -> tuple[Tensor, Tensor]:
    """Read images [·, 3, 32, 32] uint8 and classes of one file, whose records are ``labels`` bytes and the pixels.

    Raises:
        ValueError: if the size is no multiple of a record's.
    """
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % (labels + PIXELS):
        raise ValueError(f"{path}: {len(raw)} bytes are no whole number of records of {labels + PIXELS}")
    records = torch.from_numpy(raw).view(-1, labels + PIXELS)
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1].long()


def load(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Load training and test data, and the number of classes.

    Raises:
        ValueError: if the folder has neither binary version, or a label is out of range.
    """
    for classes, (train, test, labels) in VERSIONS.items():
        if all((folder / name).is_file() for name in (*train, *test)):
            parts = [[read(folder / name, labels) for name in names] for names in (train, test)]
            joined = [(torch.cat([p[0] for p in part]), torch.cat([p[1] for p in part])) for part in parts]
            highest = max(int(label.max()) for _, label in joined)
            if highest >= classes:
                raise ValueError(f"{folder}: label {highest}, but there are {classes} classes")
            return joined[0], joined[1], classes
    wanted = "the binary version: data_batch_1.bin … test_batch.bin (CIFAR-10) or train.bin, test.bin (CIFAR-100)"
    raise ValueError(f"{folder}: need {wanted}; the python version is a pickle, which is not read")


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def job(seed: int, data: Path | None, width: int = 64) -> Job:
    assert data is not None, "run.py has checked it"
    (images, labels), (test_images, test_labels), classes = load(data)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    val, train = order.split([round(VAL * len(order)), len(order) - round(VAL * len(order))])

    def scaled(images: Tensor) -> Tensor:
        return (images.float() / 255 - MEAN) / SPREAD

    return Job(
        model=partial(residual_network, classes, width),
        loss=cross_entropy,
        metric=accuracy,
        train=Batches(scaled(images[train]), labels[train], size=min(128, len(train)), shuffle=True),
        val=Batches(scaled(images[val]), labels[val], size=250),
        test=Batches(scaled(test_images), test_labels, size=250),
        optimizer=optimizer,
    )


DOMAIN = Domain(
    title="Images: CIFAR",
    about="CIFAR-10 or -100 without augmentation, a tenth of the training images for validation; a residual network.",
    figure="test accuracy, %",
    scale=100,
    every=703,
    job=job,
    needs_data=True,
)

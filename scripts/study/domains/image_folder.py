"""Folders of images in ImageNet's layout: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``; needs a GPU in practice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from study.domains.residual import residual_network
from study.job import Domain, Job, accuracy, cross_entropy

SUFFIXES: Final = (".jpeg", ".jpg", ".png", ".webp")
VAL: Final = 0.02  # fraction of the training images; the folder val is the test split
SIZE, WORKERS = 128, 8
MEAN: Final = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
SPREAD: Final = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Images(Dataset[tuple[Tensor, int]]):
    """Dataset of image files and classes, which reads an image on access.

    Args:
        files: (path, class).
        size: side of the centre crop, after the shorter side was scaled to it.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as image:
            image.draft("RGB", (self.size, self.size))  # lets the decoder downscale a JPEG that is much larger
            colour = image.convert("RGB")
        scale = self.size / min(colour.size)
        width, height = (max(self.size, round(side * scale)) for side in colour.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        cut = colour.resize((width, height)).crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
        return (pixels - MEAN) / SPREAD, label


def listed(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the images below ``folder``, each with the number of its class, sorted by name."""
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]


def job(seed: int, data: Path | None, size: int = SIZE, width: int = 64, workers: int = WORKERS) -> Job:
    assert data is not None, "run.py has checked it"
    folder = data / "train"
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    files = listed(folder, classes)
    if len(files) < 2:
        raise ValueError(f"{data}: need train/CLASS/*.jpg and val/CLASS/*.jpg")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(VAL * len(files)))
    parts = [[files[i] for i in order[held:]], [files[i] for i in sorted(order[:held])], listed(data / "val", classes)]
    train, val, test = (Images(part, size) for part in parts)
    loader = partial(DataLoader, num_workers=workers, pin_memory=torch.cuda.is_available())
    return Job(
        model=partial(residual_network, len(classes), width),
        loss=cross_entropy,
        metric=accuracy,
        train=loader(train, batch_size=min(256, len(train)), shuffle=True, drop_last=True),
        val=loader(val, batch_size=250),
        test=loader(test, batch_size=250),
        optimizer=lambda model: torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
        ),
    )


DOMAIN = Domain(
    title="Images: a folder for each class",
    about="Images below train and val, the middle square of each; 2 % of train for validation; a residual network.",
    figure="test accuracy, %",
    scale=100,
    every=5000,
    job=job,
    needs_data=True,
)

"""Image classification: Fashion-MNIST clean, with label noise and with few examples of most classes."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ckptavg.tasks.batch import to_device
from study.data import fetched
from study.domains.residual import residual_network
from study.job import Batches, Domain, Job, accuracy, cross_entropy

CLASSES: Final = 10
MEAN, SPREAD = 0.286, 0.353  # of the training pixels, of 1
NOISE, IMBALANCE = 0.2, 100.0


def read(path: Path) -> Tensor:
    """Read an array of bytes in the idx format, from ``path`` or compressed from ``path.gz``.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    packed = path.with_name(f"{path.name}.gz")
    path = path if path.is_file() else packed
    try:
        raw = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path}: is no idx file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", raw[3], 4).tolist()
    start = 4 + 4 * len(shape)
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path}: has {len(raw) - start} values, but its header says {shape}")
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=start)).view(shape)


@cache
def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images [·, 1, height, width] and classes of ``train`` or ``t10k``, both uint8.

    Raises:
        ValueError: if a file is damaged, or both do not fit together.
    """
    paths = [folder / f"{part}-{name}-ubyte" for name in ("images-idx3", "labels-idx1")]
    images, labels = map(read, paths)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(f"{paths[0]}: {list(images.shape)} do not fit {list(labels.shape)} labels")
    if len(labels) == 0 or labels.max() >= CLASSES:
        raise ValueError(f"{paths[1]}: has no labels, or one of {CLASSES} or more")
    return images[:, None], labels


def long_tail(labels: Tensor, classes: Tensor, ratio: float) -> Tensor:
    """Return the places of labels, of ``classes[i]`` only the first share ratio^(−i/(classes − 1))."""
    shares = [ratio ** (-i / (len(classes) - 1)) for i in range(len(classes))]
    of_class = [(labels == label).nonzero().flatten() for label in classes]
    kept = [places[: math.ceil(share * len(places))] for share, places in zip(shares, of_class, strict=True)]
    return torch.cat(kept)


def noisy(labels: Tensor, share: float, random: torch.Generator) -> Tensor:
    """Return the labels, a share of them replaced by another class."""
    changed = torch.randperm(len(labels), generator=random)[: round(share * len(labels))]
    found = labels.clone()
    found[changed] += torch.randint(1, CLASSES, changed.shape, generator=random)
    return found % CLASSES


def balance(labels: Tensor) -> Tensor:
    """Return a weight for each example, of mean 1 and of the same sum for each class that occurs."""
    counts = labels.bincount(minlength=CLASSES)
    return (len(labels) / (counts > 0).sum() / counts)[labels]


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return cross_entropy(model, batch[:2])


def balanced_accuracy(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the weight of each correctly classified example: the mean is the mean recall of the classes."""
    return accuracy(model, batch[:2]) * batch[2]


def macro_f1(test: Batches, model: nn.Module) -> dict[str, float]:
    """Return the mean F1 of the classes, and the accuracy."""
    device = next(model.parameters()).device
    pairs = torch.zeros(CLASSES * CLASSES, dtype=torch.long)
    with torch.no_grad():
        for batch in test:
            images, labels, *_ = to_device(batch, device)
            pairs += (CLASSES * labels + model(images).argmax(dim=1)).bincount(minlength=len(pairs)).cpu()
    confusion = pairs.view(CLASSES, CLASSES)
    hits = confusion.diagonal()
    f1 = 2 * hits / (confusion.sum(dim=0) + confusion.sum(dim=1)).clamp(min=1)
    return {"macro-F1": float(f1.mean()), "accuracy": float(hits.sum() / confusion.sum())}


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def job(
    seed: int,
    data: Path | None,
    *,
    noise: float = 0.0,
    imbalance: float = 1.0,
    held: float = 1 / 20,
    sample: int = 2000,
    large: bool = False,
) -> Job:
    """Build the job of a seed.

    Args:
        seed: seed of the split, the noise and the order of the classes.
        data: folder of the four files; None for what `get_data.sh` has fetched.
        noise: share of the training labels that are wrong; those of the validation images are right.
        imbalance: factor between the numbers of images of the first and the last class, for training and validation.
        held: share of the images for validation.
        sample: number of training images that strategies see.
        large: a network for a GPU.
    """
    folder = data or fetched("fashion-mnist")
    (images, labels), (test_images, test_labels) = load(folder, "train"), load(folder, "t10k")
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=random)
    if imbalance != 1:
        kept = long_tail(labels[order], torch.randperm(CLASSES, generator=random), imbalance)
        order = order[kept[torch.randperm(len(kept), generator=random)]]  # the first would all be of rare classes
    val, train = order.split([count := round(held * len(order)), len(order) - count])

    def batches(images: Tensor, labels: Tensor, size: int, *, shuffle: bool = False) -> Batches:
        scaled = (images.float() / 255 - MEAN) / SPREAD
        weights = [] if imbalance == 1 else [balance(labels)]
        return Batches(scaled, labels, *weights, size=min(size, len(labels)), shuffle=shuffle)

    trained = noisy(labels[train].long(), noise, random)
    test = batches(test_images, test_labels.long(), 500)
    shape: dict[str, Any] = {"strides": (1, 1, 2, 2)} if large else {"strides": (2, 2, 2), "blocks": 1}
    return Job(
        model=partial(residual_network, CLASSES, 64 if large else 16, channels=1, **shape),
        loss=loss,
        forward=lambda model, batch: model(batch[0]),
        metric=accuracy if imbalance == 1 else balanced_accuracy,
        train=batches(images[train], trained, 128, shuffle=True),
        sample=batches(images[train[:sample]], trained[:sample], 128, shuffle=True),
        val=batches(images[val], labels[val].long(), 200),
        test=test,
        optimizer=optimizer,
        figure=None if imbalance == 1 else partial(macro_f1, test),
    )


def _domain(title: str, about: str, figure: str = "test accuracy, %", every: int = 130, **settings: Any) -> Domain:
    return Domain(
        title=f"Images: Fashion-MNIST, {title}",
        area="Images",
        about=f"{about}. A residual network with BatchNorm, SGD.",
        figure=figure,
        scale=100,
        every=every,
        job=partial(job, **settings),
        schedules=("constant", "cosine", "wsd"),
        sizes={"exhaustive": False, "variants": False, "random": 5, "ks": (2, 5, 12)},
    )


SPLIT: Final = "57,000 of the 60,000 training images, {} of them for the strategies, and 3,000 for validation"

DOMAIN: Final = {
    "fashion": _domain("clean", SPLIT.format("2,000")),
    "fashion-noise": _domain(
        "20 % label noise",
        f"{SPLIT.format('2,000')}; a fifth of the training labels are wrong, those for validation are right",
        noise=NOISE,
    ),
    "fashion-imbalanced": _domain(
        "1:100",
        "14,900 images, the classes in a random order and each 0.6 times as frequent as the one before; a fifth is for "
        "validation, as one would hold it out in practice, with 12 images of the rarest class and the mean recall as "
        "the metric",
        figure="test macro-F1, %",
        imbalance=IMBALANCE,
        held=0.2,
    ),
    "fashion-large": _domain("wide network", SPLIT.format("10,000"), every=1335, sample=10_000, large=True),
}

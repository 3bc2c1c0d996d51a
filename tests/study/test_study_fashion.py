"""Fashion-MNIST of the study, on a small file of the same format."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from study.data import fetched
from study.domains import DOMAINS, domain, fashion
from study.job import Batches, Job
from torch import Tensor, nn

COUNTS = {"train": 400, "t10k": 60}


def _idx(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def images() -> dict[str, np.ndarray[Any, Any]]:
    """Return images whose first pixel is their class and whose second and third are their number."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for part, count in COUNTS.items():
        found[part] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        found[part][:, 0, 0] = np.arange(count) % 10
        found[part][:, 0, 1:3] = np.array(np.divmod(np.arange(count), 256)).T
    return found


@pytest.fixture
def folder(tmp_path: Path, images: dict[str, np.ndarray[Any, Any]]) -> Path:
    for part, pixels in images.items():  # the test part is not compressed
        for name, array in (("images-idx3", pixels), ("labels-idx1", pixels[:, 0, 0])):
            path = tmp_path / f"{part}-{name}-ubyte"
            if part == "train":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(_idx(array), mtime=0))
            else:
                path.write_bytes(_idx(array))
    return tmp_path


def _pixels(part: Any) -> Tensor:
    """Return the first row of each image, as bytes."""
    first = part.dataset.tensors[0][:, 0, 0]
    return (255 * (first * fashion.SPREAD + fashion.MEAN)).round().long()


def _numbers(part: Any) -> list[int]:
    return (_pixels(part)[:, 1:3] * torch.tensor([256, 1])).sum(dim=1).tolist()


def _labels(part: Any) -> Tensor:
    return part.dataset.tensors[1]


def _learns(job: Job) -> Tensor:
    torch.manual_seed(0)
    model = job.model()
    job.loss(model, next(iter(job.train))).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    return job.loss(model.eval(), next(iter(job.val)))


def test_images_are_read_pixel_by_pixel(folder: Path, images: dict[str, np.ndarray[Any, Any]]):
    for part in COUNTS:
        pixels, labels = fashion.load(folder, part)
        assert np.array_equal(pixels[:, 0].numpy(), images[part])
        assert labels.tolist() == [i % 10 for i in range(COUNTS[part])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(_idx(np.zeros(3)), mtime=0)[:-9], "cannot be read"),
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"\0\0\x0d\1\0\0\0\3abc", mtime=0), "no idx file of unsigned bytes"),
        (gzip.compress(b"\0\0\x08\2\0\0\0\3", mtime=0), "no idx file of unsigned bytes"),
        (gzip.compress(_idx(np.zeros(3))[:-1], mtime=0), r"has 2 values, but its header says \[3\]"),
        (gzip.compress(_idx(np.zeros(399)), mtime=0), "do not fit"),
        (gzip.compress(_idx(np.full(400, 10)), mtime=0), "10 or more"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line_that_names_it(folder: Path, content: bytes, message: str):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        fashion.load(folder, "train")
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        fashion.load(tmp_path, "train")


def test_training_and_validation_images_are_all_and_none_is_in_both(folder: Path):
    job = fashion.job(3, folder, held=0.1, sample=100)
    train, val, sample = (_numbers(part) for part in (job.train, job.val, job.sample))
    assert len(val) == 40 and sorted(train + val) == list(range(400))
    assert sample == train[:100] and _numbers(fashion.job(4, folder, held=0.1).val) != val
    assert _numbers(job.test) == list(range(60))
    assert _learns(job).shape == (40,)


def test_a_fifth_of_the_training_labels_are_wrong_and_none_else(folder: Path):
    job = fashion.job(0, folder, noise=0.2, held=0.25, sample=50)
    wrong = {
        name: _labels(part) != _pixels(part)[:, 0] for name, part in vars(job).items() if isinstance(part, Batches)
    }
    assert wrong["train"].sum() == 60 and torch.equal(wrong["sample"], wrong["train"][:50])
    assert not wrong["val"].any() and not wrong["test"].any()


def test_classes_are_imbalanced_and_weights_undo_it(folder: Path):
    job = fashion.job(0, folder, imbalance=40, held=0.25)
    parts = [part for part in (job.train, job.val) if isinstance(part, Batches)]
    train, val = (_labels(part).bincount(minlength=10) for part in parts)
    order = (train + val).argsort(descending=True)
    assert (train + val)[order].tolist() == [40, 27, 18, 12, 8, 6, 4, 3, 2, 1]  # ⌈40·40^(−i/9)⌉
    assert val.sum() == 30 and 1 <= val[order[5:]].sum() <= 8  # 4 of 16 are expected there
    for part in parts:
        weights, labels = part.dataset.tensors[2], _labels(part)
        sums = torch.zeros(10).index_add(0, labels, weights)
        occurring = sums[sums > 0]
        torch.testing.assert_close(occurring, occurring.mean().expand(len(occurring)))
        assert float(weights.mean()) == pytest.approx(1)
    assert _learns(job).isfinite().all()
    orders = {
        tuple(_labels(fashion.job(seed, folder, imbalance=40).train).bincount(minlength=10).argsort().tolist())
        for seed in range(4)
    }
    assert len(orders) > 1


class _Fixed(nn.Module):
    """A model that returns its input, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, scores: Tensor) -> Tensor:
        return self.scale * scores


def test_f1_and_balanced_accuracy_are_those_of_a_count_by_hand():
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] * 2)
    guesses = torch.tensor([0, 0, 0, 0, 1, 2, 1, 0, 0, 0])
    batches = Batches(nn.functional.one_hot(guesses, 10).float(), labels, fashion.balance(labels), size=3)
    # F1: class 0 2·4/(6 + 7), class 1 2·1/(2 + 2), class 2 0, and the others, which do not occur, 0
    assert fashion.macro_f1(batches, _Fixed()) == pytest.approx({"macro-F1": (8 / 13 + 1 / 2) / 10, "accuracy": 0.5})
    each = torch.cat([fashion.balanced_accuracy(_Fixed(), batch) for batch in batches])
    assert float(each.mean()) == pytest.approx((4 / 6 + 1 / 2 + 0) / 3)


def test_the_large_network_is_larger_and_only_run_when_asked_for(folder: Path):
    small, large = (
        sum(p.numel() for p in domain(name).job(0, folder).model().parameters())
        for name in ("fashion", "fashion-large")
    )
    assert large > 50 * small
    assert "fashion" in DOMAINS and "fashion-large" not in DOMAINS


def test_the_real_images_are_balanced_and_their_pixels_scale_to_a_mean_of_0():
    try:
        folder = fetched("fashion-mnist")
    except ValueError as error:
        pytest.skip(str(error))
    images, labels = fashion.load(folder, "train")
    assert labels.bincount().tolist() == [6000] * 10 and images.shape == (60_000, 1, 28, 28)
    scaled = (images.float() / 255 - fashion.MEAN) / fashion.SPREAD
    assert abs(float(scaled.mean())) < 0.01 and float(scaled.std()) == pytest.approx(1, abs=0.01)

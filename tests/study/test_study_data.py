"""Loaders of real data, tested on small files of the same format."""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from study.domains import cifar, image_folder, offline_rl
from study.job import Job


def _learns(job: Job) -> torch.Tensor:
    """Take one step forward and backward; return the losses of a validation batch."""
    model = job.model()
    job.loss(model, next(iter(job.train))).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    return job.loss(model.eval(), next(iter(job.val)))


@pytest.fixture
def images() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def cifar10(tmp_path: Path, images: np.ndarray[Any, Any]) -> Path:
    for i, name in enumerate((*cifar.VERSIONS[10][0], *cifar.VERSIONS[10][1])):
        records = [bytes([(i + j) % 10]) + image.tobytes() for j, image in enumerate(images)]
        (tmp_path / name).write_bytes(b"".join(records))
    return tmp_path


def test_cifar10_is_read_pixel_by_pixel(cifar10: Path, images: np.ndarray[Any, Any]):
    (pixels, labels), (test_pixels, test_labels), classes = cifar.load(cifar10)
    assert classes == 10 and pixels.shape == (60, 3, 32, 32) and test_pixels.shape == (12, 3, 32, 32)
    assert np.array_equal(pixels[24:36].numpy(), images) and np.array_equal(test_pixels.numpy(), images)
    assert labels[24:36].tolist() == [(2 + j) % 10 for j in range(12)]
    assert test_labels.tolist() == [(5 + j) % 10 for j in range(12)]


def test_cifar100_takes_the_fine_label(tmp_path: Path, images: np.ndarray[Any, Any]):
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(b"".join(bytes([3, 60 + j]) + x.tobytes() for j, x in enumerate(images)))
    (pixels, labels), _, classes = cifar.load(tmp_path)
    assert classes == 100 and labels.tolist() == list(range(60, 72)) and np.array_equal(pixels.numpy(), images)


def test_cifar_trains(cifar10: Path):
    torch.manual_seed(0)
    assert _learns(cifar.job(0, cifar10, width=4)).shape == (6,)


def test_a_cifar_file_that_is_cut_off_is_refused(cifar10: Path):
    path = cifar10 / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole number of records"):
        cifar.load(cifar10)


def test_a_label_that_does_not_exist_is_refused(cifar10: Path):
    path = cifar10 / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="label 10, but there are 10 classes"):
        cifar.load(cifar10)


def test_cifars_pickles_are_not_loaded(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "run",)  # pyright: ignore[reportReturnType]

    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="binary version"):
        cifar.load(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Write five red and five blue training images, and two test images each, one of them grey and one with alpha."""
    for part, count in (("train", 5), ("val", 2)):
        for name, colour in (("n01_red", (255, 0, 0)), ("n02_blue", (0, 0, 255))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + 7 * i, 31), colour).save(tmp_path / part / name / f"{i}.JPEG")
    Image.new("L", (20, 50), 128).save(tmp_path / "train" / "n01_red" / "grey.png")
    Image.new("RGBA", (20, 50), (0, 0, 255, 10)).save(tmp_path / "train" / "n02_blue" / "alpha.png")
    (tmp_path / "train" / "n01_red" / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_images_is_read_by_class(pictures: Path):
    job = image_folder.job(0, pictures, size=16, width=4, workers=0)
    ((tested, labels),) = job.test
    assert tested.shape == (4, 3, 16, 16) and labels.tolist() == [0, 0, 1, 1]
    colours = (tested * image_folder.SPREAD + image_folder.MEAN).mean(dim=(2, 3))
    assert colours.argmax(dim=1).tolist() == [0, 0, 2, 2]  # red, then blue
    assert torch.allclose(colours.max(dim=1).values, torch.ones(4), atol=0.02)  # JPEG is lossy


def test_training_and_validation_images_are_all_of_train_and_never_the_same(pictures: Path):
    job = image_folder.job(3, pictures, size=16, width=4, workers=0)
    train, val = ({path for path, _ in part.dataset.files} for part in (job.train, job.val))  # pyright: ignore
    assert not train & val
    assert train | val == {p for p in (pictures / "train").rglob("*") if p.suffix in (".JPEG", ".png")}


def test_a_folder_of_images_trains(pictures: Path):
    torch.manual_seed(0)
    assert _learns(image_folder.job(0, pictures, size=16, width=4, workers=0)).isfinite().all()


def test_a_folder_without_images_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="train/CLASS"):
        image_folder.job(0, tmp_path)


@pytest.fixture
def steps() -> dict[str, np.ndarray[Any, Any]]:
    """Return four episodes of 30, 20, 30 and 20 steps: two end by falling, one by timeout, the last with the file."""
    draws = np.random.default_rng(0)
    ends = {"terminals": np.zeros(100, dtype=bool), "timeouts": np.zeros(100, dtype=bool)}
    ends["terminals"][[29, 79]] = True
    ends["timeouts"][49] = True
    states = draws.normal(3, 2, (100, 5)).astype(np.float32)
    return {"observations": states, "actions": draws.uniform(-1, 1, (100, 2)).astype(np.float32), **ends}


def _write(path: Path, steps: dict[str, np.ndarray[Any, Any]]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **steps)
        return path
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in steps.items():
            file[name] = array
    return path


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_offline_steps_are_split_by_episode(tmp_path: Path, steps: dict[str, np.ndarray[Any, Any]], suffix: str):
    path = _write(tmp_path / f"hopper{suffix}", steps)
    assert offline_rl.episodes(offline_rl.read(path)).tolist() == [0] * 30 + [1] * 20 + [2] * 30 + [3] * 20
    job = offline_rl.job(0, path)
    parts = [part.dataset.tensors[1] for part in (job.train, job.val, job.test)]  # pyright: ignore
    whole = {30: [], 20: []}
    for start, length in ((0, 30), (30, 20), (50, 30), (80, 20)):
        whole[length].append(steps["actions"][start : start + length])
    for part in parts[1:]:
        assert any(np.array_equal(part.numpy(), episode) for episode in whole[len(part)])
    assert sum(map(len, parts)) == 100
    assert _learns(job).isfinite().all()


def test_states_are_scaled_by_the_training_part_alone(tmp_path: Path, steps: dict[str, np.ndarray[Any, Any]]):
    job = offline_rl.job(0, _write(tmp_path / "a.npz", steps))
    states = job.train.dataset.tensors[0]  # pyright: ignore
    torch.testing.assert_close(states.mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.std(dim=0), torch.ones(5), atol=2e-3, rtol=0)  # 1e-3 is added to the divisor


def test_hdf5_without_h5py_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install h5py"):
        offline_rl.read(tmp_path / "a.hdf5")


def test_an_npz_with_pickled_objects_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", observations=np.array([{"a": 1}], dtype=object), actions=np.zeros((1, 1)))
    with pytest.raises(ValueError, match="allow_pickle"):
        offline_rl.read(tmp_path / "a.npz")


def test_a_file_without_actions_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, 1)))
    with pytest.raises(ValueError, match="has no actions"):
        offline_rl.read(tmp_path / "a.npz")

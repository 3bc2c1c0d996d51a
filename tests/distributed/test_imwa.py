"""The recipe of IMWA.

Shape suffixes: M = models.
"""

from __future__ import annotations

import math
import sys
from itertools import count, islice
from pathlib import Path

import imwa
import pytest
import task
import torch
from safetensors.torch import load_file

import ckptavg

STEPS = 20  # more than an epoch of 15


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: object) -> Path:
    """Run the recipe as a single process."""
    monkeypatch.delenv("RANK", raising=False)
    words = ["imwa.py", "--out", out, "--steps", STEPS, *options]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the recipe adds the task's directory
    imwa.main()
    return out


def plain(index: int = 0, reset: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Train by torch's own means, in the order of the data that the recipe gives to model ``index``."""
    torch.manual_seed(0)
    model = task.model().train()

    def batches():
        loader = task.train_dataloader()
        for epoch in count(1):
            torch.manual_seed(index * 2**20 + epoch)
            yield from loader

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step, batch in enumerate(islice(batches(), STEPS)):
        if step in reset:
            optimizer.state.clear()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
    return model.state_dict()


def assert_same(file: Path, wanted: dict[str, torch.Tensor]) -> None:
    stored = load_file(file)
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert stored[name].equal(tensor), name


@pytest.mark.parametrize(
    ("options", "reset"),
    [(("--episodes", 1), ()), (("--episodes", 3, "--average-momentum"), ()), (("--episodes", 3), (6, 13))],
    ids=["one episode", "momentum averaged", "momentum reset"],
)
def test_one_model_is_plain_training_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[object, ...], reset: tuple[int, ...]
):
    out = run(monkeypatch, tmp_path / "out", "--models", 1, *options)
    assert_same(out / f"episode-{options[1]}" / "model-0" / f"step-{STEPS}.safetensors", plain(reset=reset))


def test_one_episode_is_swa_of_trainings_that_differ_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    out = run(monkeypatch, tmp_path / "out", "--models", 3, "--episodes", 1)
    files = [out / "episode-1" / f"model-{m}" / f"step-{STEPS}.safetensors" for m in range(3)]
    for m, file in enumerate(files):
        assert_same(file, plain(m))
    ckptavg.swa(files, task=task.__file__, output=tmp_path / "swa.safetensors")
    assert_same(out / "averaged.safetensors", load_file(tmp_path / "swa.safetensors"))


def test_an_episode_starts_from_the_mean_of_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    out = run(monkeypatch, tmp_path / "out", "--models", 2, "--episodes", 2)
    models = [load_file(out / "episode-1" / f"model-{m}" / "step-10.safetensors") for m in range(2)]
    start = load_file(out / "episode-1.safetensors")
    assert not models[0]["0.weight"].equal(models[1]["0.weight"])
    for name, tensor in start.items():
        if tensor.is_floating_point():  # the exact sum, rounded once
            assert tensor.equal(((models[0][name].double() + models[1][name].double()) / 2).float()), name
    again = run(monkeypatch, tmp_path / "again", "--models", 2, "--episodes", 2)
    assert_same(again / "averaged.safetensors", load_file(out / "averaged.safetensors"))


def test_wrong_sizes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "out", "--episodes", STEPS + 1)
    assert "--episodes between 1 and --steps" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_task_file_without_training_data_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    path = tmp_path / "task.py"
    path.write_text("def model(): ...\ndef loss(model, batch): ...\n")
    with pytest.raises(SystemExit, match=r"task\.py: is no task file with train_dataloader"):
        run(monkeypatch, tmp_path / "out", "--task", path)
    with pytest.raises(SystemExit, match=r"missing\.py: is no task file with loss"):
        run(monkeypatch, tmp_path / "out", "--task", tmp_path / "missing.py")

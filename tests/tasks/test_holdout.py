"""HeldOut: the same examples are held out whatever the order and the size of the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from objective.test_mixture import Toy, data

from ckptavg.batches.loader import BatchLoader
from ckptavg.batches.stream import BatchStream
from ckptavg.context import Run
from ckptavg.cost import CostMeter
from ckptavg.errors import TaskError
from ckptavg.tasks.holdout import HeldOut
from ckptavg.tasks.python_file import PythonTask


def held(splits: dict[str, list[Any]], *, seed: int = 0, fraction: float = 0.5) -> HeldOut:
    return HeldOut(Toy(splits=splits), "val", rest="val", to="test", fraction=fraction, seed=seed)


def rows(task: HeldOut, split: Any) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for batch in task.batches(split) for row in batch["x"].tolist())


def batched(x: torch.Tensor, y: torch.Tensor, sizes: int) -> list[dict[str, torch.Tensor]]:
    return [{"x": a, "y": b} for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]


def test_the_two_parts_partition_the_examples():
    whole = data(1, (70, 50, 3))
    task = held({"val": whole})
    kept, out = rows(task, "val"), rows(task, "test")
    assert sorted(kept + out) == sorted(tuple(row) for batch in whole for row in batch["x"].tolist())
    assert 40 < len(out) < 83 and not set(kept) & set(out)  # 123 fair coins: 4 σ is 22
    assert all(len(batch["x"]) == len(batch["y"]) > 0 for split in ("val", "test") for batch in task.batches(split))


def test_the_parts_do_not_depend_on_order_and_batch_size():
    (batch,) = data(1, (60,))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    one = held({"val": batched(batch["x"], batch["y"], 60)})
    other = held({"val": batched(batch["x"][order], batch["y"][order], 7)})
    assert rows(one, "test") == rows(other, "test")


def test_equal_examples_share_a_side_chosen_by_the_seed():
    (batch,) = data(1, (60,))
    doubled = held({"val": [batch, batch]})
    assert rows(doubled, "test") == sorted(2 * rows(held({"val": [batch]}), "test"))
    assert rows(held({"val": [batch]}, seed=1), "test") != rows(held({"val": [batch]}), "test")


def test_a_second_division_is_independent_of_the_first():
    task = held({"val": data(1, (400,))})
    again = HeldOut(task, "val", rest="fit", to="held", fraction=0.5, seed=0)
    assert sorted(rows(again, "fit") + rows(again, "held")) == rows(task, "val")
    assert 60 < len(rows(again, "held")) < 140
    assert rows(again, "test") == rows(task, "test")


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_the_fraction_is_approximate(fraction: float):
    assert len(rows(held({"val": data(1, (1000,))}, fraction=fraction), "test")) == pytest.approx(
        1000 * fraction, abs=40
    )


def test_every_dtype_and_nesting_is_divided():
    batch = {
        "x": torch.randn(8, 3).bfloat16(),
        "nested": [torch.arange(8), {"text": list("abcdefgh"), "scalar": torch.tensor(3)}],
        "mask": torch.ones(8, 2, dtype=torch.bool),
        "rate": 0.5,
    }
    for fraction in (0.3, 0.5, 0.7):
        task = held({"val": [batch]}, fraction=fraction)
        for split in ("val", "test"):
            for part in task.batches(split):
                n = len(part["x"])
                assert len(part["nested"][0]) == len(part["nested"][1]["text"]) == len(part["mask"]) == n
                assert part["rate"] == 0.5 and part["nested"][1]["scalar"] == 3
                chosen = part["nested"][0].tolist()
                assert part["nested"][1]["text"] == ["abcdefgh"[i] for i in chosen]


def test_a_batch_that_cannot_be_divided_is_an_error():
    class Opaque:
        def __init__(self) -> None:
            self.x = torch.ones(4)

    task = held({"val": [(torch.arange(40.0), Opaque())]})
    with pytest.raises(TaskError, match=r"toy: val data cannot be divided: .*Opaque") as caught:
        list(task.batches("test"))
    assert caught.value.hint is not None and "test_dataloader()" in caught.value.hint


def test_a_batch_without_recognizable_examples_is_an_error():
    class Opaque:
        pass

    with pytest.raises(
        TaskError, match=r"the number of examples of a batch \(a Opaque\) is unclear from its parts: none has examples"
    ):
        list(held({"val": [Opaque()]}).batches("val"))


def test_examples_that_change_from_pass_to_pass_are_an_error():
    """Padding to the longest example of a shuffled batch changes an example's hash, and so its side."""
    (batch,) = data(1, (40,))
    changed = {"x": torch.cat([batch["x"], torch.zeros(40, 1)], dim=1), "y": batch["y"]}
    splits = {"val": [batch]}
    task = held(splits)
    list(task.batches("val"))
    list(task.batches("test"))
    splits["val"] = [changed]
    with pytest.raises(TaskError, match="differ from pass to pass"):
        list(task.batches("test"))


def test_everything_else_is_delegated_to_the_task():
    task = held({"val": data(1, (5, 4)), "train": data(2, (6,))})
    assert task.has("test") and task.has("train") and not task.has("held")
    assert task.examples("train") == 6 and task.length("train") == 1
    assert task.examples("val") is None and task.length("test") is None
    assert task.source == "toy" and [len(batch["x"]) for batch in task.batches("train")] == [6]


def test_a_metric_has_the_name_that_the_task_gives_it():
    toy = Toy(splits={"val": data(1, (5, 4))})
    toy.metric_name = "accuracy"
    assert HeldOut(toy, "val", rest="val", to="test", fraction=0.5, seed=0).metric_name == "accuracy"


def test_a_stream_started_late_continues_at_the_same_batch(tmp_path: Path):
    """Covers a last batch of one example, which is dropped only from a split that is divided itself."""
    (tmp_path / "odd.py").write_text(
        "import torch\n"
        "def model(): ...\n"
        "def loss(model, batch): ...\n"
        "def train_dataloader(): return torch.arange(33.).split(8)\n"
        "def val_dataloader(): return torch.arange(100., 133.).split(8)\n"
    )
    task = HeldOut(PythonTask(str(tmp_path / "odd.py")), "val", rest="val", to="test", fraction=0.5, seed=0)

    def stream(split: Any) -> BatchStream:
        feed = BatchLoader(task, "val", Run(device=torch.device("cpu")), CostMeter(), needs_two=lambda: True)
        return feed.stream(split)

    for split in ("train", "val"):
        whole, late = stream(split), stream(split)
        seen: list[list[float]] = []
        for _ in range(14):
            whole.advance()
            seen.append(whole.share.batch.tolist())
        for _ in range(9):
            late.advance()
        for wanted in seen[8:]:
            assert late.share.batch.tolist() == wanted
            late.advance()
        assert ([32.0] in seen) == (split == "train")

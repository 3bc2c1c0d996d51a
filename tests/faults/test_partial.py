"""Finished measurements are not repeated after an interruption, and count only for the same data."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover
from ckptavg.coefficients import Coefficients
from ckptavg.context import Run
from ckptavg.errors import OutputExistsError, TaskError
from ckptavg.filesystem.digest import Algorithm, of_bytes
from ckptavg.journal import Journal, source_digests
from ckptavg.journal.tensor_json import decode, encode
from ckptavg.objective.mixture import Mixture
from ckptavg.readers import RegularFile
from ckptavg.runtime import signals
from ckptavg.runtime.signals import Interruption
from ckptavg.tasks.python_file import PythonTask
from faults import job
from faults.warm import Warm

CPU = torch.device("cpu")
TASK = Path(job.__file__)
PASS = 2 * (5 + 5)  # letters of two passes over the validation data with one over the training data before it


@pytest.mark.parametrize(
    ("command", "stops"),
    [
        ("aswa", (9, 5, 20)),  # within a pass for BatchNorm, a pass over the validation data, and elsewhere
        ("aswa --early-reject", (8, 8)),
        ("sewa --solver quadratic --k 3 --verify 2", (3, 4)),  # within the pass of the curvature
        ("twa --epochs 2 --sam-rho 0.01", (4, 5)),
        ("landscape --samples 3", (3, 30)),
        ("compare --strategies swa,soup,aswa:early_reject=true", (3, 30, 40)),
    ],
)
def test_a_killed_run_repeats_only_the_pass_that_was_killed(
    warm: Warm, ckpts: Path, tmp_path: Path, command: str, stops: tuple[int, ...]
):
    name, *options = command.split()
    first, second = (f"{letter}{'.json' if name == 'landscape' else ''}" for letter in "ab")
    arguments = (name, ckpts, "--last", 4, "--task", TASK, *options, "-o")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert warm.run(*arguments, first, cwd=tmp_path, hook={"every": 0.0}, LOG=str(whole)).code == 0
    for stop in stops:
        done = warm.run(*arguments, second, cwd=tmp_path, hook={"every": 0.0}, LOG=str(parts), STOP=f"{stop}:SIGKILL")
        assert done.code == -9, done.err
    done = warm.run(*arguments, second, cwd=tmp_path, hook={"every": 0.0}, LOG=str(parts))
    assert done.code == 0, done.err
    assert (tmp_path / first).read_bytes() == (tmp_path / second).read_bytes()
    # lost at each stop: a pass over the validation data, with the one for BatchNorm before it
    assert len(parts.read_text()) <= len(whole.read_text()) + len(stops) * PASS


CORPUS = """
from faults.job import *
from torchmetrics.classification import MulticlassF1Score
from faults import job
metric = MulticlassF1Score(2, average="macro")
def predict(model, batch):
    job._tell("m")
    return model(batch[0]), batch[1]
"""


def test_a_metric_that_is_no_mean_goes_on_too_and_keeps_its_intervals(warm: Warm, ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(CORPUS)
    arguments = ("compare", ckpts, "--last", 3, "--strategies", "swa,soup", "--task", "mine.py", "--json", "-o")
    reports, logs = [], [tmp_path / "whole", tmp_path / "parts"]
    for output, stops, log in (("a", (), logs[0]), ("b", (12, 26, 40), logs[1])):
        for stop in stops:
            done = warm.run(*arguments, output, cwd=tmp_path, LOG=str(log), STOP=f"{stop}:SIGKILL")
            assert done.code == -9, done.err
        done = warm.run(*arguments, output, cwd=tmp_path, LOG=str(log))
        assert done.code == 0, done.err
        reports.append(json.loads(done.out))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    whole, parts = ([(one["scores"], one["over_last"]) for one in report["strategies"]] for report in reports)
    assert whole == parts
    # each metric update is another call of the task's code per batch
    assert len(logs[0].read_text()) < len(logs[1].read_text()) <= len(logs[0].read_text()) + 3 * 2 * PASS


def test_a_comparison_goes_on_with_other_strategies(warm: Warm, ckpts: Path, tmp_path: Path):
    """Scores are remembered by mixture, split and data, and losses by strategy: the list may change."""
    base = ("compare", ckpts, "--last", 4, "--task", TASK, "--json", "--keep-journal", "-o")
    logs = {output: tmp_path / f"log-{output}" for output in ("long", "short", "fresh", "other")}

    def run(output: str, strategies: str, log: str) -> dict[str, Any]:
        done = warm.run(*base, output, "--strategies", strategies, "--force", cwd=tmp_path, LOG=str(logs[log]))
        assert done.code == 0, done.err
        return json.loads(done.out)

    run("out", "swa,twa:epochs=2,soup", "long")
    went_on = run("out", "aswa,soup,twa:epochs=2,twa:epochs=2:on=train", "short")
    from_start = run("new", "aswa,soup,twa:epochs=2,twa:epochs=2:on=train", "fresh")
    for report in (went_on, from_start):
        for one in report["strategies"]:
            del one["cost"]
    assert went_on["strategies"] == from_start["strategies"]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "new").read_bytes()
    assert len(logs["short"].read_text()) < len(logs["fresh"].read_text()) - len(logs["long"].read_text()) / 2
    run("out", "swa", "other")
    assert len(logs["other"].read_text()) <= PASS  # only the file that was written is scored anew


def test_validation_data_that_have_changed_are_noticed(warm: Warm, ckpts: Path, tmp_path: Path):
    arguments = ("aswa", ckpts, "--task", TASK, "-o", "out")
    assert warm.run(*arguments, cwd=tmp_path, STOP="40:SIGKILL").code == -9
    done = warm.run(*arguments, cwd=tmp_path, DATA="5")
    assert done.code == 7 and "the data are not those that the interrupted run scored on" in done.err, done.err
    assert warm.run(*arguments, cwd=tmp_path).code == 0


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.5, -0.0, float("nan"), float("inf")]), torch.tensor(3), torch.zeros(0, 4), torch.tensor(True),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16), torch.arange(6).view(2, 3).t(),
        [1, 2.5, None, "x", {"a": torch.ones(2), "b": [True]}], 0.1 + 0.2,
    ],
    ids=repr,
)  # fmt: skip
def test_values_come_back_with_all_their_bits(value: Any):
    back = decode(json.loads(json.dumps(encode(value))))

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return (
                a.dtype == b.dtype
                and a.shape == b.shape
                and bytes(a.contiguous().view(-1).view(torch.uint8))
                == (bytes(b.contiguous().view(-1).view(torch.uint8)))
            )
        if isinstance(a, list | dict):
            keys: Any = range(len(a)) if isinstance(a, list) else a
            return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
        return type(a) is type(b) and a == b

    assert same(value, back)


@pytest.mark.parametrize("value", [object(), {"tensor": 1}, {1: 2}, b"x"], ids=lambda value: type(value).__name__)
def test_values_that_are_not_json_are_refused(value: Any):
    with pytest.raises(TypeError):
        encode(value)


# --- the candidates' contents


@pytest.fixture
def copied(ckpts: Path, tmp_path: Path) -> Path:
    return shutil.copytree(ckpts, tmp_path / "copied")


def with_contents(
    folder: Path, output: Path, work: Callable[[Journal, tuple[Checkpoint, ...]], None],
    algorithm: Algorithm = "blake3",
) -> None:  # fmt: skip
    """Run with these contents of the candidates' files, and one measurement."""
    with discover([folder]) as found, Journal(output) as journal:
        journal.begin({"run": 1})
        with source_digests.recording_digests(journal, found.checkpoints, algorithm):
            work(journal, found.checkpoints)


def hashed(journal: Journal, checkpoints: tuple[Checkpoint, ...]) -> None:
    """Wait until all files are hashed."""
    while not all((journal.get(f"file {i} 0") or {}).get("digest") for i in range(len(checkpoints))):
        time.sleep(0.01)
    journal.put("measured", 1)


def test_copies_of_the_candidates_are_accepted(copied: Path, ckpts: Path, tmp_path: Path):
    with_contents(copied, tmp_path / "out", hashed)
    shutil.rmtree(copied)
    shutil.copytree(ckpts, copied)

    def known(journal: Journal, checkpoints: tuple[Checkpoint, ...]) -> None:
        assert journal.get("measured") == 1
        assert all(file.digests["blake3"] for one in checkpoints for file in one.reader.files)

    with_contents(copied, tmp_path / "out", known)


def test_other_bytes_of_the_same_size_and_time_are_refused(copied: Path, tmp_path: Path):
    with_contents(copied, tmp_path / "out", hashed)
    path = copied / "step-3.pt"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        with (
            RegularFile(path) as file,
            pytest.raises(OutputExistsError, match=r"a different run: step-3\.pt: BLAKE3 \w{16}…, not \w{16}…"),
        ):
            source_digests._verify(journal, "file 2 0", file, "blake3")


def test_a_run_that_goes_on_with_another_algorithm_compares_by_the_recorded_one(copied: Path, tmp_path: Path):
    """It keeps the recorded digest until it has its own."""
    with_contents(copied, tmp_path / "out", hashed)
    shutil.copytree(copied, tmp_path / "again")
    shutil.rmtree(copied)
    (tmp_path / "again").rename(copied)
    content = (copied / "step-3.pt").read_bytes()

    def by_another(journal: Journal, checkpoints: tuple[Checkpoint, ...]) -> None:
        deadline = time.monotonic() + 60
        while not all(journal.get(f"file {i} 0")["digest"].startswith("sha256:") for i in range(len(checkpoints))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert journal.get("file 2 0")["digest"] == of_bytes(content, "sha256")
        assert all([*file.digests] == ["sha256"] for one in checkpoints for file in one.reader.files)

    with_contents(copied, tmp_path / "out", by_another, "sha256")
    (copied / "step-3.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with RegularFile(copied / "step-3.pt") as file, Journal(tmp_path / "out") as journal:
        journal.begin({"run": 1})
        with pytest.raises(OutputExistsError, match=r"step-3\.pt: SHA-256 \w{16}…, not \w{16}…"):
            source_digests._verify(journal, "file 2 0", file, "blake3")


def test_a_file_that_was_copied_before_its_contents_were_known_is_refused(copied: Path, tmp_path: Path):
    def early(journal: Journal, checkpoints: tuple[Checkpoint, ...]) -> None:
        hashed(journal, checkpoints)
        found = journal.get("file 2 0")
        journal.put("file 2 0", {**found, "digest": None})  # as if the run had been killed before

    with_contents(copied, tmp_path / "out", early)
    path = copied / "step-3.pt"
    path.write_bytes(path.read_bytes())
    with pytest.raises(
        OutputExistsError, match=r"step-3\.pt: the file was replaced or copied before its digest was recorded"
    ):
        with_contents(copied, tmp_path / "out", lambda *_: None)


def test_the_tasks_own_modules_belong_to_the_run(warm: Warm, ckpts: Path, tmp_path: Path):
    (tmp_path / "helper_of_task.py").write_text("from faults.job import *\n")
    (tmp_path / "mine.py").write_text("from helper_of_task import *\n")
    arguments = ("aswa", ckpts, "--task", "mine.py", "-o", "out")
    assert warm.run(*arguments, cwd=tmp_path, STOP="30:SIGTERM").code == 75
    (tmp_path / "helper_of_task.py").write_text("from faults.job import *\nx = 1\n")
    done = warm.run(*arguments, cwd=tmp_path)
    assert done.code == 6 and "was left by a different run: task helper_of_task.py: " in done.err, done.err
    assert warm.run(*arguments, "--no-resume", cwd=tmp_path).code == 0


# --- memory that runs out


class Tight(PythonTask):
    """Batches that are too large until they are halved once."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.halved = 0
        self.calls: list[int] = []

    def halve(self) -> bool:
        self.halved += 1
        return True

    def batches(self, split: Any) -> Any:
        for batch in super().batches(split):
            yield from zip(*(part.split(25) for part in batch), strict=True) if self.halved else [batch]

    def length(self, split: Any) -> int:
        return 10 if self.halved else 5

    def loss(self, model: Any, batch: Any) -> Any:
        self.calls.append(len(batch[1]))
        if len(self.calls) > 3 and len(batch[1]) > 25:
            raise torch.OutOfMemoryError("out of memory")
        return super().loss(model, batch)


def test_a_resumed_run_halves_its_batches_where_the_interrupted_one_had_to(ckpts: Path, tmp_path: Path):
    def losses(output: str, asked: int) -> list[float]:
        with discover([ckpts]) as found, Journal(tmp_path / output) as journal:
            journal.begin({"run": 1})
            mixture = Mixture(Tight(str(TASK)), found.checkpoints, Run(device=CPU, journal=journal))
            seen: list[float] = []
            for _ in range(asked):
                c_N = mixture.losses.uniform().requires_grad_()
                seen.append(float(mixture.losses.loss(c_N).detach()))
            calls.append(mixture.task.calls)  # pyright: ignore
            return seen

    calls: list[list[int]] = []
    whole = losses("a", 9)
    losses("b", 6)
    assert losses("b", 9) == whole
    assert calls[0] == [50, 50, 50, 50] + [25] * 6 and calls[2] == [25] * 3


def test_a_gradient_over_a_whole_split_is_known_to_the_last_bit(ckpts: Path, tmp_path: Path):
    def found() -> tuple[float, list[float], float]:
        with discover([ckpts]) as candidates, Journal(tmp_path / "out") as journal:
            journal.begin({"run": 1})
            mixture = Mixture(PythonTask(str(TASK)), candidates.checkpoints, Run(device=CPU, journal=journal))
            loss, gradient_N = mixture.losses.gradient(Coefficients.uniform(range(3), mixture.n))
            return loss, gradient_N.tolist(), mixture.meter["backward_batches"]

    *measured, cost = found()
    *replayed, nothing = found()
    assert replayed == measured and (cost, nothing) == (5, 0)


def test_scores_of_other_data_than_the_earlier_runs_are_not_compared(ckpts: Path, tmp_path: Path, monkeypatch: Any):
    def scores(count: int) -> None:
        with discover([ckpts]) as found, Journal(tmp_path / "out") as journal:
            journal.begin({"run": 1})
            task = PythonTask(str(TASK))
            mixture = Mixture(task, found.checkpoints, Run(device=CPU, journal=journal))
            for i in range(count):
                mixture.score(Coefficients.uniform([i], mixture.n))

    scores(3)
    monkeypatch.setenv("DATA", "7")
    with pytest.raises(TaskError, match="not those that the interrupted run scored on"):
        scores(4)
    monkeypatch.undo()
    scores(4)


def test_a_signal_is_pending_until_it_is_checked(monkeypatch: pytest.MonkeyPatch):
    handler = signals.Handler()
    monkeypatch.setattr(signals, "_handler", handler)
    with signals.waiting():
        assert handler.waits and not signals.pending()
        signals.check()
        handler.received = 15
        with pytest.raises(Interruption), signals.at_once():
            raise AssertionError("it does not begin")
        assert handler.waits
    assert not handler.waits
    with pytest.raises(Interruption):
        signals.check()

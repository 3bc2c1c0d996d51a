"""Barriers between candidates of real trainings: found where training put them, and nowhere else."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import inspected
import numpy as np
import pytest
import torch
from conftest import Job, Run
from inspected import barriers, numbers
from jobs import basins as job
from torch import Tensor, nn

import ckptavg
from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.options import Options
from ckptavg.pipeline.basin import TOLERANCE, mean_note
from ckptavg.report.basin import Basins
from ckptavg.score import PerExample, Score

TASK = str(job.__file__)
STEPS = range(100, 401, 60)
CYCLES = (80, 90, 100, 180, 190, 200)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings: two seeds at a constant rate, one with a restart at step 100, one with a spike at step 235."""
    folder = tmp_path_factory.mktemp("basins")
    for seed in (0, 1):
        job.train(folder / f"seed-{seed}", STEPS, seed=seed)
    job.train(folder / "restarts", CYCLES, seed=6, rate=job.restarts)
    job.train(folder / "spike", range(160, 341, 30), seed=1, spike=235)
    return folder


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def basins(*paths: Path, **options: Any) -> Basins:
    return inspected.basins(*paths, **{"task": TASK} | options)


def per_example(path: Path, *others: Path) -> Tensor:
    """Return the loss of each example at the mean of the checkpoints, without ckptavg."""
    states = [torch.load(one) for one in (path, *others)]
    network = job.model()
    network.load_state_dict({name: torch.stack([s[name] for s in states]).mean(dim=0) for name in states[0]})
    with torch.no_grad():
        return job.loss(network, job.val_dataloader()[0]).double()


def test_a_run_at_a_constant_rate_is_one_basin(trained: Path):
    found = basins(trained / "seed-0")
    assert barriers(found) == [] and numbers(found) == [1] * len(STEPS)
    assert found.verdict == "One basin: no barrier separates the 6 candidates."


def test_without_intervals_the_verdict_says_which_barriers_are_seen_and_promises_nothing(trained: Path):
    def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return job.loss(model, batch).mean()

    found = basins(trained / "seed-0", task=None, model=job.model, loss=mean_loss, val=job.val_dataloader())
    losses = [per_example(trained / "seed-0" / f"step-{step}.pt").mean() for step in STEPS]
    usual = float(torch.stack(losses).diff().abs().median())
    larger = max(float(TOLERANCE * (losses[i] + losses[j]) / 2) for i, j in (m.candidates for m in found.midpoints))
    seen = re.search(r"^No barrier found between the 6 candidates. Without .* above (.*) are seen.$", found.verdict)
    # four decimals are printed
    assert seen is not None and float(seen[1]) == pytest.approx(max(larger, 3 * usual), abs=1e-4), found.verdict


def test_a_restart_of_the_learning_rate_separates_the_cycles(trained: Path):
    found = basins(trained / "restarts")
    assert barriers(found) == [(100, 180)] and numbers(found) == [1, 1, 1, 2, 2, 2]
    assert "between steps 100 and 180" in found.verdict


def test_a_spike_separates_what_came_before_it(trained: Path):
    found = basins(trained / "spike")
    assert barriers(found) == [(220, 250)] and numbers(found) == [1, 1, 1, 2, 2, 2, 2]


def test_runs_from_different_seeds_are_different_basins(trained: Path):
    runs = [trained / "seed-0", trained / "seed-1"]
    found = basins(*runs)
    assert barriers(found) == [(400, 400)] and {one.run: one.basin for one in found.candidates} == {1: 1, 2: 2}
    assert f"between the last candidates of {runs[0]} and {runs[1]}" in found.verdict


def test_runs_that_share_a_basin_are_joined(trained: Path, tmp_path: Path):
    """Both halves of one training, as if a run had been continued elsewhere."""
    halves = [tmp_path / "a", tmp_path / "b"]
    for half, steps in zip(halves, (STEPS[:3], STEPS[3:]), strict=True):
        half.mkdir()
        for step in steps:
            shutil.copy(trained / "seed-0" / f"step-{step}.pt", half)
    assert numbers(basins(*halves)) == [1] * len(STEPS)


def test_basins_of_several_runs_do_not_depend_on_the_order_of_the_runs(trained: Path, tmp_path: Path):
    """Two halves of one training, and another seed, whose last candidate scores worse or better than theirs."""
    runs = [tmp_path / "a", tmp_path / "b", tmp_path / "other"]
    for folder, seed, steps in zip(runs, (0, 0, 1), (STEPS[:3], STEPS[3:], STEPS[-2:]), strict=True):
        folder.mkdir()
        for step in steps:
            shutil.copy(trained / f"seed-{seed}" / f"step-{step}.pt", folder)
    for order in permutations(runs):
        found = basins(*order)
        by_run = {order[one.run - 1].name: one.basin for one in found.candidates}
        assert by_run["a"] == by_run["b"] != by_run["other"]
        kept = " ".join(str(path) for path in order if path.name != "other")
        assert f"{kept} alone keeps one basin: 6 candidates" in found.verdict


def test_a_barrier_and_its_interval_are_those_of_the_losses_by_example(trained: Path):
    """Student's interval, which Hall's correction extends on one side only."""
    files = [trained / "restarts" / f"step-{step}.pt" for step in CYCLES]
    found = basins(trained / "restarts")
    for midpoint, (a, b) in zip(found.midpoints, pairwise(files), strict=False):
        ends_B = (per_example(a) + per_example(b)) / 2
        height_B = per_example(a, b) - ends_B
        barrier = midpoint.barrier
        # losses of float32 forward passes, here by another order of batches
        assert barrier is not None and barrier.value == pytest.approx(float(height_B.mean()), abs=1e-5)
        student = 1.964 * float(height_B.std()) / math.sqrt(len(height_B))
        assert barrier.low is not None and barrier.high is not None
        nearer = min(barrier.value - barrier.low, barrier.high - barrier.value)
        assert nearer == pytest.approx(student, rel=1e-2, abs=1e-6)
        assert midpoint.separates == (barrier.low > TOLERANCE * float(ends_B.mean()))


def test_the_options_of_the_verdict_keep_one_basin(trained: Path, run: Run):
    for name in ("restarts", "spike"):
        done = run("inspect", trained / name, "--basin", "--task", TASK, "--last", 6, "--json")
        assert done.returncode == 0, done.stderr
        first = json.loads(done.stdout)["basin"]
        options = re.search(r"((?:--\w+ \d+ ?)+)keeps one basin: (\d+) candidates", first["verdict"])
        assert options is not None, first["verdict"]
        words = options[1].split()
        done = run("inspect", trained / name, "--basin", "--task", TASK, "--last", 6, "--json", *words)
        assert done.returncode == 0, done.stderr
        kept = json.loads(done.stdout)
        assert len(kept["candidates"]) == int(options[2]) and {one["basin"] for one in kept["basin"]["candidates"]} == {
            1
        }


def test_one_candidate_has_nothing_to_average(trained: Path):
    found = basins(trained / "seed-0" / "step-400.pt")
    assert not found.midpoints and found.verdict == "One candidate: there is nothing to average."


def test_a_command_without_a_loss_finds_the_same_barrier_by_its_score(trained: Path, tmp_path: Path, run: Run):
    images, labels = job.val_dataloader()[0]
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    (tmp_path / "score.py").write_text(
        "import sys, numpy as np; from safetensors.numpy import load_file\n"
        "w, data = load_file(sys.argv[1]), np.load('data.npz')\n"
        "out = data['images']\n"
        "for layer in '024': out = np.maximum(out, 0) @ w[layer + '.weight'].T + w[layer + '.bias']\n"
        "print((out.argmax(axis=1) == data['labels']).mean())\n"
    )
    done = run("inspect", trained / "restarts", "--basin", "--score-cmd", f"{sys.executable} score.py {{}}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["basin"]
    assert [one["basin"] for one in found["candidates"]] == [1, 1, 1, 2, 2, 2] and found["name"] == "score"


def test_the_statistics_of_batchnorm_are_recomputed_for_midpoints(jobs: dict[str, Job]):
    """A network of BatchNorm at a constant rate: with averaged statistics its midpoints would be far worse."""
    found = basins(jobs["cnn"].folder, task=str(jobs["cnn"].task), last=6)
    assert barriers(found) == []
    with jobs["cnn"].mixture(last=6) as mixture:
        middle = Coefficients.uniform((0, 1), 6)
        assert found.midpoints[0].score.loss == pytest.approx(mixture.score(middle).loss, abs=1e-6)


INTERRUPTED = """
import os, pathlib, signal
from jobs.basins import *
from jobs.basins import loss as real_loss

def loss(model, batch):
    with open("calls", "a") as calls:
        calls.write("x")
    if pathlib.Path("calls").stat().st_size == 8:
        os.kill(os.getpid(), signal.SIGINT)
    return real_loss(model, batch)
"""


def test_an_interrupted_inspection_resumes_from_its_journal(trained: Path, run: Run, tmp_path: Path):
    (tmp_path / "mine.py").write_text(INTERRUPTED)
    words = ("inspect", trained / "restarts", "--basin", "--task", "mine.py", "--json")
    assert run(*words).returncode == 75 and list(tmp_path.glob("*.ckptavg"))
    done = run(*words)
    assert done.returncode == 0 and not list(tmp_path.glob("*.ckptavg"))
    found = json.loads(done.stdout)["basin"]
    # one batch a pass, and the pass that was interrupted is repeated
    assert (tmp_path / "calls").stat().st_size == len(found["candidates"]) + len(found["midpoints"]) + 1


def test_the_table_marks_the_barrier_and_every_basin(trained: Path, run: Run):
    done = run("inspect", trained / "restarts", "--basin", "--task", TASK)
    rows = [line for line in done.stdout.splitlines() if re.match(r"step-\d+\.pt +\d+ +\d\.\d{3,4}\b", line)]
    assert len(rows) == len(CYCLES) and [row[-1] for row in rows] == list("111222")
    assert [row.split()[1] for row in rows if "← barrier" in row] == ["100"]


def test_runs_are_numbered_alike_in_both_lists_and_have_a_column_if_there_are_several(trained: Path, run: Run):
    words = ("inspect", trained / "seed-0", trained / "seed-1", "--basin", "--task", TASK)
    found = json.loads(run(*words, "--json").stdout)
    by_path = {one["path"]: one["run"] for one in found["candidates"]}
    assert {one["path"]: one["run"] for one in found["basin"]["candidates"]} == by_path
    assert {*by_path.values()} == {1, 2}
    rows = [
        line.split()[1:3] for line in run(*words).stdout.splitlines() if re.match(r"seed-\d/\S+ +\d+ +\d+ +\d\.", line)
    ]
    assert rows == [[str(number), str(step)] for number in (1, 2) for step in STEPS]


def test_an_inspection_in_a_directory_that_cannot_be_written_keeps_its_journal_among_temporary_files(
    trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "mine.py").write_text(INTERRUPTED.replace('"calls"', repr(str(tmp_path / "calls"))))
    words = ("inspect", trained / "restarts", "--basin", "--task", tmp_path / "mine.py", "--json")
    assert run(*words, cwd=Path("/proc/self")).returncode == 75 and list(tmp_path.glob("basin-*.ckptavg"))
    done = run(*words, cwd=Path("/proc/self"))
    assert done.returncode == 0 and not list(tmp_path.glob("basin-*")), done.stderr


def test_inspection_without_basin_needs_no_task(trained: Path, run: Run):
    done = run("inspect", trained / "restarts", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["basin"] is None
    done = run("inspect", trained / "restarts", "--basin")
    assert done.returncode == 2 and "needs a task file" in done.stderr


def test_options_of_a_score_are_refused_without_basin_unless_other_commands_set_them(
    trained: Path, run: Run, tmp_path: Path
):
    for words in (("--task", "missing.py"), ("--val", "missing"), ("--score-cmd", "true {}")):
        done = run("inspect", trained / "restarts", *words)
        assert done.returncode == 2 and f"{words[0]} says how candidates are scored" in done.stderr, done.stderr
    with pytest.raises(UsageError, match="--task says how candidates are scored"):
        ckptavg.inspect(trained / "restarts", task="missing.py")
    assert run("inspect", trained / "restarts", CKPTAVG_TASK="missing.py", CKPTAVG_SCORE_KEY="a").returncode == 0
    (tmp_path / "ckptavg.toml").write_text("score-goal = 'min'\n")
    assert run("inspect", trained / "restarts").returncode == 0


def score(loss: float, spread: float = 1e-4) -> Score:
    """Return a score with losses of 32 examples, which allow an interval."""
    noise_U = torch.randn(32, generator=torch.Generator().manual_seed(int(loss * 1e4)), dtype=torch.float64)
    each = PerExample(values_U=-loss + spread * (noise_U - noise_U.mean()), examples_U=torch.ones(32).double())
    return Score(value=-loss, loss=loss, metric=None, examples=32, per_example=each)


def without_examples(loss: float) -> Score:
    return replace(score(loss), per_example=None)


def test_a_mean_below_the_candidates_own_mean_is_no_reason_for_a_note():
    singles = [score(loss) for loss in (0.5, 0.4, 0.3)]
    assert mean_note(singles, score(0.4), [], [Path("ckpts")], Options()) == ""
    assert mean_note(singles, score(0.4 * (1 + TOLERANCE) - 1e-9), [], [Path("ckpts")], Options()) == ""
    note = mean_note(singles, score(0.41), [], [Path("my ckpts")], Options())
    assert "`ckptavg inspect 'my ckpts' --basin`" in note and "loss 0.4100, worse than theirs, 0.4000" in note


def test_the_note_has_the_threshold_of_the_inspection_that_it_names():
    """Without an interval it is three usual differences of neighbours; with a wide one no note is given either."""
    losses = (0.5, 0.4, 0.3)
    for loss, noted in ((0.41, False), (0.69, False), (0.71, True)):
        note = mean_note([*map(without_examples, losses)], without_examples(loss), [], [Path("ckpts")], Options())
        assert bool(note) == noted, loss
    wide = [score(loss, spread=1.0) for loss in losses]
    assert mean_note(wide, score(0.41, spread=1.0), [], [Path("ckpts")], Options()) == ""
    with_metric = [replace(one, metric=0.9, value=0.9, loss_noise=1e-5) for one in map(score, (*losses, 0.41))]
    assert mean_note(with_metric[:3], with_metric[3], [], [Path("ckpts")], Options())
    few = [replace(one, loss_noise=math.inf) for one in with_metric]
    assert mean_note(few[:3], few[3], [], [Path("ckpts")], Options()) == ""


def test_the_named_inspection_has_the_options_that_chose_the_candidates_and_no_others():
    options = Options(last=5, exclude="a b", key="ema", wait_stable=1.0, seed=3, task="mine.py")
    note = mean_note([score(0.3)], score(0.4), [], [Path("ckpts")], options)
    assert "`ckptavg inspect ckpts --basin --exclude 'a b' --last 5 --key ema`" in note


def test_compare_names_the_inspection_only_where_candidates_do_not_average(trained: Path, tmp_path: Path):
    for name, expected in (("restarts", True), ("seed-0", False)):
        result = ckptavg.compare(trained / name, "swa,best", task=TASK, output=tmp_path / name)
        assert any("--basin" in warning for warning in result.warnings) == expected
    result = ckptavg.compare(trained / "restarts", "swa", task=TASK, output=tmp_path / "x")
    assert not any("--basin" in warning for warning in result.warnings)  # the candidates were not scored

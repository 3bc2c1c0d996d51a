"""Averaging while a job trains: the bytes and the scores of one run afterwards, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import nn

import ckptavg
from ckptavg.checkpoints.stability import Settling
from ckptavg.checkpoints.window import Window
from ckptavg.errors import UsageError
from ckptavg.options import Options
from ckptavg.runtime.process import Process
from ckptavg.runtime.workers import ALONE

PAGE = Path(__file__).parents[2] / "docs" / "follow.md"
LONG = 120.0  # seconds that no wait takes, however busy the machine is
FAST = ("--follow", "--poll", 0.05, "--wait-stable", 0.1)
TASK = """
import os, signal
from pathlib import Path

import torch
from torch import nn

def model(): return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

def loss(model, batch):
    if path := os.environ.get("CALLS"):
        with open(path, "a") as file:
            file.write(".")
        if os.path.getsize(path) == int(os.environ.get("KILL", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

def metric(model, batch): return (model(batch[0]).argmax(dim=1) == batch[1]).float()

def data(seed, count):
    draws = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 2, generator=draws)
    return points, (points[:, 0] * points[:, 1] + 0.3 * torch.randn(count, generator=draws) > 0).long()

def val_dataloader(): return [data(1, 200)]
"""
# a training loop that knows nothing of ckptavg; each file appears in pieces, the next one once OUTPUT has changed
TRAINING = """
import io, os, sys, time
from pathlib import Path

import torch
from task import data, loss, model

folder, output, count = Path("ckpts"), Path("averaged.safetensors"), 5

def state():
    try:
        return output.stat().st_mtime_ns
    except OSError:
        return None

torch.manual_seed(0)
net, batch, end = model(), data(0, 300), time.monotonic() + 120
optimizer = torch.optim.SGD(net.parameters(), lr=2.0)
folder.mkdir()
for step in range(1, count + 1):
    for _ in range(10):
        optimizer.zero_grad()
        loss(net, batch).mean().backward()
        optimizer.step()
    memory, before = io.BytesIO(), state()
    torch.save({"model": net.state_dict(), "step": step}, memory)
    content = memory.getvalue()
    with (folder / f"step-{step}.pt").open("wb", buffering=0) as file:
        for start in range(0, len(content), 1000):
            file.write(content[start : start + 1000])
            time.sleep(0.02)
    while step < count and state() == before and time.monotonic() < end:
        time.sleep(0.02)
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "train.py").write_text(TRAINING)
    return tmp_path


@pytest.fixture
def saved(here: Path) -> list[Path]:
    """Six checkpoints of one training, each in a file outside of the directory that is followed."""
    (here / "saved").mkdir()
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    space: dict[str, Any] = {}
    exec(TASK, space)
    optimizer = torch.optim.SGD(net.parameters(), lr=2.0)
    files: list[Path] = []
    for step in range(1, 7):
        for _ in range(10):
            optimizer.zero_grad()
            space["loss"](net, space["data"](0, 300)).mean().backward()
            optimizer.step()
        files.append(here / "saved" / f"step-{step}.safetensors")
        save_file(net.state_dict(), files[-1])
    return files


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def written(output: Path) -> int | None:
    """Return what changes when the output is replaced."""
    return output.stat().st_mtime_ns if output.exists() else None


class Job(Thread):
    """A job that does one thing after the other, and then leaves a mark; it saves once the output has changed.

    That does not change with the ``first`` checkpoints but the last of them.
    """

    def __init__(self, folder: Path, things: Sequence[Path | Callable[[], object]], first: int = 1) -> None:
        super().__init__(daemon=True)
        self._folder, self._things, self._first = folder, things, first
        self._output, self.mark = folder.parent / "out", folder.parent / "done"
        self.start()

    def run(self) -> None:
        try:
            self._work()
        finally:
            self.mark.touch()

    def _work(self) -> None:
        self._folder.mkdir()
        for number, thing in enumerate(self._things, 1):
            before = written(self._output)
            if isinstance(thing, Path):
                shutil.copy(thing, self._folder / f".{thing.name}")
                (self._folder / f".{thing.name}").replace(self._folder / thing.name)
                if self._first <= number < len(self._things):
                    until(lambda before=before: written(self._output) != before)
            else:
                thing()


def followed(
    run: Run, folder: Path, things: Sequence[Path | Callable[[], object]], *command: object, first: int = 1
) -> Any:
    """Follow a `Job` until its mark."""
    job = Job(folder, things, first)
    done = run(command[0], "ckpts", *command[1:], *FAST, "--until", "done", "-o", "out", "--json")
    job.join(LONG)
    return done


def test_a_real_training_is_followed_as_documented_at_the_cost_of_one_run(run: Run, here: Path):
    """Run the script of docs/follow.md, with a training that saves each file in pieces."""
    script = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    for name, words in (("python", ""), ("ckptavg", "-m ckptavg")):
        (here / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (here / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{here}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join([str(here), *sys.path]),
        "CKPTAVG_POLL": "0.05", "CKPTAVG_WAIT_STABLE": "0.2", "CKPTAVG_REPORT": "report.json",
        "CKPTAVG_KEEP_JOURNAL": "1",
    }  # fmt: skip
    follower = subprocess.Popen(["bash", "-c", script], cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
    seen, output = set[int | None](), here / "averaged.safetensors"
    while follower.poll() is None:
        seen.add(written(output))
        if output.exists():
            assert load_file(output).keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
        time.sleep(0.02)
    _, lines = follower.communicate()
    assert follower.returncode == 0, lines
    once = run("aswa", "ckpts", "--task", "task.py", "-o", "once", "--json")
    assert output.read_bytes() == (here / "once").read_bytes()
    mine, other = json.loads((here / "report.json").read_text()), json.loads(once.stdout)
    assert mine["cost"]["evaluations"] == other["cost"]["evaluations"] >= 2 * 5 - 1
    for key in ("candidates", "scores", "baselines", "verdict", "left_out"):
        assert mine[key] == other[key], key
    assert lines.count("averaged, metric") == 5 and "step 5: " in lines, lines
    assert len(seen) > 5
    journal = (here / "averaged.safetensors.ckptavg" / "journal.jsonl").read_text()
    assert journal.count('"key":"score val') == other["cost"]["evaluations"]


@pytest.mark.parametrize("command", ["soup --task task.py", "swa", "lawa --k 3", "lawa --k 2 --task task.py", "aswa"])
def test_the_output_is_that_of_one_run_afterwards(run: Run, here: Path, saved: list[Path], command: str):
    name, *options = command.split()
    done = followed(run, here / "ckpts", saved[:4], name, *options, first=int(options[1]) if "--k" in options else 1)
    assert done.returncode == 0, done.stderr
    once = run(name, "ckpts", *options, "-o", "once", "--json")
    assert (here / "out").read_bytes() == (here / "once").read_bytes()
    mine, other = json.loads(done.stdout), json.loads(once.stdout)
    assert mine["candidates"] == other["candidates"] and mine["verdict"] == other["verdict"]
    if name == "soup":  # the order of the walk is that of the scores, so that a new candidate may change it
        assert mine["cost"]["evaluations"] >= other["cost"]["evaluations"]
    assert not (here / "out.ckptavg").exists()


def test_early_rejection_is_followed_too(run: Run, here: Path, saved: list[Path]):
    (here / "task.py").write_text(TASK + "metric_bounds = (0.0, 1.0)\n")
    assert followed(run, here / "ckpts", saved[:4], "aswa", "--early-reject").returncode == 0
    assert run("aswa", "ckpts", "--early-reject", "-o", "once").returncode == 0
    assert (here / "out").read_bytes() == (here / "once").read_bytes()


def test_idle_time_ends_it(run: Run, here: Path, saved: list[Path]):
    done = run("swa", saved[0].parent, *FAST, "--idle", 0.6, "-o", "out")
    assert done.returncode == 0 and "until 0.6 s have brought no checkpoint" in done.stderr, done.stderr
    done = run("swa", "nowhere", *FAST, "--idle", 0.3, "-o", "other")
    assert done.returncode == 3 and not (here / "other").exists()


def test_python_follows_too(here: Path, saved: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    job, lines = Job(here / "ckpts", saved[:3]), list[str]()
    result = ckptavg.swa(
        "ckpts", follow=True, until="done", poll=0.05, wait_stable=0.2, output="out",
        watch=lambda stage, done, total, metrics: None if total else lines.append(stage),
    )  # fmt: skip
    job.join(LONG)
    assert [candidate.step for candidate in result.candidates] == [1, 2, 3]
    assert [line for line in lines if "averaged" in line][-1].startswith("step 3: taken; 3 of 3 candidates averaged")
    with pytest.raises(UsageError, match="no option 'follow'"):
        ckptavg.sewa("ckpts", follow=True)


@pytest.mark.parametrize("damage", ["truncated", "nan"])
def test_a_bad_checkpoint_is_left_out_and_the_next_one_taken(run: Run, here: Path, saved: list[Path], damage: str):
    state = load_file(saved[3])
    if damage == "nan":
        state["0.weight"][0, 0] = torch.nan
        save_file(state, saved[3])
    else:
        saved[3].write_bytes(saved[3].read_bytes()[:-5])
    bad = here / "ckpts" / saved[3].name
    things = [*saved[1:3], lambda: shutil.copy(saved[3], bad), saved[4]]
    done = followed(run, here / "ckpts", things, "aswa", "--task", "task.py")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [candidate["step"] for candidate in report["candidates"]] == [2, 3, 5]
    assert [file["path"] for file in report["left_out"]] == [str(bad.relative_to(here))]
    assert "left out ckpts/step-4.safetensors: " in done.stderr
    assert run("aswa", "ckpts", "--skip-bad", "-o", "once").returncode == 0
    assert (here / "out").read_bytes() == (here / "once").read_bytes()


def test_a_deleted_checkpoint_is_named_and_the_walk_starts_again_without_it(run: Run, here: Path, saved: list[Path]):
    first = here / "ckpts" / saved[0].name
    things = [*saved[:2], first.unlink, *saved[2:4]]
    done = followed(run, here / "ckpts", things, "swa")
    assert done.returncode == 0, done.stderr
    assert "ckpts/step-1.safetensors was deleted, but is part of out" in done.stderr
    assert [candidate["step"] for candidate in json.loads(done.stdout)["candidates"]] == [2, 3, 4]
    assert run("swa", "ckpts", "-o", "once").returncode == 0
    assert (here / "out").read_bytes() == (here / "once").read_bytes()


def test_the_last_output_stays_if_its_checkpoints_are_deleted_at_the_end(run: Run, here: Path, saved: list[Path]):
    before: list[int | None] = []

    def delete() -> None:
        until(lambda: written(here / "out") != before[0])
        for path in (here / "ckpts").iterdir():
            path.unlink()

    things = [*saved[:2], lambda: before.append(written(here / "out")), saved[2], delete]
    done = followed(run, here / "ckpts", things, "swa", "--task", "task.py")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["candidates"]) == 3 and "deleted" in report["verdict"]
    assert run("swa", "saved", "--stop", 3, "-o", "once").returncode == 0
    assert load_file(here / "out")["0.weight"].equal(load_file(here / "once")["0.weight"])


def test_a_killed_follower_goes_on_where_it_was(run: Run, here: Path, saved: list[Path]):
    ckpts = shutil.copytree(saved[0].parent, here / "ckpts")
    saved[5].replace(here / "later")
    (ckpts / saved[5].name).unlink()
    words = ["aswa", "ckpts", "--task", "task.py", "-o", "out", *map(str, FAST)]
    log = here / "calls"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CALLS": str(log), "KILL": "7"}
    killed = subprocess.run([sys.executable, "-m", "ckptavg", *words], cwd=here, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not (here / "out").exists()
    done = run(*words, "--idle", 0.5, CALLS=str(log))
    assert done.returncode == 0, done.stderr
    assert run("aswa", "ckpts", "-o", "once", CALLS=str(here / "other")).returncode == 0
    assert (here / "out").read_bytes() == (here / "once").read_bytes()
    assert log.stat().st_size <= (here / "other").stat().st_size + 1  # the one in progress


def test_a_signal_leaves_the_last_output_which_the_same_command_replaces(run: Run, here: Path, saved: list[Path]):
    ckpts = shutil.copytree(saved[0].parent, here / "ckpts")
    (ckpts / saved[5].name).replace(here / saved[5].name)
    words = ["aswa", "ckpts", "--task", "task.py", "-o", "out", *map(str, FAST)]
    log = here / "calls"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CALLS": str(log)}
    command = [sys.executable, "-m", "ckptavg", *words]
    follower = subprocess.Popen(command, cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
    assert follower.stderr is not None
    while "5 candidates averaged" not in (line := follower.stderr.readline()):
        assert line
    follower.send_signal(signal.SIGTERM)
    _, said = follower.communicate(timeout=LONG)
    assert follower.returncode == 75, said
    assert "error: interrupted; out is complete, with the checkpoints up to step 5" in said
    assert len(load_file(here / "out")) == 4
    (here / saved[5].name).replace(ckpts / saved[5].name)
    calls = log.stat().st_size
    done = run(*words, "--idle", 0.5, "--json", CALLS=str(log))
    assert done.returncode == 0, done.stderr
    # step 6 alone and looked ahead, two baselines, and the file of each run
    assert json.loads(done.stdout)["cost"]["evaluations"] <= 4 and log.stat().st_size - calls <= 6
    assert run("aswa", "ckpts", "-o", "once").returncode == 0
    assert (here / "out").read_bytes() == (here / "once").read_bytes()


def test_a_changed_candidate_is_measured_again(run: Run, here: Path, saved: list[Path]):
    """The journal of a killed follower is of other weights in a file of the same name, size and first bytes."""
    ckpts = shutil.copytree(saved[0].parent, here / "ckpts")
    words = ["aswa", "ckpts", "--task", "task.py", "-o", "out", *map(str, FAST), "--idle", 0.5]
    assert run(*words, "--keep-journal").returncode == 0
    done = run(*words, "--json", "--keep-journal")
    assert json.loads(done.stdout)["cost"]["evaluations"] == 0
    os.utime(ckpts / saved[0].name, (1, 1))  # what else tells a change behind the bytes that are sampled
    done = run(*words, "--json")
    assert json.loads(done.stdout)["cost"]["evaluations"] > 1  # that one, and the averages that it is in


def test_an_output_that_another_program_changed_is_not_replaced(run: Run, here: Path, saved: list[Path]):
    things = [*saved[:2], lambda: (here / "out").write_bytes(b"precious"), *saved[2:3]]
    job = Job(here / "ckpts", things)
    done = run("swa", "ckpts", *FAST, "--idle", LONG, "-o", "out")
    job.join(LONG)
    assert done.returncode == 6 and "out: was changed by another program" in done.stderr
    assert (here / "out").read_bytes() == b"precious"
    done = run("swa", "ckpts", *FAST, "--idle", 0.3, "-o", "out", "--no-resume")
    assert done.returncode == 6 and (here / "out").read_bytes() == b"precious"
    assert run("swa", "ckpts", *FAST, "--idle", 0.3, "-o", "out", "--force").returncode == 0
    assert len(load_file(here / "out")) == 4


def test_an_error_of_the_task_ends_it(run: Run, here: Path, saved: list[Path]):
    (here / "task.py").write_text(TASK.replace("nn.Linear(8, 2))", "nn.Linear(9, 2))"))
    done = run("aswa", "saved", *FAST, "-o", "out")
    assert done.returncode == 7 and not (here / "out").exists() and not (here / "out.ckptavg").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("swa --until done", "--until goes with --follow"), ("lawa --pid 3", "--pid goes with --follow"),
        ("swa --follow -o out/ --max-shard-size 1GB", "not those of --max-shard-size"),
        ("swa --follow --dry-run", "--dry-run shows one run"), ("swa --follow --idle 0", "--idle must be greater"),
        ("swa --follow --pid 0", "--pid must be at least 1"), ("sewa --follow", "No such option: --follow"),
        ("compare --follow", "No such option: --follow"), ("ema --pid 3", "No such option: --pid"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(run: Run, saved: list[Path], words: str, message: str):
    name, *options = words.split()
    done = run(name, "saved", *options)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_several_ranks_are_refused():
    with pytest.raises(UsageError, match="single process"):
        Options(follow=True, workers=replace(ALONE, world_size=2))


def test_a_process_has_ended_when_it_is_a_zombie_or_another_with_its_id():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process, later = Process(child.pid), Process(child.pid)
    assert not process.ended() and not Process(os.getpid()).ended()
    later._started = "0"  # pyright: ignore[reportPrivateUsage]
    assert later.ended()
    assert child.stdin is not None
    child.stdin.close()
    until(process.ended)
    child.wait()
    assert process.ended() and Process(child.pid).ended() and Process(2**40).ended()


def test_a_checkpoint_settles_while_another_is_being_written(here: Path, monkeypatch: pytest.MonkeyPatch):
    clock = [1000.0]
    monkeypatch.setattr("ckptavg.checkpoints.stability.time.monotonic", lambda: clock[0])
    folder = here / "ckpts"
    settling = Settling([folder], Window(), 5.0)
    settling.look()
    assert settling.files == {}
    folder.mkdir()
    steady, growing = folder / "step-1.pt", folder / "step-2.pt"
    steady.write_bytes(b"a")
    for second in range(8):
        with growing.open("ab") as file:
            file.write(b"b")
        settling.look()
        assert (steady in settling.settled) == (second >= 5) and growing not in settling.settled
        clock[0] += 1
    clock[0] += 4
    settling.look()
    assert set(settling.settled) == {steady, growing}
    trainer = folder / "checkpoint-3"
    trainer.mkdir()
    for name in ("model.safetensors", "optimizer.pt"):
        (trainer / name).touch()
    for second in range(12):
        settling.look()
        assert settling.changing == (second % 6 < 5)
        assert (trainer in settling.settled) == (second == 11)
        clock[0] += 1
        if second == 5:
            (trainer / "trainer_state.json").touch()  # what the Trainer writes last


def test_an_output_directory_is_replaced_as_a_whole(run: Run, here: Path, saved: list[Path]):
    for options in (["-o", "out/"], ["-o", "dcp", "--format", "dcp"]):
        folder = here / options[1]
        shutil.rmtree(here / "ckpts", ignore_errors=True)
        ckpts = shutil.copytree(saved[0].parent, here / "ckpts", ignore=lambda *_: [path.name for path in saved[2:]])
        words = ["swa", "ckpts", *options, *FAST, "--keep-journal"]
        assert run(*words, "--idle", 0.3).returncode == 0
        before = sorted(path.name for path in folder.iterdir())
        shutil.copy(saved[2], ckpts)
        done = run(*words, "--idle", 0.3, "--json")
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["candidates"]) == 3
        assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("output", ["ckpts/averaged.safetensors", "ckpts/averaged/"])
def test_an_output_among_the_checkpoints_is_no_new_one(run: Run, here: Path, saved: list[Path], output: str):
    shutil.copytree(saved[0].parent, here / "ckpts")
    done = run("swa", "ckpts", *FAST, "--idle", 1.0, "-o", output)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" averaged") == 1  # one update, not one for each time that the output was written
    assert run("swa", "ckpts", "--exclude", "averaged*", "-o", "once").returncode == 0
    written = here / output
    file = written / "model.safetensors" if written.is_dir() else written
    assert file.read_bytes() == (here / "once").read_bytes()


def test_a_process_that_is_not_running_is_named(run: Run, here: Path, saved: list[Path]):
    done = run("swa", saved[0].parent, *FAST, "--pid", 2**22 - 1, "-o", "out")
    assert done.returncode == 0 and f"process {2**22 - 1} has ended (it is not running)" in done.stderr, done.stderr

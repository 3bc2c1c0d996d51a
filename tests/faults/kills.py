"""Runs that are killed or stopped repeatedly until one finishes, and the losses that are permitted on the way."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ckptavg.journal import SOURCE_PREFIX
from faults.points import OLD
from faults.warm import Child, Done, Warm

COMMANDS = (
    "aswa --early-reject",
    "sewa --k 3 --steps 25",
    "sewa --solver quadratic --k 3 --verify 3",
    "twa --epochs 2 --layerwise",
    "soup --never-worse",
    "compare --strategies swa,soup,twa:epochs=1",
    "swa --no-baselines",
)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ENDED = (-9, 75)  # exit codes of a killed or stopped run


@dataclass(frozen=True)
class Whole:
    """Outcome of an undisturbed run of a command."""

    command: str
    data: bytes
    evaluations: int
    seconds: float
    calls: int


@dataclass
class Campaign:
    """Kills runs of one job's commands; reproducible except for moments that depend on the clock.

    Args:
        warm: server that starts the runs.
        folder: scratch directory.
        task: the task file.
        ckpts: the candidates.
        seed: seed of the commands, the moments and the number of kills.
    """

    warm: Warm
    folder: Path
    task: Path
    ckpts: Path
    seed: int
    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    phases: Counter[str] = field(default_factory=Counter[str])

    def measure(self, commands: Sequence[str] = COMMANDS) -> list[Whole]:
        """Run each command undisturbed."""
        found: list[Whole] = []
        for command in commands:
            place = self._place()
            log, calls = place / "log", self.folder / "calls"
            began = time.monotonic()
            done = self._start(command, place, {"calls": str(calls), "every": 0.02}, log).wait()
            seconds = time.monotonic() - began
            assert done.code == 0, done.err
            count = int(calls.read_text().split()[0])
            found.append(Whole(command, (place / "out").read_bytes(), _evaluations(log), seconds, count))
            shutil.rmtree(place)
        return found

    def run(self, wholes: Sequence[Whole], kills: int, stops: int = 0) -> None:
        """Kill and stop runs until both counts are reached; each run at most four times, and then let it finish."""
        rng = random.Random(self.seed)
        for name, wanted in (("kills", kills), ("stops", stops)):
            while self.counts[name] < wanted:
                times = min(rng.randint(1, 4), wanted - self.counts[name])
                self._scenario(rng.choice(wholes), rng, name, times)

    def _scenario(self, whole: Whole, rng: random.Random, name: str, times: int) -> None:
        place, force = self._place(), rng.random() < 0.4
        log, acknowledged = place / "log", place / "acknowledged"
        if force:
            (place / "out").write_bytes(OLD)
        command = f"{whole.command}{' --force' if force else ''}"
        hook: dict[str, object] = {"acknowledged": str(acknowledged), "every": 0.02}
        ended, due = 0, whole.evaluations
        while ended < times:
            done = self._ended(command, place, whole, rng, hook, log, name)
            self._judge(whole, place, force, done, acknowledged)
            if done.code not in ENDED:  # the run finished before its signal
                break
            ended += 1
            if _journal(place).exists() or not (place / "out").exists():
                continue
            if (place / "out").read_bytes() == whole.data:  # it had finished: with --force, the next run starts anew
                due = _evaluations(log) + whole.evaluations
        else:
            done = self._start(command, place, hook, log).wait()
            self._judge(whole, place, force, done, acknowledged, last=True)
        self.counts[name] += ended
        self.counts["resumes"] += ended
        repeated = _evaluations(log) - due
        self.counts["evaluations repeated"] += max(0, repeated)
        if repeated > ended:
            self._fault(whole, f"{repeated} evaluations repeated after {ended} {name}")
        shutil.rmtree(place)

    def _ended(
        self, command: str, place: Path, whole: Whole, rng: random.Random, hook: dict[str, object], log: Path, name: str
    ) -> Done:
        """Run with a signal at a random moment, or SIGKILL at a random system call among the writes."""
        if name == "kills" and rng.random() < 0.5:
            fault = [rng.randint(1, whole.calls), rng.choice(("KILL", "KILL", "TORN"))]
            return self._start(command, place, {**hook, "fault": fault}, log).wait()
        child = self._start(command, place, hook, log)
        time.sleep(rng.uniform(0, whole.seconds))
        stops = STOPS[command.startswith("compare") :]  # which goes on after SIGINT, without the running strategy
        child.kill(signal.SIGKILL if name == "kills" else rng.choice(stops))
        return child.wait()

    def _judge(
        self, whole: Whole, place: Path, force: bool, done: Done, acknowledged: Path, *, last: bool = False
    ) -> None:
        out = place / "out"
        data = out.read_bytes() if out.exists() else None
        if data not in (whole.data, OLD if force else None):
            self._fault(whole, "a partial output", "lost or partial outputs")
        if done.code in ENDED:
            self._missing(whole, place, data == whole.data, acknowledged)
            if done.code == 75 and (left := self._left(place)):
                self._fault(whole, f"stopped, but left {left}", "temporary files left")
            return
        # killed between the rename and the exit: the next run finds the output complete
        if done.code != (6 if not force and "exists already" in done.err and data == whole.data else 0):
            self._fault(whole, f"exit {done.code}: {done.err[-500:]}")
        if data != whole.data:
            self._fault(whole, "other bytes than undisturbed", "lost or partial outputs")
        left = self._left(place)
        if left or (last and done.code == 0 and (place / "out.ckptavg").exists()):
            self._fault(whole, f"left behind: {left or 'out.ckptavg'}", "temporary files left")

    def _left(self, place: Path) -> list[str]:
        return sorted({path.name for path in place.iterdir()} - {"out", "log", "acknowledged", "out.ckptavg"})

    def _missing(self, whole: Whole, place: Path, done: bool, acknowledged: Path) -> None:
        """Check that every acknowledged record is in the journal, unless the run has finished and removed it."""
        keys = set(acknowledged.read_text().splitlines()) if acknowledged.exists() else set[str]()
        keys = {key for key in keys if not key.startswith(SOURCE_PREFIX)}  # alone, these cannot be resumed from
        journal = _journal(place)
        found = set(_keys(journal)) if journal.exists() else set[str]()
        self.phases[_phase(found, place)] += 1
        self.counts["acknowledged records"] += len(keys)
        lost = keys - found
        if lost and not done:
            self._fault(whole, f"lost {sorted(lost)[:3]}", "acknowledged records lost")

    def _fault(self, whole: Whole, what: str, kind: str = "other faults") -> None:
        self.counts[kind] += 1
        self.wrong.append(f"{whole.command}: {what}")

    def _place(self) -> Path:
        place = self.folder / f"run-{self.counts['places']}"
        self.counts["places"] += 1
        place.mkdir(parents=True)
        return place

    def _start(self, command: str, place: Path, hook: dict[str, object], log: Path) -> Child:
        name, *options = command.split()
        task = () if name == "swa" else ("--task", self.task)
        arguments = (name, self.ckpts, "-o", "out", *task, *options)
        return self.warm.start(*arguments, cwd=place, hook=hook, LOG=str(log))


def _journal(place: Path) -> Path:
    return place / "out.ckptavg" / "journal.jsonl"


def _keys(journal: Path) -> Iterator[str]:
    """Read the keys of a journal without ckptavg; a torn line has no key."""
    for line in journal.read_bytes().split(b"\n")[1:]:
        sum_, _, text = line.partition(b" ")
        if sum_ == b"%08x" % zlib.crc32(text):
            yield json.loads(text)["key"]


def _phase(keys: set[str], place: Path) -> str:
    if (place / "out").exists() and (place / "out").read_bytes() != OLD:
        return "after the name"
    if any(re.fullmatch(r"\.out\.\d+\.ckptavg-tmp", path.name) for path in place.iterdir()):
        return "writing"
    if any(key.startswith(("score", "loss", "surrogate", "part")) for key in keys):
        return "learning"
    return "reading"


def _evaluations(log: Path) -> int:
    return log.read_text().count("v") if log.exists() else 0

"""A fault at every system call of a run in turn: the state of the destination afterwards, and after the next run."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from faults.warm import Done, Warm

KINDS = ("KILL", "TORN", "TERM", "ENOSPC", "EIO", "EDQUOT")
OLD = b"precious"


def checkpoints(folder: Path) -> Path:
    """Write three small checkpoints."""
    folder.mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        tensors = {"weight": torch.randn(50, 3, generator=draws), "count": torch.tensor(step)}
        save_file(tensors, folder / f"step-{step}.safetensors")
    return folder


@dataclass(frozen=True)
class Point:
    """The fault at call number ``at`` of a run, and the violations in its result."""

    what: str
    at: int
    force: bool
    wrong: Sequence[str]


def every_point(
    warm: Warm, folder: Path, command: Sequence[object], *, modules: Sequence[str], kinds: Sequence[str] = KINDS,
    stride: int = 1, first: int = 1, **environment: str,
) -> Iterator[Point]:  # fmt: skip
    """Run ``command``, which writes ``out``, with each fault at each call, new and with an old file there.

    Args:
        warm: server that starts the runs.
        folder: directory with the inputs of the command.
        command: arguments without ``-o``.
        modules: modules of ckptavg whose calls count.
        kinds: kinds of faults in `faults.hook`.
        stride: test only every ``stride``-th call.
        first: number of the first call.
        **environment: environment of the runs.
    """
    runs = _Runs(warm, folder, command, environment)
    hook = {"modules": modules, "calls": str(folder / "calls")}
    for force in (False, True):
        runs.prepare(force)
        whole = runs.run(force, hook)
        assert whole.code == 0, whole.err
        runs.new = (folder / "out").read_bytes()
        calls = (folder / "calls").read_text().split()[1:]
        for what in kinds:
            for at in range(first, len(calls) + 1, stride):
                if what in ("TORN", "SHORT") and not calls[at - 1].endswith("write"):
                    continue
                runs.prepare(force)
                done = runs.run(force, {"modules": modules, "fault": [at, what]})
                yield Point(what, at, force, list(runs.faults(what, force, done)))


class _Runs:
    def __init__(self, warm: Warm, folder: Path, command: Sequence[object], environment: dict[str, str]) -> None:
        self._warm, self._folder, self._command, self._environment = warm, folder, command, environment
        self._inputs = {path.name for path in folder.iterdir()} | {"calls"}
        self.new = b""

    def run(self, force: bool, hook: dict[str, object]) -> Done:
        more = ["--force"] if force else []
        command = [*self._command, "-o", "out", *more]
        return self._warm.run(*command, cwd=self._folder, hook=hook, **self._environment)

    def prepare(self, force: bool) -> None:
        for path in self._folder.iterdir():
            if path.name not in self._inputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if force:
            (self._folder / "out").write_bytes(OLD)

    def faults(self, what: str, force: bool, done: Done) -> Iterator[str]:
        """Return the violations after the run with the fault, and after the next."""
        out = self._folder / "out"
        found = out.read_bytes() if out.exists() else None
        if found not in (self.new, OLD if force else None):
            yield "a partial output"
        if done.code == 0 and found != self.new:
            yield "exit 0 without the output"
        allowed = {"KILL": (-9,), "TORN": (-9,), "TERM": (75, 0), "SHORT": (0,)}.get(what, (5, 0))
        if done.code not in allowed:
            yield f"exit {done.code}: {done.err[-300:]}"
        if "Traceback" in done.err or "bug" in done.err or done.err.count("error: ") > 1:
            yield f"not one line: {done.err[-300:]}"
        left = self._left() - {"out", "out.ckptavg"}
        if left and what in ("TERM", "SHORT"):
            yield f"litter: {left}"
        if done.code in (0, 5) and not left:
            return  # an error that left no file is as if the run had not happened
        again = self.run(force, {})
        if again.code != (6 if found == self.new and not force else 0):
            yield f"the next run: exit {again.code}: {again.err[-300:]}"
        if not out.exists() or out.read_bytes() != self.new:
            yield "the next run gives other bytes"
        if left := self._left() - {"out", "out.ckptavg"}:
            yield f"the next run leaves {left}"

    def _left(self) -> set[str]:
        return {path.name for path in self._folder.iterdir()} - self._inputs


def counted(points: Sequence[Point]) -> Counter[str]:
    """Return the counts for the summary."""
    return Counter({"fault points": len(points), "violations": sum(bool(point.wrong) for point in points)})

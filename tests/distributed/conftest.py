"""The real torchrun, on this machine, with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("program.py")
Torchrun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """Start that many workers of a script or of ``-m ckptavg``, with one thread each, and wait for them."""

    def start(
        world: int, *arguments: object, cwd: Path, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={world}"]
        paths = os.pathsep.join(map(str, (TESTS, TESTS.parent / "scripts" / "demo", TESTS.parent)))
        known = {name: value for name, value in os.environ.items() if not name.startswith("CKPTAVG")}
        done = subprocess.run(
            [*words, *map(str, arguments)],
            cwd=cwd,
            env={**known, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stderr[-6000:]
        return done

    return start


@pytest.fixture(scope="session")
def together(torchrun: Torchrun) -> Callable[[int, Sequence[Mapping[str, Any]], Path], list[list[dict[str, Any]]]]:
    """Carry out a plan on that many workers and return the results by rank; see `distributed.program`."""

    def carry_out(world: int, plan: Sequence[Mapping[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
        (folder / "plan").write_text(json.dumps(plan))
        torchrun(world, PROGRAM, folder / "plan", folder, cwd=folder)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]

    return carry_out

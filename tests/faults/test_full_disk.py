"""A full disk: detected before hours of work if it is foreseeable; otherwise no partial output and little lost work."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from faults import job
from faults.warm import Warm

TASK = Path(job.__file__)
SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path, leave: int) -> Path:
    """Fill the disk except for ``left`` bytes."""
    status = os.statvfs(place)
    (place / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - leave))
    return place / "filler"


def test_an_output_that_has_no_space_is_refused_before_any_work(warm: Warm, ckpts: Path, tmp_path: Path, disk: Path):
    fill(disk, 0)
    done = warm.run("aswa", ckpts, "--task", TASK, "-o", disk / "out", cwd=tmp_path, LOG=str(tmp_path / "log"))
    assert done.code == 5 and "no space left on device" in done.err, done.err
    assert not (tmp_path / "log").exists() and {path.name for path in disk.iterdir()} == {"filler"}
    (tmp_path / "big").mkdir()
    for step in (1, 2):
        save_file({"w": torch.ones(SIZE) * step}, tmp_path / "big" / f"step-{step}.safetensors")
    (disk / "filler").unlink()
    done = warm.run("swa", "big", "-o", disk / "out", cwd=tmp_path)
    assert done.code == 5 and f"{4 * SIZE:,} bytes are needed" in done.err and not list(disk.iterdir()), done.err


FILLING = """
from faults.job import *
from faults.test_full_disk import fill
from pathlib import Path
_loss = loss
def loss(model, batch):
    if "DISK" in os.environ and not (Path(os.environ["DISK"]) / "filler").exists():
        fill(Path(os.environ["DISK"]), 0)
    return _loss(model, batch)
"""


def test_a_disk_that_fills_up_costs_no_measurement_while_it_runs_and_leaves_no_part(
    warm: Warm, ckpts: Path, tmp_path: Path, disk: Path
):
    (tmp_path / "mine.py").write_text(FILLING)
    arguments = ("aswa", ckpts, "--task", "mine.py", "-o", disk / "out")
    done = warm.run(*arguments, cwd=tmp_path, DISK=str(disk))
    assert done.code == 5 and "no space left on device: " in done.err and "bytes are needed" in done.err, done.err
    assert "the run continues, but further measurements are lost if it ends early" in done.err
    assert done.err.count("the run continues") == 1
    assert {path.name for path in disk.iterdir()} <= {"filler", "out.ckptavg"}
    (disk / "filler").unlink()
    done = warm.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    fresh = warm.run("aswa", ckpts, "--task", "mine.py", "-o", "out", cwd=tmp_path)
    assert fresh.code == 0 and (tmp_path / "out").read_bytes() == (disk / "out").read_bytes()
    assert {path.name for path in disk.iterdir()} == {"out"}


@pytest.mark.parametrize("force", [False, True])
def test_a_limit_of_file_sizes_gives_the_same_error_as_a_full_disk(
    warm: Warm, ckpts: Path, tmp_path: Path, force: bool
):
    if force:
        (tmp_path / "out").write_bytes(b"precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ("aswa", ckpts, "--task", TASK, "-o", "out", *(["--force"] if force else []))
    done = warm.run(*arguments, cwd=tmp_path, hook={"largest": 700})
    assert done.code == 5 and "file too large: " in done.err and "bytes are needed" in done.err, done.err
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert left == before
    done = warm.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err


def test_an_output_on_another_file_system_than_everything_else_is_written(
    warm: Warm, ckpts: Path, tmp_path: Path, disk: Path
):
    done = warm.run("swa", ckpts, "-o", disk / "out", cwd=tmp_path)
    assert done.code == 0 and [path.name for path in disk.iterdir()] == ["out"], done.err

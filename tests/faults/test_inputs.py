"""Checkpoints that change, vanish or appear while they are read: named, and never averaged in a mixed state."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from faults import formats, job
from faults.mutations import MUTATIONS
from faults.warm import Done, Warm

TASK = Path(job.__file__)


def run(warm: Warm, folder: Path, place: Path, asked: str = "") -> Done:
    """Run a search on the checkpoints of a directory."""
    arguments = ("soup", folder, "--last", 3, "--task", TASK, "-o", "out", "--no-baselines")
    return warm.run(*arguments, cwd=place, **({"MUTATION": asked} if asked else {}))


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_change_is_noticed(warm: Warm, ckpts: Path, tmp_path: Path, format: str, name: str, tally: Counter[str]):
    files = formats.written(format, ckpts, tmp_path / "ckpts")
    moment = "load" if list(MUTATIONS).index(name) % 2 else "learn"
    done = run(warm, tmp_path / "ckpts", tmp_path, f"{moment}:{name}:{files[-2]}:{files[0]}")
    noticed = done.code == 3 and (files[-2].name in done.err or str(files[-2].parent) in done.err)
    tally.update({"inputs changed": 1, "unnoticed": not noticed, "bus errors": done.code == -7})
    assert noticed and "Traceback" not in done.err, done
    assert {path.name for path in tmp_path.iterdir()} == {"ckpts"}


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("moment", ["load", "learn"])
def test_a_deleted_checkpoint_is_read_to_its_end_and_named(
    warm: Warm, ckpts: Path, tmp_path: Path, format: str, moment: str
):
    files = formats.written(format, ckpts, tmp_path / "ckpts")
    assert run(warm, tmp_path / "ckpts", tmp_path).code == 0
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    done = run(warm, tmp_path / "ckpts", tmp_path, f"{moment}:delete:{files[-2]}:{files[0]}")
    assert done.code == 0 and f"{files[-2]} was deleted or renamed" in done.err, done.err
    assert (tmp_path / "out").read_bytes() == whole


def test_a_new_checkpoint_is_named_and_not_a_candidate(warm: Warm, ckpts: Path, tmp_path: Path):
    files = formats.written("torch", ckpts, tmp_path / "ckpts")
    assert run(warm, tmp_path / "ckpts", tmp_path).code == 0
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    done = run(warm, tmp_path / "ckpts", tmp_path, f"learn:appear:{files[-1]}:{files[0]}")
    assert done.code == 0 and "step-99.pt appeared during the run" in done.err, done.err
    assert (tmp_path / "out").read_bytes() == whole


def test_a_second_link_to_a_file_is_no_change(warm: Warm, ckpts: Path, tmp_path: Path):
    files = formats.written("safetensors", ckpts, tmp_path / "ckpts")
    (tmp_path / "mine.py").write_text(
        "from faults.job import *\n"
        "import os\n"
        "def model(_model=model):\n"
        f"    os.path.exists('last.safetensors') or os.link({str(files[-1])!r}, 'last.safetensors')\n"
        "    return _model()\n"
    )
    done = warm.run("soup", "ckpts", "--task", "mine.py", "-o", "out", cwd=tmp_path)
    assert done.code == 0 and (tmp_path / "last.safetensors").exists(), done.err


def test_the_directory_itself_may_be_removed(warm: Warm, ckpts: Path, tmp_path: Path):
    shutil.copytree(ckpts, tmp_path / "ckpts")
    (tmp_path / "mine.py").write_text(
        "from faults.job import *\n"
        "import shutil\n"
        "def model(_model=model):\n    shutil.rmtree('ckpts', ignore_errors=True)\n    return _model()\n"
    )
    done = warm.run("best", "ckpts", "--task", "mine.py", "-o", "out", cwd=tmp_path)
    assert done.code == 0 and "was deleted or renamed during the run" in done.err, done.err

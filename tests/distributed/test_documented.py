"""The commands of docs/scaling.md run as written, with two workers instead of eight."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Job, Run

from distributed.conftest import Torchrun

TEXT = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
LINES = re.findall(r"^(torchrun --.*)$", TEXT, re.MULTILINE)


@pytest.fixture
def folder(jobs: dict[str, Job], tmp_path: Path) -> Path:
    """Return a working directory as in the document: ./ckpts and ./task.py."""
    job = jobs["mlp"]
    shutil.copytree(job.folder, tmp_path / "ckpts")
    shutil.copy(job.task, tmp_path / "task.py")
    return tmp_path


@pytest.mark.parametrize("word", ["sewa", "lawa"])
def test_a_torchrun_line_runs_as_written(torchrun: Torchrun, folder: Path, word: str):
    (line,) = (line for line in LINES if f"ckptavg {word} " in line)
    words = shlex.split(line)
    assert words[:4] == ["torchrun", "--standalone", "--nproc-per-node", "8"]  # as in the fixture, except for the 8
    done = torchrun(2, *words[4:], cwd=folder)
    output = "averaged.safetensors" if "-o" not in words else words[words.index("-o") + 1]
    assert done.stdout == f"{output}\n" and (folder / output).exists()


def test_every_line_has_options_that_exist(run: Run, folder: Path):
    assert len(LINES) == 4
    for line in LINES:
        words = shlex.split(line)
        done = run(*words[words.index("ckptavg") + 1 :], "--dry-run", cwd=folder)
        assert done.returncode == 0 or "--shard needs several workers" in done.stderr, done.stderr


def test_the_batch_script_runs_as_written(folder: Path, tmp_path: Path):
    """Run under stub commands that do on one machine what SLURM's do on many."""
    (found,) = re.findall(r"^#!/bin/bash\n(?:.+\n)+?(?=```)", TEXT, re.MULTILINE)
    script, bin_ = tmp_path / "job.sbatch", tmp_path / "bin"
    script.write_text(found.replace("--nproc-per-node 8", "--nproc-per-node 2"))
    bin_.mkdir()
    (bin_ / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (bin_ / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    for path in bin_.iterdir():
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(bin_), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(script)], cwd=folder, env={**os.environ, **slurm, "PATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout == "averaged.safetensors\n" and (folder / "averaged.safetensors").exists()

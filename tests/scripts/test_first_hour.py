"""Four jobs from training to an averaged model that is loaded, by the commands that a person would type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "scripts" / "first_hour"
EXPECTED = {
    "a_trainer_lora.sh": ("8 candidates", "averaged/adapter_model.safetensors", "loaded: rank 16"),
    "b_lightning.sh": ("wins", "byte for byte", "loaded: test accuracy 0.8"),
    "c_shell.sh": ("best single", "accuracy of averaged.safetensors: 0.8"),
    "d_library.py": ("best single", "loaded: accuracy 0."),
}


@pytest.mark.thorough
@pytest.mark.parametrize("job", [*JOBS.glob("*.sh"), JOBS / "d_library.py"], ids=lambda job: job.stem)
def test_a_job_ends_with_an_average_that_loads(job: Path, tmp_path: Path):
    command = [sys.executable] * (job.suffix == ".py") + [job, tmp_path / "job"]
    # `ckptavg` and `python` are those of the environment that runs the tests
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    for text in EXPECTED[job.name]:
        assert text in printed, printed

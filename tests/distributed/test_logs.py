"""Only rank 0 logs, appends to a job's summary and writes the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TASK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distributed.conftest import Torchrun


@pytest.mark.filterwarnings("ignore")  # of TensorBoard about its own deprecations
def test_two_ranks_log_once(digits: Path, torchrun: Torchrun, tmp_path: Path):
    words = ("sewa", digits, "--k", 3, "--last", 6, "--steps", 8, "--task", TASK, "-o", "out/", "--json")
    summary = tmp_path / "summary.md"
    done = torchrun(
        2, "-m", "ckptavg", *words, "--log-to", "tensorboard:runs", cwd=tmp_path, GITHUB_STEP_SUMMARY=str(summary)
    )
    report = json.loads(done.stdout)
    (events,) = (tmp_path / "runs").rglob("*tfevents*")
    read = EventAccumulator(str(events.parent)).Reload()
    (score,) = read.Scalars("scores/test/loss")
    assert score.value == pytest.approx(report["scores"]["test"]["loss"], rel=1e-6)
    assert read.Scalars("search/learning_the_mask/loss")[-1].step == 8
    assert summary.read_text().count("## ckptavg `sewa`") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors"]

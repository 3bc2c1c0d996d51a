"""lm-evaluation-harness and torchmetrics through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from gpt2 import LINES
from torchmetrics.classification import MulticlassF1Score

import ckptavg

TASK = """
task: which_line
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{ends}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def which_line(tmp_path: Path) -> Path:
    """A multiple-choice task: select the end of a line out of two."""
    data = tmp_path / "lines.jsonl"
    rows = [
        {"start": line[:12], "ends": [line[12:], other[12:]], "label": 0}
        for line, other in zip(LINES[120:150], LINES[150:180], strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "which_line.yaml").write_text(TASK.format(data=data))
    return tmp_path / "which_line.yaml"


def test_the_harness_scores_candidates_where_they_are(run: Run, trainer_run: Path, which_line: Path):
    base = (trainer_run / "run", "--last", 3, "--lm-eval", which_line, "--json")
    done = run("aswa", *base)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 0 <= report["scores"]["val"]["metric"] <= 1 and report["scores"]["val"]["examples"] == 30
    assert report["scores"]["val"]["loss"] is None and report["cost"]["evaluations"] >= 3
    best = json.loads(run("best", *base, "--force").stdout)
    alone = [one["score"]["metric"] for one in best["candidates"]]
    assert best["scores"]["val"]["metric"] == max(alone)
    compared = run("compare", *base[:-1], "--strategies", "swa,soup,sewa:k=2:evaluations=5", "--force")
    assert compared.returncode == 0, compared.stderr
    assert "on which strategies chose" in " ".join(compared.stderr.split())  # the harness has no test data


def test_a_torchmetrics_metric_is_a_metric(run: Run, digits: Path, tmp_path: Path):
    """The macro F1 of the whole validation set, which is not a mean over examples."""
    import task as demo_task

    (tmp_path / "f1.py").write_text(
        Path(demo_task.__file__).read_text().replace("def metric(", "def accuracy(")
        + "\nfrom torchmetrics.classification import MulticlassF1Score\n\nmetric = MulticlassF1Score(10)\n"
    )
    done = run("compare", digits, "--task", "f1.py", "--last", 4, "--strategies", "swa,soup", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    written = ckptavg.evaluate([tmp_path / "averaged.safetensors"], str(tmp_path / "f1.py")).files[0].scores["val"]
    model = demo_task.model()
    from safetensors.torch import load_file

    model.load_state_dict(load_file(tmp_path / "averaged.safetensors"))
    model.eval()
    metric = MulticlassF1Score(10)
    with torch.no_grad():
        for inputs, labels in demo_task.val_dataloader():
            metric.update(model(inputs), labels)
    assert report["scores"]["val"]["metric"] == pytest.approx(float(metric.compute()), rel=1e-6)
    assert written.metric == report["scores"]["val"]["metric"]
    assert report["strategies"][1]["over_last"]["val"]["low"] is None  # four batches are too few to resample


def test_intervals_of_a_corpus_metric_come_from_batches(run: Run, digits: Path, tmp_path: Path):
    import task as demo_task

    source = Path(demo_task.__file__).read_text().replace("def metric(", "def accuracy(")
    (tmp_path / "f1.py").write_text(
        source
        + "\nfrom torchmetrics.classification import MulticlassF1Score\nfrom torch.utils.data import DataLoader\n"
        + "metric = MulticlassF1Score(10)\n_test = test_dataloader\n\n"
        + "def test_dataloader():\n    return DataLoader(_test().dataset, batch_size=16)\n"
    )
    done = run("compare", digits, "--task", "f1.py", "--last", 3, "--strategies", "swa", "--json")
    assert done.returncode == 0, done.stderr
    gain = json.loads(done.stdout)["strategies"][1]["over_last"]["test"]
    assert (gain["units"], gain["unit"]) == (25, "groups of batches") and gain["low"] < gain["value"] < gain["high"]

"""Real runs of every kind that has a page, as values of JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pages import probabilities_task

import ckptavg
from ckptavg.report.as_json import to_dict
from ckptavg.report.display import Report
from ckptavg.runtime.command_line import CommandLine

LINE = CommandLine(
    command="ckptavg sewa ./ckpts --k 5 --report run.html", configuration={"k": "5"}, processes=2,
    versions={"ckptavg": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
)  # fmt: skip
COMPARED = "last,best,swa,lawa:k=3,ema,soup,aswa,sewa:k=4:steps=30"


@pytest.fixture(scope="session")
def reports(jobs: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Reports of the command line by name, most of one training of two half circles."""
    job, folder = jobs["mlp"], tmp_path_factory.mktemp("reports")
    text = job.task.read_text()
    untested = folder / "no_test_data_task.py"
    untested.write_text(f"{text}\n\ndel test_dataloader\n")
    probable = Path(str(probabilities_task.__file__))

    def made(name: str, call: Callable[..., Report], task: Path | None = job.task, **options: Any) -> dict[str, Any]:
        chosen = {} if task is None else {"task": str(task)}
        report = call(job.folder, output=str(folder / f"{name}.safetensors"), **chosen, **options)
        return to_dict(report, LINE)

    found = {
        "sewa": made("sewa", ckptavg.sewa, k=4, steps=60),
        "aswa": made("aswa", ckptavg.aswa),
        "twa": made("twa", ckptavg.twa, epochs=10),
        "twa on training data": made("twa-t", ckptavg.twa, on="train", epochs=3),
        "quadratic twa": made("quadratic-twa", ckptavg.twa, solver="quadratic"),
        "quadratic sewa": made("quadratic-sewa", ckptavg.sewa, solver="quadratic", k="auto"),
        "layer-wise twa": made("layerwise", ckptavg.twa, layerwise=True, epochs=3),
        "swag": made("swag", ckptavg.swag, task=probable, draws=4),
        "comparison": made("compare", ckptavg.compare, strategies=COMPARED),
        "comparison without test data": made("untested", ckptavg.compare, task=untested, strategies="last,best,swa"),
        "without test data": made("sewa-untested", ckptavg.sewa, task=untested, k=3, steps=30),
        "blend": made("blend", ckptavg.blend),
        "one candidate": made("one", ckptavg.swa, last=1),
        "nothing scored": made("unscored", ckptavg.swa, task=None),
        "dry run": made("dry", ckptavg.sewa, dry_run=True),
    }  # fmt: skip
    plane = ckptavg.landscape(
        job.folder, task=str(job.task), mixtures="last,swa,lawa:k=3", grid=7, output=str(folder / "plane.json")
    )
    found["landscape"] = to_dict(plane, LINE)
    found["inspection"] = to_dict(ckptavg.inspect(job.folder, task=str(job.task), basin=True, last=8), LINE)
    found["evaluation"] = to_dict(ckptavg.evaluate(sorted(job.folder.iterdir())[:3], str(job.task)), LINE)
    return found

"""``swag`` on two workers writes the bytes and the figures of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Job, Run

METRICS = Path(__file__).with_name("metrics_task.py")


def test_two_workers_give_the_files_and_the_figures_of_one(
    run: Run, torchrun: Callable[..., Any], jobs: dict[str, Job], tmp_path: Path
):
    """Draws, posterior, and averaged predictions; sums of float64 have another order."""
    words = (
        "swag",
        jobs["mlp"].folder,
        "--last",
        5,
        "--task",
        METRICS,
        "--samples",
        2,
        "--scale",
        "auto",
        "--draws",
        3,
    )
    words += ("-o", "out/", "--posterior", "p.safetensors", "--max-shard-size", "1KB", "--device", "cpu", "--json")
    reports, files = list[Any](), list[dict[str, bytes]]()
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        done = run(*words, cwd=folder) if name == "one" else torchrun(2, "-m", "ckptavg", *words, cwd=folder)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
        files.append({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")})
    one, two = reports
    assert len(files[0]) >= 4 and files[0] == files[1]
    assert [draw["data_digest"] for draw in one["draws"]] == [draw["data_digest"] for draw in two["draws"]]
    assert one["gaussian"] == two["gaussian"]
    assert one["spread"] == pytest.approx(two["spread"], rel=1e-12)
    assert one["predictions"].keys() == two["predictions"].keys()
    for split, models in one["predictions"].items():
        for name, figures in models.items():
            other = two["predictions"][split][name]
            assert figures["score"]["loss"] == pytest.approx(other["score"]["loss"], abs=1e-12)
            assert figures["bins"]
            for mine, theirs in zip(figures["bins"], other["bins"], strict=True):
                assert mine == pytest.approx(theirs, abs=1e-12)
            for metric, value in figures["score"].get("metrics", {}).items():
                assert value == pytest.approx(other["score"]["metrics"][metric], abs=1e-12)

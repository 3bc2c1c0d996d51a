"""Digests are those of a single process, whatever number of ranks write the output and hash the sources."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors import safe_open

from distributed.conftest import Torchrun


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    """Checkpoints whose tensors are not in the order of the output; the SHA-256 of one is listed."""
    (folder := tmp_path / "ckpts").mkdir()
    draws = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        state = {name: torch.randn(70_001, generator=draws) for name in ("z", "b", "a")}
        torch.save({"c": torch.ones(3).half(), **state, "n": torch.tensor(step)}, folder / f"step-{step}.pt")
    listed = hashlib.sha256((folder / "step-2.pt").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{listed}  step-2.pt\n")
    return folder


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_three_ranks_write_the_digests_of_one(
    run: Run, torchrun: Torchrun, ckpts: Path, tmp_path: Path, algorithm: str
):
    words, reports = ("swa", ckpts, "--digests", algorithm, "--json", "-o"), list[dict[str, str]]()
    for name in ("one", "two"):  # of one thread, and of several
        done = run(*words, name, OMP_NUM_THREADS="1" if name == "one" else "4")
        reports.append(json.loads(done.stdout)["output"])
    reports.append(json.loads(torchrun(3, "-m", "ckptavg", *words, "three", cwd=tmp_path).stdout)["output"])
    assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "three")}) == 1
    assert len({(report["data_digest"], report["sha256"]) for report in reports}) == 1
    with safe_open(tmp_path / "three", "pt") as stored:
        metadata = stored.metadata()
    assert reports[2]["data_digest"] == metadata["ckptavg.data_digest"]
    kinds = [text[:6] for source in json.loads(metadata["ckptavg"])["sources"] for text in source["digests"].values()]
    assert kinds == [algorithm, "sha256", algorithm]
    done = run("verify", "three", "--sources", ckpts)
    assert done.returncode == 0 and "the data are as they were written" in done.stderr, done.stderr

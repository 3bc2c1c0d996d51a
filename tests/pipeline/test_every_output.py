"""``compare --write-all``: each strategy's file is what its own command writes, and there are all of them or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Job, Run

import ckptavg
from ckptavg.declaration import declared
from ckptavg.errors import OutputError, OutputExistsError, UsageError
from ckptavg.options.comparison import ComparisonOptions
from ckptavg.pipeline.comparison import DEFAULT
from ckptavg.pipeline.every_output import file_name
from ckptavg.strategies import strategies

SPECS = ["last", "swa", "soup", "lawa:k=2", "twa:epochs=1:on=train"]
FILES = {"last", "swa", "soup", "lawa-k=2", "twa-epochs=1-on=train"}


@pytest.fixture
def job(jobs: dict[str, Job]) -> Job:
    return jobs["mlp"]


def test_each_file_is_that_of_the_strategys_own_command(job: Job, tmp_path: Path):
    every = tmp_path / "every"
    done = ckptavg.compare(
        job.folder, SPECS, task=job.task, last=4, output=tmp_path / "best.safetensors", write_all=every
    )
    assert {path.name for path in every.iterdir()} == {f"{name}.safetensors" for name in FILES}
    for spec, row in zip(SPECS, done.strategies, strict=True):
        name, *settings = spec.split(":")
        own = tmp_path / "own.safetensors"
        values = {
            key: int(value) if value.isdigit() else value for key, _, value in (s.partition("=") for s in settings)
        }
        alone = getattr(ckptavg, name)(job.folder, task=job.task, last=4, output=own, force=True, **values)
        assert row.output is not None and row.output.path.read_bytes() == own.read_bytes()
        assert row.scores == alone.scores
    winner = next(row for row in done.strategies if row.name == done.winner)
    assert winner.output is not None and done.output is not None
    assert winner.output.path.read_bytes() == done.output.path.read_bytes()


def test_existing_files_are_replaced_only_with_force_and_before_any_search(job: Job, run: Run, tmp_path: Path):
    (tmp_path / "every").mkdir()
    (tmp_path / "every" / "soup.safetensors").write_bytes(b"precious")
    arguments = ("compare", job.folder, "--task", job.task, "--strategies", "swa,soup", "--last", 3, "--write-all")
    refused = run(*arguments, "every")
    assert refused.returncode == 6 and not (tmp_path / "averaged.safetensors").exists()
    assert refused.stderr.splitlines()[-2:] == [
        "error: every/soup.safetensors: exists already", "hint: --force replaces it; or choose another --write-all"
    ]  # fmt: skip
    assert (tmp_path / "every" / "soup.safetensors").read_bytes() == b"precious"
    done = run(*arguments, "every", "--force", "--json")
    assert done.returncode == 0 and "wrote 3 averages to every/" in done.stderr
    outputs = [row["output"]["path"] for row in json.loads(done.stdout)["strategies"]]
    assert outputs == [f"every/{name}.safetensors" for name in ("last", "swa", "soup")]
    assert (tmp_path / "every" / "soup.safetensors").read_bytes() != b"precious"


def test_a_winner_that_cannot_be_written_leaves_no_file_of_another_strategy(job: Job, tmp_path: Path):
    """The task creates the output during the run, so that the last file of all is refused."""
    output = tmp_path / "best.safetensors"
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(job.task.parent.parent)!r})",
        f"from jobs.{job.task.stem} import *",
    ]
    lines += ["_loader = test_dataloader", "def test_dataloader():", f"    open({str(output)!r}, 'a').close()"]
    (tmp_path / "mine.py").write_text("\n".join([*lines, "    return _loader()\n"]))
    with pytest.raises(OutputExistsError, match=r"best\.safetensors: exists already"):
        ckptavg.compare(
            job.folder, "swa,soup", task=str(tmp_path / "mine.py"), last=3, output=output, write_all=tmp_path / "every"
        )
    assert not (tmp_path / "every").exists()


def test_an_average_without_a_valid_score_is_named_as_not_written(job: Job, run: Run, tmp_path: Path):
    folder = tmp_path / "ckpts"
    shutil.copytree(job.folder, folder)
    weights = {name: torch.full_like(tensor, 3e38) for name, tensor in torch.load(folder / "step-65.pt").items()}
    torch.save(weights, folder / "step-65.pt")
    done = run("compare", folder, "--task", job.task, "--strategies", "swa", "--write-all", "every", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["output"] is None for row in report["strategies"]] == [False, True]
    (warning,) = [text for text in report["warnings"] if text.startswith("--write-all has no file of swa: ")]
    assert "loss() gave nan" in warning and warning in " ".join(done.stderr.split())


def test_names_of_files_are_safe_and_different():
    assert file_name("twa:on=train:lr=0.01") == "twa-on=train-lr=0.01"
    assert file_name("own:path=../a b:x") == "own-path=..-a-b-x"


def test_the_help_names_the_strategies_that_do_not_run_by_default():
    left_out = strategies().keys() - {spec.partition(":")[0] for spec in DEFAULT}
    assert declared(ComparisonOptions)[0].help.text.endswith(f"all possible but {', '.join(left_out)}.")


def test_two_files_of_one_name_are_refused(job: Job, tmp_path: Path):
    with pytest.raises(UsageError, match="-o and swa would both be written to"):
        ckptavg.compare(
            job.folder, "swa", task=job.task, output=tmp_path / "swa.safetensors", write_all=tmp_path, last=3
        )
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: is not a directory"):
        ckptavg.compare(job.folder, "swa", task=job.task, output=tmp_path / "x", write_all=tmp_path / "file", last=3)


@pytest.mark.parametrize("inside", [".", "more"])
def test_a_directory_that_is_the_output_or_in_it_is_refused(job: Job, tmp_path: Path, inside: str):
    output = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match=r"x\.safetensors.* is -o, or in it"):
        ckptavg.compare(job.folder, "swa", task=job.task, output=output, write_all=output / inside, last=3)
    assert not list(tmp_path.iterdir())


def test_an_empty_name_and_a_directory_of_candidates_are_refused(job: Job, run: Run, tmp_path: Path):
    before = sorted(job.folder.iterdir())
    with pytest.raises(OutputError, match="has candidates in it"):
        ckptavg.compare(job.folder, "swa", task=job.task, output=tmp_path / "x", write_all=job.folder, last=3)
    assert sorted(job.folder.iterdir()) == before
    refused = run("compare", job.folder, "--task", job.task, "--last", 3, "--write-all", "")
    assert refused.returncode == 2 and "--write-all is empty" in refused.stderr and not list(tmp_path.iterdir())


def test_other_formats_and_dtypes_are_those_of_the_output(job: Job, tmp_path: Path):
    done = ckptavg.compare(
        job.folder, "swa", task=job.task, last=3, output=tmp_path / "best", write_all=tmp_path / "every", format="dcp",
        dtype="bfloat16",
    )  # fmt: skip
    assert (tmp_path / "every" / "swa" / ".metadata").exists()
    assert all(row.output is not None and row.output.dtype == "bfloat16" for row in done.strategies)


def test_a_dry_run_says_how_many_are_written_and_where(job: Job, run: Run, tmp_path: Path):
    done = run("compare", job.folder, "--task", job.task, "--strategies", "swa", "--write-all", "every", "--dry-run")
    assert done.returncode == 0 and "would write 2 averages to every/" in done.stderr
    assert not list(tmp_path.iterdir())

"""Directories of torch.distributed.checkpoint: from FSDP2 on any number of ranks, through an average, to FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run
from safetensors import safe_open

from distributed.conftest import Torchrun


@pytest.fixture(scope="module")
def folder(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fsdp")
    torchrun(4, Path(__file__).with_name("fsdp_program.py"), place, cwd=place)
    return place


def test_the_average_of_what_1_2_and_4_ranks_saved_is_loaded_by_2(folder: Path):
    """Equal to the last bit: Σ w/3 in float64, rounded once."""
    report = json.loads((folder / "found.json").read_text())
    assert report["found"] == report["mean"]
    layouts = [len(list((folder / "run" / f"step-{step}").glob("*.distcp"))) for step in (1, 2, 3)]
    assert layouts == [1, 2, 4] and len(list((folder / "averaged").glob("*.distcp"))) > 1


def test_a_file_of_the_same_average_has_the_hash_that_the_directory_was_given(run: Run, folder: Path, tmp_path: Path):
    assert run("swa", folder / "run").returncode == 0
    with safe_open(tmp_path / "averaged.safetensors", "pt") as stored:
        digest = stored.metadata()["ckptavg.data_digest"]
    assert digest == json.loads((folder / "found.json").read_text())["data_digest"]
    assert json.loads((folder / "averaged" / "ckptavg.json").read_text())["ckptavg.data_digest"] == digest


def test_the_directory_can_be_verified_and_is_no_candidate(run: Run, folder: Path, tmp_path: Path):
    done = run("verify", folder / "averaged", "--sources", folder / "run")
    assert done.returncode == 0 and "7 tensors equal" in done.stderr, done.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "averaged").symlink_to(folder / "averaged")
    shown = run("inspect", "other", folder / "run", "--json").stdout
    assert [one["step"] for one in json.loads(shown)["candidates"]] == [1, 2, 3]
    assert "an earlier output of ckptavg" in shown


def test_a_directory_is_replaced_only_by_force(run: Run, folder: Path, tmp_path: Path):
    assert run("swa", folder / "run", "--format", "dcp", "-o", "out").returncode == 0
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    done = run("lawa", folder / "run", "--k", 1, "--format", "dcp", "-o", "out")
    assert done.returncode == 6 and "--force" in done.stderr
    done = run("lawa", folder / "run", "--k", 1, "--format", "dcp", "-o", "out", "--force")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no temporary files


def test_force_replaces_nothing_but_an_earlier_output(run: Run, folder: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to("thesis")
    arguments = ("swa", folder / "run", "--format", "dcp", "--force", "-o")
    for output, code in (("thesis", 6), (folder / "run", 6), (tmp_path, 6), ("link", 5), (".", 5)):
        done = run(*arguments, output)
        assert done.returncode == code and "bug" not in done.stderr, done.stderr
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"thesis", "link"}


def test_remains_of_a_killed_run_are_removed_and_the_old_output_is_restored(run: Run, folder: Path, tmp_path: Path):
    arguments = ("swa", folder / "run", "--format", "dcp", "-o", "out")
    assert run(*arguments).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out").rename(tmp_path / ".out.123.ckptavg-old")  # killed between the two renames
    (tmp_path / ".out.123.ckptavg-tmp").mkdir()
    (tmp_path / ".out.123.ckptavg-tmp" / ".metadata").write_bytes(b"")
    (tmp_path / ".out.whole.123.ckptavg-tmp").write_bytes(b"")
    done = run(*arguments)
    assert done.returncode == 6 and "--force" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run(*arguments, "--force").returncode == 0

"""Outputs are checked by the digest of their own data, with and without their sources; older ones as before."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from conftest import TASK, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.errors import InputError, UsageError
from ckptavg.pipeline.verification import verify

KEY = "ckptavg.data_digest"
DAMAGED = "the data are damaged: their digest is not the recorded one"


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    (folder := tmp_path / "ckpts").mkdir()
    draws = torch.Generator().manual_seed(0)
    for step in (1, 2, 3):
        state = {"b": torch.randn(300, generator=draws), "a": torch.randn(40, 7, generator=draws).bfloat16()}
        save_file({**state, "n": torch.tensor([step, 5])}, folder / f"s-{step}.safetensors")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory without the sources."""
    (folder := tmp_path / "elsewhere").mkdir()
    return folder


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as stored:
        return stored.metadata()


def edited(path: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    """Rewrite the metadata in a file's header; the data stay as they are."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    edit(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_data_are_checked_without_the_sources(run: Run, ckpts: Path, elsewhere: Path, algorithm: str):
    result = ckptavg.swa(ckpts, output=elsewhere / "out", digests=algorithm)
    done = run("verify", "out", "--json", cwd=elsewhere)
    name = {"blake3": "BLAKE3", "sha256": "SHA-256"}[algorithm]
    assert done.returncode == 0 and f"the data are as they were written, by their {name} digest" in done.stderr
    assert "not compared with its sources: s-1.safetensors is not under the working directory" in done.stderr
    found = json.loads(done.stdout)
    assert result.output and found["data_digest"] == result.output.data_digest == metadata_of(elsewhere / "out")[KEY]
    assert (found["damaged"], found["agree"], found["differ"]) == ([], [], []) and found["not_compared"]
    whole = verify(elsewhere / "out", ckpts)
    assert (whole.data_digest, whole.not_compared, len(whole.agree)) == (result.output.data_digest, None, 3)


def test_every_damaged_byte_of_the_data_is_found(ckpts: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(elsewhere)
    ckptavg.swa(ckpts, output="out")
    size = Path("out").stat().st_size
    header = 8 + int.from_bytes(Path("out").read_bytes()[:8], "little")
    for place in range(header, size, 97):
        flip(Path("out"), place)
        assert verify(Path("out")).damaged == ["out"]
        flip(Path("out"), place)
    assert not verify(Path("out")).damaged


def test_damage_is_an_error_and_with_the_sources_names_the_tensor(run: Run, ckpts: Path, elsewhere: Path):
    ckptavg.swa(ckpts, output=elsewhere / "out")
    flip(elsewhere / "out", -1)
    done = run("verify", "out", cwd=elsewhere)
    assert done.returncode == 3 and done.stderr == f"error: out: {DAMAGED}\n" and not done.stdout
    done = run("verify", "out", "--sources", ckpts, cwd=elsewhere)
    assert done.returncode == 3 and "error: out: a: 1 tensor not equal to the average" in done.stderr
    assert json.loads(run("verify", "out", "--json", cwd=elsewhere).stdout)["damaged"] == ["out"]


def test_damage_of_what_sources_cannot_give_again_is_found(run: Run, digits: Path, tmp_path: Path):
    assert run("swa", digits, "--last", 3, "--task", TASK, "--no-baselines", "-o", "out").returncode == 0
    state = load_file(path := tmp_path / "out")
    state["1.running_mean"] += 1
    save_file(state, path, metadata_of(path))
    done = run("verify", "out", "--sources", digits)
    assert done.returncode == 3 and done.stderr == f"error: out: {DAMAGED}\n"


def test_some_sources_in_the_working_directory_must_all_be_there(run: Run, ckpts: Path, tmp_path: Path):
    ckptavg.swa(ckpts, output=tmp_path / "out")
    (ckpts / "s-3.safetensors").unlink()
    done = run("verify", "out")
    assert done.returncode == 3 and "no source s-3.safetensors under ." in done.stderr
    (ckpts / "s-1.safetensors").unlink()
    assert run("verify", "out").returncode == 0
    done = run("verify", "out", "--sources", ".")
    assert done.returncode == 3 and "no source s-1.safetensors under ." in done.stderr


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_each_shard_is_checked(run: Run, tmp_path: Path, elsewhere: Path):
    (ckpts := tmp_path / "large").mkdir()
    for step in (1, 2):
        save_file({name: torch.full((300,), float(step)) for name in "abc"}, ckpts / f"s-{step}.safetensors")
    done = run("swa", ckpts, "-o", "elsewhere/", "--max-shard-size", "1KB", "--json")
    report, index = json.loads(done.stdout)["output"], "model.safetensors.index.json"
    digests = [metadata_of(elsewhere / name)[KEY] for name in SHARDS]
    assert len({*digests}) == 1  # of equal data
    lines = "".join(f"{text}  {name}\n" for text, name in zip(digests, SHARDS, strict=True))
    assert report["data_digest"] == f"blake3:{blake3(lines.encode()).hexdigest()}" and report["sha256"] == ""
    done = run("verify", index, "--json", cwd=elsewhere)
    assert done.returncode == 0 and json.loads(done.stdout)["data_digest"] == report["data_digest"]
    assert run("verify", index, "--sources", ckpts, cwd=elsewhere).returncode == 0
    flip(elsewhere / SHARDS[1], -1)
    done = run("verify", index, cwd=elsewhere)
    assert done.returncode == 3 and done.stderr == f"error: {SHARDS[1]}: {DAMAGED}\n"
    flip(elsewhere / SHARDS[1], -1)
    edited(elsewhere / SHARDS[2], lambda metadata: metadata.pop(KEY))
    done = run("verify", index, cwd=elsewhere)
    assert done.returncode == 3 and done.stderr.startswith(f"error: {SHARDS[2]}: has no {KEY} in its metadata, but")


@pytest.mark.parametrize("key", ["", "model"])
def test_a_dcp_directory_has_the_digest_of_a_file_of_the_same_content(
    run: Run, digits: Path, elsewhere: Path, key: str
):
    """Its own files have a CRC-32 for each tensor, so that the digest alone is changed."""
    if key:
        import torch.distributed.checkpoint as dcp

        for step in (1, 2):
            state = {"z": torch.arange(5.0) * step, "a": torch.tensor([1 + 2j, 0.5j]), "n": torch.tensor(step)}
            with warnings.catch_warnings(action="ignore"):  # about torch.distributed not being initialized
                dcp.save({key: state}, checkpoint_id=elsewhere.parent / "run" / f"step-{step}", no_dist=True)
        digits = elsewhere.parent / "run"
    assert run("swa", digits, "-o", elsewhere / "dcp", "--format", "dcp").returncode == 0
    assert run("swa", digits, "-o", elsewhere / "file").returncode == 0
    record = json.loads((elsewhere / "dcp" / "ckptavg.json").read_text())
    assert record[KEY] == metadata_of(elsewhere / "file")[KEY]
    for words in ((), ("--sources", digits)):
        done = run("verify", "dcp", *words, cwd=elsewhere)
        assert done.returncode == 0 and "the data are as they were written" in done.stderr, done.stderr
    record[KEY] = f"blake3:{'0' * 64}"
    (elsewhere / "dcp" / "ckptavg.json").write_text(json.dumps(record))
    for words in ((), ("--sources", digits)):
        done = run("verify", "dcp", *words, cwd=elsewhere)
        assert done.returncode == 3 and done.stderr == f"error: dcp: {DAMAGED}\n"


FORGED = {
    "of other data": (f"blake3:{'0' * 64}", DAMAGED),
    "by another algorithm": (f"sha256:{'0' * 64}", DAMAGED),
    "in capitals": (f"blake3:{'A' * 64}", f"{KEY} cannot be 'blake3:AAA"),
    "of an unknown algorithm": (f"md5:{'0' * 64}", f"{KEY} cannot be 'md5:000"),
    "too short": ("blake3:00", f"{KEY} cannot be 'blake3:00'"),
    "with a line break": (f"blake3:{'0' * 64}\n", f"{KEY} cannot be"),
    "empty": ("", f"{KEY} cannot be ''"),
    "huge": ("x" * 10**6, f"{KEY} cannot be 'xxx"),
    "removed": (None, f"its metadata have digests of the sources, but no {KEY}"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_digest_is_refused_in_one_line(run: Run, ckpts: Path, elsewhere: Path, name: str):
    text, message = FORGED[name]
    ckptavg.swa(ckpts, output=elsewhere / "out")
    edited(elsewhere / "out", lambda metadata: metadata.pop(KEY) if text is None else metadata.update({KEY: text}))
    for words in ((), ("--sources", ckpts)):
        done = run("verify", "out", *words, cwd=elsewhere)
        expected = message if text is not None or words else "no source s-1.safetensors under"
        assert done.returncode == 3 and expected in done.stderr and not done.stdout, done.stderr
        assert len(done.stderr.splitlines()) <= 2 and len(done.stderr) < 1000


def as_version_0_1(metadata: dict[str, str], ckpts: Path) -> None:
    """Give the metadata the form that version 0.1 wrote: schema 1, SHA-256 alone, none of the data."""
    record = json.loads(metadata["ckptavg"])
    for source in record["sources"]:
        names = source.pop("digests")
        source["sha256"] = {name: hashlib.sha256((ckpts / name).read_bytes()).hexdigest() for name in names}
    del metadata[KEY]
    metadata["ckptavg"] = json.dumps({**record, "schema": 1, "version": "0.1.0"})


def test_an_output_of_version_0_1_is_verified(run: Run, ckpts: Path, elsewhere: Path):
    ckptavg.swa(ckpts, output=elsewhere / "old")
    edited(elsewhere / "old", lambda metadata: as_version_0_1(metadata, ckpts))
    done = run("verify", "old", "--sources", ckpts, "--json", cwd=elsewhere)
    assert done.returncode == 0 and "3 tensors equal" in done.stderr and "digest" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert (found["data_digest"], found["without_digest"], found["damaged"]) == ("", [], [])
    done = run("verify", "old", cwd=elsewhere)  # there is nothing else to check it by
    assert done.returncode == 3 and "no source s-1.safetensors under ." in done.stderr
    flip(elsewhere / "old", -1)
    assert "a: 1 tensor not equal" in run("verify", "old", "--sources", ckpts, cwd=elsewhere).stderr


OLD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of another file": (lambda sums: sums.update({"s-1.safetensors": "0" * 64}), "its SHA-256 differs"),
    "with its algorithm": (lambda sums: sums.update({"s-1.safetensors": f"sha256:{'0' * 64}"}), "sha256 cannot be"),
    "in capitals": (lambda sums: sums.update({"s-1.safetensors": "A" * 64}), "sources[0].sha256 cannot be"),
    "too short": (lambda sums: sums.update({"s-1.safetensors": "0" * 63}), "sources[0].sha256 cannot be"),
    "a number": (lambda sums: sums.update({"s-1.safetensors": 5}), "sources[0].sha256 cannot be"),
    "none": (lambda sums: sums.clear(), "sources[0].sha256 cannot be"),
    "one emptied": (lambda sums: sums.update({"s-1.safetensors": ""}), "digests.s-1.safetensors is"),
}


@pytest.mark.parametrize("name", OLD)
def test_forged_digests_of_version_0_1_are_refused(run: Run, ckpts: Path, elsewhere: Path, name: str):
    edit, message = OLD[name]

    def forge(metadata: dict[str, str]) -> None:
        as_version_0_1(metadata, ckpts)
        record = json.loads(metadata["ckptavg"])
        edit(record["sources"][0]["sha256"])
        metadata["ckptavg"] = json.dumps(record)

    ckptavg.swa(ckpts, output=elsewhere / "old")
    edited(elsewhere / "old", forge)
    done = run("verify", "old", "--sources", ckpts, cwd=elsewhere)
    assert done.returncode == 3 and message in done.stderr and not done.stdout, done.stderr


def test_an_output_of_version_0_1_without_digests_is_verified(run: Run, ckpts: Path, elsewhere: Path):
    def forge(metadata: dict[str, str]) -> None:
        as_version_0_1(metadata, ckpts)
        record = json.loads(metadata["ckptavg"])
        for source in record["sources"]:
            source["sha256"] = dict.fromkeys(source["sha256"], "")
        metadata["ckptavg"] = json.dumps(record)

    ckptavg.swa(ckpts, output=elsewhere / "old")
    edited(elsewhere / "old", forge)
    done = run("verify", "old", "--sources", ckpts, cwd=elsewhere)
    assert done.returncode == 0 and "no digest of 3 sources" in done.stderr, done.stderr


def test_outputs_as_candidates_do_not_hand_their_digest_on(run: Run, ckpts: Path, tmp_path: Path):
    """Even where all have the same, as copies do."""
    assert run("swa", ckpts, "-o", "first").returncode == 0
    shutil.copy(tmp_path / "first", tmp_path / "copy")
    assert run("last", "first", "-o", "plain", "--digests", "none").returncode == 0
    assert run("last", "first", "-o", "second").returncode == 0
    assert KEY not in metadata_of(tmp_path / "plain")
    assert metadata_of(tmp_path / "second")[KEY] == metadata_of(tmp_path / "first")[KEY]  # of the same data
    assert run("verify", "second", "--sources", ".").returncode == 0


def test_a_posterior_and_its_draws_are_checked_by_their_digests(run: Run, ckpts: Path, elsewhere: Path):
    ckptavg.swag(ckpts, posterior=elsewhere / "p.safetensors", output=elsewhere / "mean")
    assert run("swag", "--from", "p.safetensors", "--samples", 2, "-o", "draws/", cwd=elsewhere).returncode == 0
    files = ["p.safetensors", "draws/sample-1/model.safetensors"]
    for file in files:
        done = run("verify", file, cwd=elsewhere)
        assert done.returncode == 0 and "as they were written" in done.stderr and "is a posterior" in done.stderr
        done = run("verify", file, "--sources", ckpts, cwd=elsewhere)
        assert done.returncode == 3 and "is a posterior of swag, or was drawn from one" in done.stderr
        flip(elsewhere / file, -1)
        done = run("verify", file, cwd=elsewhere)
        assert done.returncode == 3 and done.stderr == f"error: {file}: {DAMAGED}\n"
    record = json.loads(metadata_of(elsewhere / files[1])["ckptavg"])
    assert record["posterior"]["digest"].startswith("blake3:")


def test_a_posterior_without_digests_has_none(run: Run, ckpts: Path, elsewhere: Path):
    ckptavg.swag(ckpts, posterior=elsewhere / "p.safetensors", output=elsewhere / "mean", digests="none")
    metadata = metadata_of(elsewhere / "p.safetensors")
    sources = json.loads(metadata["ckptavg"])["sources"]
    assert KEY not in metadata and [{*source["digests"].values()} for source in sources] == [{""}] * 3
    assert run("verify", "p.safetensors", cwd=elsewhere).returncode == 3


def digests_of(path: Path) -> dict[str, str]:
    sources = json.loads(metadata_of(path)["ckptavg"])["sources"]
    return {name: digest for source in sources for name, digest in source["digests"].items()}


def test_a_listed_sum_is_recorded_and_others_are_of_the_option(run: Run, ckpts: Path, tmp_path: Path):
    files = [ckpts / f"s-{step}.safetensors" for step in (1, 2, 3)]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    (ckpts / "SHA256SUMS").write_text(f"{sums[1]}  s-2.safetensors\n")
    fast, slow = ([f"{name}:{make(path.read_bytes()).hexdigest()}" for path in files] for name, make in (
        ("blake3", blake3), ("sha256", hashlib.sha256),
    ))  # fmt: skip
    expected = {"blake3": [fast[0], slow[1], fast[2]], "sha256": slow, "none": [""] * 3}
    for option, texts in expected.items():
        assert run("swa", ckpts, "-o", option, "--digests", option).returncode == 0
        assert [*digests_of(tmp_path / option).values()] == texts
        assert run("verify", option, "--sources", ckpts).returncode == 0


def test_a_blob_of_a_cache_is_compared_with_its_name_by_any_digests(run: Run, ckpts: Path, tmp_path: Path):
    (blobs := tmp_path / "hub" / "blobs").mkdir(parents=True)
    for step in (1, 2):
        content = (ckpts / f"s-{step}.safetensors").read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (tmp_path / "hub" / f"s-{step}.safetensors").symlink_to(blob)
    names = [f"sha256:{blob.name}" for blob in blobs.iterdir()]
    for option in ("blake3", "sha256"):
        assert run("swa", "hub/s-1.safetensors", "hub/s-2.safetensors", "-o", option).returncode == 0
        assert sorted(digests_of(tmp_path / option).values()) == sorted(names)
        assert run("verify", option, "--sources", "hub").returncode == 0
    flip(next(blobs.iterdir()), -1)
    for option in ("blake3", "sha256"):
        done = run("swa", "hub/s-1.safetensors", "hub/s-2.safetensors", "-o", "b", "--digests", option)
        assert done.returncode == 3 and "but in the cache it is called" in done.stderr and not Path("b").exists()


def test_the_old_flag_leads_to_the_new_one(run: Run, ckpts: Path):
    done = run("swa", ckpts, "--no-digests")
    assert done.returncode == 2 and "--digests" in done.stderr.replace("--no-digests", "")
    with pytest.raises(UsageError, match="--digests must be one of blake3, sha256, none, not False"):
        ckptavg.swa(ckpts, digests=False)


def test_a_file_that_is_no_output_is_not_checked(ckpts: Path):
    with pytest.raises(InputError, match="has no ckptavg metadata"):
        verify(ckpts / "s-1.safetensors")

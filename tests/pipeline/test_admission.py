"""Admission of candidates: bad ones (refused, left out or averaged), unfinished ones and checksum lists."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from hostile import torch_cases
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptavg import api
from ckptavg.checkpoints import stability
from ckptavg.checkpoints.checksums import Manifest
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.window import Window
from ckptavg.errors import InputError, excluding
from ckptavg.strategies.swa import SWA

TASK = """
import torch
from torch import nn
def model(): return nn.Linear(3, 2)
def loss(model, batch): return (model(batch) - 1).square().mean(dim=1)
def val_dataloader(): return [torch.randn(8, 3, generator=torch.Generator().manual_seed(0))]
"""
NAN = float("nan")


def state(step: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(2, 3, generator=draws), "bias": torch.randn(2, generator=draws)}


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    """Directory with step-1, 2, 4 and 5, all good."""
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for step in (1, 2, 4, 5):
        save_file(state(step), folder / f"step-{step}.safetensors")
    (tmp_path / "mine.py").write_text(TASK)
    return folder


def with_value(value: float, at: int = 3) -> dict[str, Tensor]:
    tensors = state(3)
    tensors["weight"].view(-1)[at] = value
    return tensors


def _truncated(folder: Path) -> None:
    save_file(state(3), folder / "step-3.safetensors")
    os.truncate(folder / "step-3.safetensors", 90)


def _damaged(folder: Path) -> None:
    """Flip a bit of a torch file beyond the bytes that are compared to detect duplicates."""
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(9000)}, folder / "step-3.pt")
    raw = bytearray((folder / "step-3.pt").read_bytes())
    at = raw.find(torch.ones(8000).numpy().tobytes()) + 30_000
    raw[at] ^= 1
    (folder / "step-3.pt").write_bytes(raw)
    for path in [*folder.glob("*.safetensors")]:
        save_file({**load_file(path), "more": torch.zeros(9000)}, path)


def _invalid_bool(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors")]:
        save_file({**load_file(path), "mask": torch.ones(2, dtype=torch.bool)}, path)
    raw = (folder / "step-1.safetensors").read_bytes()
    assert raw.endswith(b"\1\1")
    (folder / "step-3.safetensors").write_bytes(raw[:-1] + b"\2")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (lambda f: save_file(with_value(NAN), f / "step-3.safetensors"), "weight: 1 value is NaN or infinite"),
    "inf": (lambda f: torch.save(with_value(-float("inf")), f / "step-3.pt"), "weight: 1 value is NaN or infinite"),
    "half": (_truncated, "file is truncated"),
    "checksum": (_damaged, "more: checksum of record"),
    "bool": (_invalid_bool, "mask: element 1 is the byte 2"),
    "empty": (lambda f: (f / "step-3.pt").touch(), "file is empty"),
    "pointer": (lambda f: (f / "step-3.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "fifo": (lambda f: os.mkfifo(f / "step-3.pt"), "is a FIFO"),
    "link": (lambda f: (f / "step-3.pt").symlink_to("gone"), "is a link to a file that does not exist"),
    "sum": (
        lambda f: (save_file(state(3), f / "step-3.safetensors"),
                   (f / "SHA256SUMS").write_text(f"{'0' * 64}  step-3.safetensors\n")), "its SHA-256 is",
    ),
}  # fmt: skip
COMMANDS = {
    "swa": ("swa",),
    "sewa": ("sewa", "--k", 2, "--steps", 3, "--task", "mine.py"),
    "bits": ("soup", "--bits", 4, "--task", "mine.py"),
    "command": ("best", "--score-cmd", "echo 1 #"),
    "compare": ("compare", "--strategies", "swa,soup", "--task", "mine.py"),
    "landscape": ("landscape", "--samples", 3, "--task", "mine.py"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_candidate_is_refused_or_left_out_as_if_absent(run: Run, ckpts: Path, tmp_path: Path, kind: str):
    build, message = BAD[kind]
    build(ckpts)
    refused = run("swa", "ckpts", "-o", "refused.safetensors")
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.returncode == 3 and len(errors) == 1 and message in errors[0] and "step-3" in errors[0]
    assert "--skip-bad" in refused.stderr and "--exclude 'step-3" in refused.stderr
    done = run("swa", "ckpts", "-o", "out.safetensors", "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("left out ")]
    assert len(said) == 1 and message in said[0] and said[0].count("step-3") == 1
    report = json.loads(done.stdout)
    assert [Path(one["path"]).stem for one in report["left_out"] if one["kind"] == "bad"] == ["step-3"]
    next(ckpts.glob("step-3*")).unlink()
    (ckpts / "SHA256SUMS").unlink(missing_ok=True)
    assert run("swa", "ckpts", "-o", "without.safetensors").returncode == 0
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "without.safetensors").read_bytes()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_leave_out_bad_candidates(run: Run, ckpts: Path, tmp_path: Path, name: str):
    _truncated(ckpts)
    save_file(with_value(NAN), ckpts / "step-6.safetensors")
    words = COMMANDS[name]
    output = "out/" if name == "landscape" else "out"
    refused = run(*words, "ckpts", "-o", output)
    assert refused.returncode == 3 and "ckpts/step-3.safetensors: file is truncated" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run(*words, "ckpts", "-o", output, "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    assert "left out ckpts/step-3.safetensors: file is truncated" in done.stderr
    assert "left out ckpts/step-6.safetensors: weight: 1 value is NaN" in done.stderr
    bad = [one["path"] for one in json.loads(done.stdout)["left_out"] if one["kind"] == "bad"]
    assert bad == ["ckpts/step-3.safetensors", "ckpts/step-6.safetensors"]


def test_window_counts_good_candidates_only(run: Run, ckpts: Path, tmp_path: Path):
    """Damage may be detected early or late: truncated on opening, NaN on reading."""
    _truncated(ckpts)
    save_file(with_value(NAN), ckpts / "step-6.safetensors")
    done = run("swa", "ckpts", "--last", 2, "--skip-bad", "--json")
    assert [one["step"] for one in json.loads(done.stdout)["candidates"]] == [4, 5]
    save_file(with_value(NAN), ckpts / "step-0.safetensors")  # outside the window: not read
    done = run("swa", "ckpts", "--last", 2, "--skip-bad", "--json", "-o", "again.safetensors")
    outside = [one for one in json.loads(done.stdout)["left_out"] if one["path"] == "ckpts/step-0.safetensors"]
    assert [one["reason"] for one in outside] == ["outside the window of steps"]


def test_bad_files_named_explicitly_are_left_out_too(run: Run, ckpts: Path):
    _truncated(ckpts)
    done = run("swa", *sorted(ckpts.iterdir()), ckpts / "step-9.safetensors", "--skip-bad", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["candidates"]) == 4
    assert "step-9.safetensors: no such file" in done.stderr


def test_too_few_good_candidates_is_a_single_error(run: Run, ckpts: Path, tmp_path: Path):
    for path in ckpts.iterdir():
        os.truncate(path, 20)
    done = run("swa", "ckpts", "--skip-bad")
    assert done.returncode == 3 and done.stderr.count("error: ") == 1
    assert "ckpts: no checkpoints found; 4 left out (ckpts/step-1.safetensors: file is truncated" in done.stderr
    save_file(state(1), ckpts / "step-1.safetensors")
    done = run("lawa", "ckpts", "--k", 2, "--skip-bad")
    assert done.returncode == 2 and "--k 2 asks for more checkpoints than the 1 candidate given" in done.stderr
    assert "3 bad checkpoints left out" in done.stderr
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_allow_nonfinite_averages_as_in_ieee_754(run: Run, ckpts: Path, tmp_path: Path, value: float):
    save_file(with_value(value, at=4), ckpts / "step-3.safetensors")
    assert run("swa", "ckpts").returncode == 3
    done = run("swa", "ckpts", "--allow-nonfinite")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "averaged.safetensors")
    shutil.copy(ckpts / "step-3.safetensors", tmp_path / "bad.safetensors")
    save_file(state(3), ckpts / "step-3.safetensors")
    assert run("swa", "ckpts", "-o", "good.safetensors").returncode == 0
    expected = load_file(tmp_path / "good.safetensors")
    expected["weight"].view(-1)[4] = value
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name].nan_to_num(nan=7.0), expected[name].nan_to_num(nan=7.0))
    (ckpts / "step-3.safetensors").write_bytes((tmp_path / "bad.safetensors").read_bytes())
    assert run("verify", "averaged.safetensors", "--sources", "ckpts").returncode == 0


def test_python_api_has_the_same_options(ckpts: Path, tmp_path: Path):
    save_file(with_value(NAN), ckpts / "step-3.safetensors")
    with pytest.raises(InputError, match="NaN"):
        api.run(ckpts, SWA(), output=tmp_path / "a.safetensors")
    skipped = api.run(ckpts, SWA(), output=tmp_path / "b.safetensors", skip_bad=True)
    assert [(one.path.name, one.kind) for one in skipped.left_out] == [("step-3.safetensors", "bad")]
    insisted = api.run(ckpts, SWA(), output=tmp_path / "c.safetensors", allow_nonfinite=True)
    assert len(insisted.candidates) == 5 and load_file(tmp_path / "c.safetensors")["weight"].isnan().sum() == 1


def test_damaged_copy_is_not_a_duplicate(tmp_path: Path):
    """The files agree in the bytes compared first, but only one of them is intact."""
    for step in (1, 2):
        torch.save({"w": torch.arange(9000.0)}, tmp_path / f"step-{step}.pt")
    raw = bytearray((tmp_path / "step-2.pt").read_bytes())
    raw[raw.find(torch.arange(9000.0)[:9].numpy().tobytes()) + 30_000] ^= 1
    (tmp_path / "step-2.pt").write_bytes(raw)
    with discover([tmp_path]) as found:
        assert len(found.checkpoints) == 2


def test_inspect_lists_bad_checkpoints(run: Run, ckpts: Path):
    (ckpts / "step-3.pt").write_bytes(torch_cases.state())
    raw = bytearray(torch_cases.state())
    raw[raw.find(b"\0\0\0\x3f")] ^= 1  # in the first tensor, which is compared to detect duplicates
    (ckpts / "step-6.pt").write_bytes(raw)
    _invalid_bool(ckpts)
    save_file(with_value(NAN) | {"mask": torch.ones(2, dtype=torch.bool)}, ckpts / "step-7.safetensors")
    done = run("inspect", "ckpts", "--json")
    found = json.loads(done.stdout)
    bad = {Path(one["path"]).name: one["reason"] for one in found["left_out"] if one["kind"] == "bad"}
    assert done.returncode == 3 and "error: 2 of 8 checkpoints cannot be read" in done.stderr
    assert set(bad) == {"step-6.pt", "step-3.safetensors"}
    assert "checksum of record" in bad["step-6.pt"] and "is the byte 2" in bad["step-3.safetensors"]
    assert len(found["candidates"]) == 6
    done = run("inspect", "ckpts", "--read-data")
    assert done.returncode == 3 and "error: 3 of 8 checkpoints cannot be read" in done.stderr
    assert (
        "left out ckpts/step-7.safetensors: weight: 1 value is NaN or infinite, the first at element 3" in done.stdout
    )
    for one in ("step-6.pt", "step-3.safetensors", "step-7.safetensors"):
        (ckpts / one).unlink()
    assert run("inspect", "ckpts", "--read-data").returncode == 0


@given(st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=30))
def test_exclude_option_matches_the_file_and_no_other(name: str):
    option, glob = shlex.split(excluding(name))
    assert option == "--exclude" and fnmatchcase(name, glob) and excluding(name).isprintable()
    if name.isprintable():
        assert not fnmatchcase(f"{name}x", glob) and not fnmatchcase(f"x{name}", glob)


@pytest.mark.parametrize(
    "name", ["lr[red]-3.pt", "a'b-3.pt", "a\n\x1b[1m-3.pt", "*-3.pt", "?3.pt", "--k-3.pt", "dir-3"]
)
def test_exclude_hint_works_in_a_shell(run: Run, ckpts: Path, name: str):
    if name == "dir-3":
        (ckpts / name).mkdir()
        (ckpts / name / "model.safetensors").write_bytes(b"")
    else:
        (ckpts / name).write_bytes(b"")
    done = run("swa", "ckpts")
    assert done.returncode == 3
    hint = done.stderr.splitlines()[-1].removeprefix("hint: leave it out with ").partition(", or")[0]
    assert run("swa", "ckpts", *shlex.split(hint)).returncode == 0
    save_file({"weight": torch.ones(1), "bias": torch.ones(2)}, ckpts / "other-3[x].safetensors")
    done = run("swa", "ckpts", *shlex.split(hint), "--force")
    assert done.returncode == 4
    hint = done.stderr.splitlines()[-1].removeprefix("hint: leave it out with ")
    assert shlex.split(hint)[1] == "other-3[[]x].safetensors"


# unfinished checkpoints


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("step-3.safetensors.tmp", "temporary"), ("step-3.pt.part", "temporary"), (".tmp-step-3.pt", "temporary"),
        ("step-3.safetensors.incomplete", "temporary"), ("tmp-step-3/", "temporary"), (".tmp_step-3/", "temporary"),
        ("step-3.incomplete/", "temporary"), (".step-3.safetensors.77.ckptavg-tmp", "temporary"),
        ("step-3/__0_0.distcp", "it has no .metadata"), ("checkpoint-3/optimizer.pt", "it has no trainer_state.json"),
    ],
)  # fmt: skip
def test_unfinished_checkpoint_is_left_out_with_one_line(run: Run, ckpts: Path, name: str, reason: str):
    path = ckpts / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
        path /= "model.safetensors"
    save_file(state(3), path)
    if name.startswith("checkpoint"):
        save_file(state(3), path.with_name("model.safetensors"))
    done = run("swa", "ckpts")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("left out ")]
    assert len(said) == 1 and reason in said[0] and name.split("/")[0] in said[0]


def test_error_for_a_distributed_checkpoint_without_metadata(run: Run, tmp_path: Path):
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "__0_0.distcp").write_bytes(b"PK")
    done = run("swa", "step-3")
    assert done.returncode == 3 and "step-3: has no .metadata, which is written last" in done.stderr


def test_warns_about_a_recently_changed_file(run: Run, ckpts: Path):
    for path in ckpts.iterdir():
        os.utime(path, (1, 1))
    quiet = run("swa", "ckpts")
    assert "--wait-stable" not in quiet.stderr
    (ckpts / "step-5.safetensors").touch()
    for words in (("swa", "ckpts", "--force"), ("inspect", "ckpts")):
        done = run(*words)
        said = [line for line in (done.stdout + done.stderr).splitlines() if "--wait-stable" in line]
        assert len(said) == 1 and said[0].startswith("ckpts/step-5.safetensors changed ")


def test_waits_for_a_job_that_is_still_saving(run: Run, ckpts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The job writes a piece of its checkpoint whenever ckptavg sleeps between two checks."""
    save_file(state(3), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    pieces = [content[start : start + 20] for start in range(0, len(content), 20)]
    sleep = time.sleep

    def save(seconds: float = 0.0) -> None:
        if not pieces:
            sleep(seconds)
            return
        with (ckpts / "step-3.safetensors").open("ab") as file:
            file.write(pieces.pop(0))

    save()
    assert run("swa", "ckpts", "-o", "early.safetensors").returncode == 3
    monkeypatch.setattr(stability.time, "sleep", save)
    done = run("swa", "ckpts", "--wait-stable", 0.5, "--json")
    assert done.returncode == 0 and not pieces, done.stderr
    assert done.stderr.startswith("waiting until no candidate has changed for 0.5 s\n")
    assert [one["step"] for one in json.loads(done.stdout)["candidates"]] == [1, 2, 3, 4, 5]


def test_does_not_wait_for_old_files(monkeypatch: pytest.MonkeyPatch):
    def no_sleep(_: float) -> None:
        raise AssertionError("it slept")

    monkeypatch.setattr(stability.time, "sleep", no_sleep)
    stability.wait([Path(os.__file__)], Window(), 10.0, None)  # installed longer ago


def test_waits_for_changes_of_every_kind(ckpts: Path, monkeypatch: pytest.MonkeyPatch):
    """One change per check, as if by another process; the wait ends 5 seconds after the last one."""
    clock = [0.0]
    changes: list[Callable[[], Any]] = [
        lambda: (ckpts / "step-7.safetensors").write_bytes(b"new"),
        lambda: (ckpts / "step-7.safetensors").write_bytes(b"longer"),
        lambda: (ckpts / "step-7.safetensors").write_bytes(b"other!"),
        lambda: (ckpts / "step-2.safetensors").rename(ckpts / "step-8.safetensors"),
        lambda: (ckpts / "step-1.safetensors").unlink(),
        lambda: (ckpts / "step-9.safetensors.tmp").write_bytes(b"begun"),
        lambda: (ckpts / "checkpoint-3").mkdir() or (ckpts / "checkpoint-3" / "optimizer.pt").touch(),
        lambda: Path(shutil.copy(ckpts / "step-4.safetensors", ckpts.parent)).replace(ckpts / "step-4.safetensors"),
    ]
    irrelevant: list[Callable[[], Any]] = [
        lambda: (ckpts / "events.out.tfevents").write_bytes(b"log" * 9), lambda: (ckpts / "train.log").touch(),
    ]  # fmt: skip
    count = len(changes)

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if changes:
            changes.pop(0)()
            os.utime(ckpts, (1, 1))
        elif irrelevant:
            irrelevant.pop()()

    monkeypatch.setattr(stability.time, "sleep", sleep)
    monkeypatch.setattr(stability.time, "monotonic", lambda: clock[0])
    progress: list[int] = []
    stability.wait([ckpts], Window(), 5.0, lambda _, done, __, ___: progress.append(done))
    assert not changes and not irrelevant
    assert clock[0] == pytest.approx(count + 5.0) and progress[-1] == 4


def test_signal_ends_the_wait(ckpts: Path, tmp_path: Path):
    command = [sys.executable, "-m", "ckptavg", "swa", "ckpts", "--wait-stable", "3600"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stderr.readline().startswith("waiting until")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75 and out == "" and "error: interrupted; nothing was written" in err


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_wait_must_be_finite_and_not_negative(run: Run, ckpts: Path, seconds: str):
    done = run("swa", "ckpts", "--wait-stable", seconds)
    assert done.returncode == 2 and "--wait-stable must be 0 or more seconds" in done.stderr


# checksum lists


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_checksums_detect_every_flipped_bit_of_a_safetensors_file(tmp_path: Path):
    path = tmp_path / "step-1.safetensors"
    save_file(state(1), path)
    (tmp_path / "SHA256SUMS").write_text(f"{digest(path)}  step-1.safetensors\n")
    whole = path.read_bytes()
    accepted = unseen = 0
    for bit in range(8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        for check in (None, Manifest().check):
            try:
                discover([path], check=check).__exit__()
            except InputError:
                continue
            accepted, unseen = accepted + (check is not None), unseen + (check is None)
    assert accepted == 0 and unseen > 8 * 32  # the weights alone are 256 bits


def test_checksum_lists_are_found_in_the_directory_and_its_parents(run: Run, ckpts: Path):
    for step in (6, 7):
        (ckpts / f"step-{step}").mkdir()
        save_file(state(step), ckpts / f"step-{step}" / "model.safetensors")
    names = [path.relative_to(ckpts) for path in sorted(ckpts.rglob("*.safetensors"))]
    lines = [f"{digest(ckpts / name)} *./{name}" for name in names]
    (ckpts / "SHA256SUMS").write_text("# made by sha256sum\n\n" + "\r\n".join(lines) + "\n")
    assert "SHA256SUMS" not in run("swa", "ckpts").stderr
    save_file(state(9), ckpts / "step-7" / "model.safetensors")
    done = run("swa", "ckpts", "-o", "more.safetensors")
    assert done.returncode == 3
    assert "error: ckpts/step-7/model.safetensors: its SHA-256 is" in done.stderr
    (ckpts / "step-7" / "SHA256SUMS").write_text(f"SHA256 (model.safetensors) = {digest(ckpts / names[-1]).upper()}\n")
    assert (
        run("swa", "ckpts", "-o", "more.safetensors").returncode == 0
    )  # the list closest to the file takes precedence
    save_file(state(8), ckpts / "step-8.safetensors")
    done = run("swa", "ckpts", "-o", "most.safetensors")
    assert done.returncode == 0 and "ckpts/step-8.safetensors: not in SHA256SUMS" in done.stderr


def test_names_are_unescaped_like_those_of_sha256sum(run: Run, tmp_path: Path):
    name = "a\\b\nstep-1.safetensors"
    save_file(state(1), tmp_path / name)
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    written = subprocess.run(["sha256sum", name], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "SHA256SUMS").write_bytes(written)
    assert b"\\n" in written and run("swa", ".").returncode == 0
    save_file(state(2), tmp_path / name)
    assert run("swa", ".", "-o", "b.safetensors", "--exclude", "averaged*").returncode == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"no sum at all\n", "line 1 is not as sha256sum writes it"),
        (b"\xff\xfe\0", "line 1 is not as sha256sum writes it"),
        (b"0" * 63 + b"  step-1.safetensors\n", "line 1 is not"),
        (b"0" * 64 + b"  a\n" + b"1" * 64 + b"  ./a\n", "line 2 gives ./a another sum"),
    ],
)
def test_refuses_a_malformed_checksum_list(run: Run, ckpts: Path, text: bytes, message: str):
    (ckpts / "SHA256SUMS").write_bytes(text)
    done = run("swa", "ckpts")
    assert done.returncode == 3 and f"ckpts/SHA256SUMS: {message}" in done.stderr


def test_refuses_a_checksum_list_that_is_not_a_file(run: Run, ckpts: Path):
    os.mkfifo(ckpts / "SHA256SUMS")
    done = run("swa", "ckpts")
    assert done.returncode == 3 and "ckpts/SHA256SUMS: is a FIFO" in done.stderr


def test_hugging_face_cache_blob_must_match_its_name(run: Run, tmp_path: Path):
    """``models--x/snapshots/REVISION/model.safetensors`` is a link to ``../../blobs/SHA256``."""
    for step in (1, 2):
        blobs, snapshot = (tmp_path / f"models--x-{step}" / name for name in ("blobs", "snapshots/0123"))
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        save_file(state(step), blobs / "new")
        (blobs / "new").rename(blob := blobs / digest(blobs / "new"))
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    folders = sorted(tmp_path.glob("models--*/snapshots/0123"))
    assert run("swa", *folders, "-o", "a.safetensors").returncode == 0
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    done = run("swa", *folders, "-o", "b.safetensors")
    assert done.returncode == 3 and "but in the cache it is called" in done.stderr
    assert not (tmp_path / "b.safetensors").exists()

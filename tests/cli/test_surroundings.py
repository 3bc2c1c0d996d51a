"""Odd shells, permissions and file systems: a command reports one error line or works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Run
from forked import NOBODY, forked
from safetensors.torch import load_file, save_file

TASK = """
import torch
from torch import nn
def model(): return nn.Linear(3, 2)
def loss(model, batch): return model(batch).square().mean(dim=1)
def val_dataloader(): return [torch.ones(8, 3)]
"""
SWA = ("swa", "ckpts")
SEWA = ("sewa", "ckpts", "--k", "2", "--steps", "2", "--task", "mine.py")
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run as nobody")


@pytest.fixture
def work(run: Run) -> Iterator[Path]:
    """Create a world-writable directory with three checkpoints and a task, and load all modules."""
    folder = Path(tempfile.mkdtemp(prefix="ckptavg-surroundings-"))
    (folder / "ckpts").mkdir()
    for step in (1, 2, 3):
        save_file({"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(2)},
                  folder / "ckpts" / f"step-{step}.safetensors")  # fmt: skip
    (folder / "mine.py").write_text(TASK)
    for words in (SWA, SEWA, ("inspect", "ckpts"), ("init",), ("verify", "averaged.safetensors", "--sources", "ckpts")):
        run(*words, cwd=folder)  # user nobody may lack permission to read the interpreter's files
    (folder / "averaged.safetensors").unlink()
    (folder / "task.py").unlink()
    for at, _, names in os.walk(folder):
        Path(at).chmod(0o777)
        for name in names:
            (Path(at) / name).chmod(0o666)
    yield folder
    shutil.rmtree(folder)


def check(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (code, int(code != 0)), done.stderr
    assert "Traceback" not in done.stderr and "bug in ckptavg" not in done.stderr
    for part in parts if code else ():
        assert part in errors[0], done.stderr


# permissions


@root
@pytest.mark.parametrize(
    ("path", "mode", "words", "code", "message"),
    [
        ("ckpts", 0o000, SWA, 3, "ckpts: permission denied"),
        ("ckpts", 0o000, ("inspect", "ckpts"), 3, "ckpts: permission denied"),
        ("ckpts", 0o444, SWA, 3, "ckpts/step-1.safetensors: permission denied"),
        ("ckpts", 0o111, SWA, 3, "ckpts: permission denied"),
        ("ckpts", 0o111, ("swa", "ckpts/step-1.safetensors", "ckpts/step-2.safetensors"), 0, ""),
        ("ckpts/step-2.safetensors", 0o000, SWA, 3, "ckpts/step-2.safetensors: permission denied"),
        ("ckpts/step-2.safetensors", 0o000, (*SWA, "--skip-bad"), 0, ""),
        ("ckpts/step-2.safetensors", 0o000, ("verify", "ckpts/step-2.safetensors"), 3, "step-2.safetensors: perm"),
        (".", 0o555, SWA, 5, ".: permission denied"),
        (".", 0o555, SEWA, 5, ".: permission denied"),
        (".", 0o555, ("init",), 5, "task.py: cannot be written: "),
        (".", 0o555, ("demo",), 5, "ckptavg-demo: cannot be made: "),
        (".", 0o555, ("inspect", "ckpts"), 0, ""),
        (".", 0o111, ("inspect", "ckpts"), 0, ""),
        (".", 0o111, ("inspect", "."), 3, ".: permission denied"),
        (".", 0o000, SWA, 5, "permission denied"),
        ("ckpts", 0o555, ("swa", "ckpts", "-o", "ckpts/a.safetensors"), 5, "ckpts: permission denied"),
        ("ckpts", 0o000, ("swa", "mine.py", "-o", "ckpts/in/a.safetensors"), 5, "ckpts/in: permission denied"),
        ("mine.py", 0o000, SEWA, 7, "mine.py: on import: PermissionError"),
    ],
)  # fmt: skip
def test_missing_permissions(work: Path, path: str, mode: int, words: tuple[str, ...], code: int, message: str):
    (work / path).chmod(mode)
    check(forked(*words, cwd=work, user=NOBODY), code, message)


@root
def test_an_unreadable_directory_can_be_left_out(work: Path):
    (work / "ckpts" / "lost+found").mkdir(mode=0o000)  # as at the root of a file system
    check(forked(*SWA, "-o", "a.safetensors", cwd=work, user=NOBODY), 0)
    (work / "ckpts" / "step-4").mkdir(mode=0o000)
    check(forked(*SWA, "-o", "b.safetensors", cwd=work, user=NOBODY), 3, "ckpts/step-4: permission denied")
    check(forked(*SWA, "-o", "b.safetensors", "--exclude", "step-4", cwd=work, user=NOBODY), 0)
    check(forked(*SWA, "-o", "c.safetensors", "--skip-bad", cwd=work, user=NOBODY), 0)


@root
@pytest.mark.parametrize("name", ["ckptavg.toml", "pyproject.toml"])
def test_a_configuration_that_cannot_be_read(work: Path, name: str):
    (work / name).write_text("")
    (work / name).chmod(0)
    check(forked(*SWA, cwd=work, user=NOBODY), 2, f"{name}: permission denied")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tool = 1", ""), ("[tool]\nckptavg = 3", ""), ("[[tool]]\nx = 1", ""), ("[tool.ckptavg]\nseed = 4", ""),
        ("[tool.ckptavg]\nseed = 1979-05-27", "pyproject.toml: seed must be a number, a text"),
        ("[tool.ckptavg.seed]\nx = 1", "pyproject.toml: seed must be a number, a text"),
        ("[tool.ckptavg]\ntask = 3", "no task file or module is called 3"),
        ("[tool.ckptavg]\nseed = 99999999999999999999999999", "--seed must be between"),
        ("[tool.ckptavg]\noutput = '\0'", "pyproject.toml: is not valid TOML"),
        ('[tool.ckptavg]\noutput = "\\u0000"', "--output has a NUL character in it"),
        ("x = [" * 5000, "pyproject.toml: is not valid TOML"),
    ],
)  # fmt: skip
def test_a_configuration_of_the_wrong_kind(run: Run, work: Path, text: str, message: str):
    (work / "pyproject.toml").write_text(text)
    check(run(*SWA, cwd=work), 2 if message else 0, message)


# the directory and the output


@pytest.mark.parametrize(
    "words", [SWA, ("inspect", "."), ("sewa", "ckpts"), ("init",), ("demo",), ("swa", ".", "-o", ".")]
)
def test_a_working_directory_that_was_removed(work: Path, words: tuple[str, ...]):  # fmt: skip
    (work / "gone").mkdir()
    done = forked(*words, cwd=work / "gone", prepare=(work / "gone").rmdir)
    assert done.returncode in (2, 3, 5), done.stderr
    check(done, done.returncode)


def test_absolute_paths_need_no_working_directory(work: Path):
    for number, words in enumerate(((), ("--task", work / "mine.py"))):
        (work / "gone").mkdir()
        words = ("swa", work / "ckpts", "-o", work / f"{number}.safetensors", *words)
        check(forked(*words, cwd=work / "gone", prepare=(work / "gone").rmdir), 0)


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        (".", 0, ""), ("./", 0, ""), ("ckpts/..", 0, ""), (" ", 0, ""), ("-", 0, ""), ("[red]", 0, ""),
        ("/", 2, "--output / has no name"), ("//", 2, "has no name"), ("", 2, "--output is empty"),
        ("mine.py/x", 5, "mine.py: is not a directory"), ("mine.py/x/y", 5, "mine.py/x: not a directory"),
        ("x" * 300, 5, "file name too long"), ("a/" * 3000, 5, "file name too long"),
        ("x" * 234, 0, ""), ("x" * 235, 5, "file name too long: 235 bytes, but at most 234 are possible here"),
        ("/dev/null", 6, "exists already"),
        ("no/such/", 5, "no: no such directory"), ("loop/x", 5, "loop"), ("/proc/x", 5, "/proc"),
    ],
)  # fmt: skip
def test_outputs_of_every_kind(run: Run, work: Path, output: str, code: int, message: str):
    (work / "loop").symlink_to("loop")
    check(run(*SWA, "-o", output, cwd=work), code, message)
    if code == 0:
        check(run(*SEWA, "-o", output, "--force", cwd=work), 0)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 235, "a/" * 3000, "9" * 5000])
def test_an_invalid_report_path_is_refused_at_the_start(run: Run, work: Path, name: str):
    check(run(*SWA, "--report", name, cwd=work), 5, "file name too long")
    assert not (work / "averaged.safetensors").exists()


@pytest.mark.parametrize(
    "task", ["./ckpts", "ckpts", ".", "..x", "a b", "./" + "x" * 300 + ".py", "os.path", "/dev/null"]
)
def test_invalid_tasks(run: Run, work: Path, task: str):
    done = run("sewa", "ckpts", "--k", 2, "--task", task, cwd=work)
    assert done.returncode in (2, 7), done.stderr
    check(done, done.returncode)


# streams


@pytest.mark.thorough
@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("words", [SWA, SEWA, ("best", "ckpts", "--score-cmd", "echo 1; cat; true")])
def test_closed_streams_do_not_corrupt_the_output(work: Path, closed: tuple[int, ...], words: tuple[str, ...]):
    """The next opened file would get the descriptor of a closed stream, and prints would land in it."""
    done = forked(*words, cwd=work, closed=closed)
    assert done.returncode == 0, done.stderr
    assert set(load_file(work / "averaged.safetensors")) == {"weight", "bias"}
    assert (done.stdout == "") == (1 in closed)
    assert forked("swa", "gone", "-o", "x", cwd=work, closed=closed).returncode == 3


@pytest.mark.parametrize("words", [("inspect", "ckpts"), ("inspect", "ckpts", "--json"), ("--help",), ("--version",),
                                   (*SWA, "--json"), SWA, ("init", "new.py")])  # fmt: skip
def test_a_closed_pipe_is_no_error(work: Path, words: tuple[str, ...]):
    reader, writer = os.pipe()
    os.close(reader)
    done = forked(*words, cwd=work, stdout=writer)
    os.close(writer)
    assert done.returncode == 141 and "error" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("inspect", "ckpts"), ("--help",), (*SWA, "--json"), SWA, ("init", "new.py")])
def test_a_full_stdout_is_reported(work: Path, words: tuple[str, ...]):
    full = os.open("/dev/full", os.O_WRONLY)
    done = forked(*words, cwd=work, stdout=full)
    os.close(full)
    check(done, 5, "stdout: cannot be written: no space left on device")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "20"}, {"COLUMNS": "1"}, {"COLUMNS": "0"}, {"COLUMNS": "-5"}, {"COLUMNS": "x"}, {"TERM": "dumb"},
        {"TERM": None}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}, {"HOME": None}, {"HOME": "/nowhere"}, {"PATH": None},
        {"TMPDIR": "/nowhere"}, {"LC_ALL": "xx_YY"}, {"OMP_NUM_THREADS": "0"}, {"USER": None, "LOGNAME": None},
        {"TYPER_USE_RICH": "0"}, {"SOURCE_DATE_EPOCH": "x"}, {"CKPTAVG_TASK": ""}, {"CKPTAVG_JSON": ""},
    ],
    ids=str,
)  # fmt: skip
def test_an_environment_of_any_kind(work: Path, environment: dict[str, str | None]):
    assert forked(*SEWA, cwd=work, environment=environment).returncode == 0
    shown = forked("inspect", "ckpts", "--json", cwd=work, environment=environment)
    assert [one["step"] for one in json.loads(shown.stdout)["candidates"]] == [1, 2, 3]
    done = forked("swa", "gone", "-o", "x", cwd=work, environment=environment)
    check(done, 3, "gone: no such file")
    assert "\x1b" not in shown.stdout + shown.stderr + done.stderr


def test_a_locale_without_utf_8(work: Path):
    """Run in a new process: the file system encoding is chosen when the interpreter starts."""
    name = os.fsdecode("é-权重-9.safetensors".encode())
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, work / "ckpts" / "x")
    (work / "ckpts" / "x").rename(work / "ckpts" / name)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", "ckptavg", *SWA], cwd=work, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"averaged.safetensors\n" and b"Error" not in done.stderr


# names

NAMES = [
    os.fsdecode(b"\xff\xfe-4.safetensors"), "a\nb-4.safetensors", "\x1b[31mred.safetensors", "[red]-4.safetensors",
    "[[bold]-4.safetensors", "-4.safetensors", "--help-4.safetensors", " -4.safetensors",
    "²-4.safetensors", "step-4²1.safetensors", "\u202e4.safetensors", "e\u0301-4.safetensors",
    "x" * 200 + "-4.safetensors",
    "step-" + "9" * 200 + ".safetensors", "a:b\\c-4.safetensors", "{0}%s.safetensors", "$(touch ran)-4.safetensors",
    "'\"-4.safetensors", "4.safetensors.", "nul\x7f-4.safetensors", "😀-4.safetensors", "4²",
]  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_of_any_kind(work: Path, name: str, encoding: str):
    """Read, average, report, verify and write under the name; print it without control characters."""
    save_file({"weight": torch.full((2, 3), 9.0), "bias": torch.zeros(2)}, work / "x")
    (work / "x").rename(work / "ckpts" / name)
    for words in (
        (*SEWA, "--json"), ("inspect", "ckpts"), ("verify", "averaged.safetensors", "--sources", "ckpts"),
        ("inspect", f"ckpts/{name}"), ("swa", "ckpts", "-o", f"./{name}"), ("swa", "ckpts", "-o", f"./{name}"),
    ):  # fmt: skip
        done = forked(*words, cwd=work, encoding=encoding)
        again = words[-1] == f"./{name}" and (work / name).exists() and done.returncode == 6
        assert done.returncode == 0 or again, done.stderr
        for text in (
            done.stdout if words[-2] != "-o" else "",
            done.stderr,
        ):  # a path on stdout is unescaped, for a shell
            assert "\x1b" not in text and "\x7f" not in text and "\u202e" not in text
    assert not (work / "ran").exists()


def test_a_tensor_of_any_name(run: Run, work: Path):
    """Rich markup in a tensor name does not break the error message."""
    for name in ("[/foo]", "[bold]x", "權重", "a b", "%s{}", "\\"):
        state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2), name: torch.full((2,), float("nan"))}
        for step in (1, 2, 3):
            save_file(state, work / "ckpts" / f"step-{step}.safetensors")
        check(run(*SWA, cwd=work), 3, f"{name}: 2 values are NaN or infinite")


def test_inspect_lists_a_checkpoint_without_a_step(run: Run, work: Path):
    save_file({"weight": torch.full((2, 3), 9.0), "bias": torch.zeros(2)}, work / "ckpts" / "odd.safetensors")
    done = run("inspect", "ckpts", "--json", cwd=work)
    found = json.loads(done.stdout)
    assert done.returncode == 3 and len(found["candidates"]) == 3
    assert [one["reason"][:43] for one in found["left_out"]] == ["ckpts/odd.safetensors: has no training step"]
    assert run(*SWA, cwd=work).returncode == 3

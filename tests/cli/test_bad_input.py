"""Bad input gives one error line with file, tensor and hint, an exit code, and leaves no files."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TASK, Run
from safetensors.torch import save_file

SWA = ("swa", "ckpts", "-o", "out.safetensors")
SEWA = ("sewa", "ckpts", "-o", "out.safetensors", "--steps", "2", "--task", "mine.py")
TINY = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
def model(): return nn.Linear(3, 2)
def loss(model, batch): return model(batch[0]).square().mean(dim=1)
def val_dataloader(): return DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=4)
"""


class Payload:
    """An object whose unpickling runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for step in range(1, 5):
        torch.manual_seed(step)
        save_file(torch.nn.Linear(3, 2).state_dict(), folder / f"step-{step}.safetensors")
    (tmp_path / "mine.py").write_text(TINY)
    return folder


def check(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """Check for one error line with all `parts`, an optional hint, no traceback and an empty stdout."""
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (code, "", 1), done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in "\n".join(lines[lines.index(errors[0]) :]), done.stderr


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def test_an_empty_directory(run: Run, tmp_path: Path):
    (tmp_path / "ckpts").mkdir()
    check(run(*SWA), 3, "ckpts: no checkpoints found: the directory is empty", "hint: `ckptavg inspect ckpts`")
    assert left(tmp_path) == {"ckpts"}


def test_fewer_candidates_than_k(run: Run, ckpts: Path, tmp_path: Path):
    check(
        run(*SEWA, "--k", 5), 2, "--k 5 asks for more checkpoints than the 4 candidates", "hint: choose --k 4 or less"
    )
    assert left(tmp_path) == {"ckpts", "mine.py"}


def test_k_below_one(run: Run, ckpts: Path):
    check(run(*SEWA, "--k", 0), 2, "--k must be at least 1, not 0")


def test_a_truncated_file(run: Run, ckpts: Path, tmp_path: Path):
    whole = (ckpts / "step-3.safetensors").read_bytes()
    for length in (4, 20, len(whole) - 1):
        (ckpts / "step-3.safetensors").write_bytes(whole[:length])
        check(run(*SWA), 3, "ckpts/step-3.safetensors: file is truncated", "hint: leave it out with --exclude 'step-3")
    assert left(tmp_path) == {"ckpts", "mine.py"}
    assert run(*SWA, "--exclude", "step-3*").returncode == 0


def test_a_pickle_that_holds_code_is_read_without_running_it(run: Run, ckpts: Path, tmp_path: Path):
    marker = tmp_path / "ran"
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save({"state_dict": state, "callback": Payload(marker), "epoch": 5}, ckpts / "step-5.pt")
    done = run(*SWA)
    assert done.returncode == 0 and not marker.exists()
    torch.save(Payload(marker), ckpts / "step-6.pt")
    (tmp_path / "out.safetensors").unlink()
    check(run(*SWA), 3, "ckpts/step-6.pt", "hint: leave it out")
    torch.save(Payload(marker), ckpts / "step-6.pt", _use_new_zipfile_serialization=False)
    check(run(*SWA), 3, "ckpts/step-6.pt")
    assert not marker.exists() and left(tmp_path) == {"ckpts", "mine.py"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"weight": torch.ones(2, 4), "bias": torch.ones(2)},
            "weight: shape [2, 4], but 4 other candidates have [2, 3]",
        ),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2).half()},
            "bias: dtype F16, but 4 other candidates have F32",
        ),
        ({"weight": torch.ones(2, 3)}, "bias: missing, but 4 other candidates have it"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)},
            "more: 4 other candidates have no",
        ),
    ],
)
def test_checkpoints_that_disagree(run: Run, ckpts: Path, tmp_path: Path, state: dict[str, torch.Tensor], message: str):
    save_file(state, ckpts / "step-5.safetensors")
    check(run(*SWA), 4, f"ckpts/step-5.safetensors: {message}", "leave it out with --exclude 'step-5.safetensors'")
    assert left(tmp_path) == {"ckpts", "mine.py"}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite(run: Run, ckpts: Path, tmp_path: Path, value: str):
    save_file({"weight": torch.full((2, 3), float(value)), "bias": torch.ones(2)}, ckpts / "step-5.safetensors")
    for command in (SWA, SEWA):
        check(run(*command), 3, "ckpts/step-5.safetensors: weight: 6 values are NaN or infinite", "--exclude")
    assert left(tmp_path) == {"ckpts", "mine.py"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def loss", "def lost"), "mine.py: has no function `loss`"),
        (("def model", "def models"), "mine.py: has no function `model`"),
        (("def val_dataloader", "def data"), "mine.py: has no function `val_dataloader`"),
        (
            ("return model(batch[0])", "raise KeyError('oops') or model(batch[0])"),
            "mine.py:6: in loss, batch 1 of val_dataloader: KeyError: 'oops'",
        ),
        (("return nn.Linear(3, 2)", "return 3"), "model() must return a torch.nn.Module, not int"),
        (("return nn.Linear(3, 2)", "return nn.Linear(4, 2)"), "weight of shape [2, 4], the checkpoints [2, 3]"),
        (("return nn.Linear(3, 2)", "return nn.Linear(3, 2, bias=False)"), "it lacks bias"),
        (("import torch\n", "import torch, nonsense\n"), "mine.py:2: on import: ModuleNotFoundError"),
        (("import torch\n", "import torch; raise SystemExit('no')\n"), "mine.py:2: on import: SystemExit: no"),
        (("def model()", "def model("), "mine.py:5: on import: SyntaxError"),
        (
            (".mean(dim=1)", ".mean() * float('nan')"),
            "the loss is nan at step 1 of the search, on batches 1, 2 of the val data",
        ),
        ((".mean(dim=1)", ".sum() / 0"), "the loss is inf at step 1 of the search"),
        ((".mean(dim=1)", ".mean(dim=0)"), "loss() must return a scalar or one real number per example [4]"),
        ((".square().mean(dim=1)", ".argmax(dim=1)"), "loss() must return a floating-point tensor, not a torch.int64"),
        (("torch.ones(8, 3)), batch_size=4", "torch.ones(0, 3)), batch_size=4"), "val_dataloader() gave no batches"),
        (("torch.ones(8, 3)", "torch.ones(8, 3), 1"), "in val_dataloader:"),
        (("def model", "metric_goal = 'up'\ndef model"), "metric_goal must be 'max' or 'min', not 'up'"),
    ],
)
def test_a_task_that_fails(run: Run, ckpts: Path, tmp_path: Path, change: tuple[str, str], message: str):
    assert change[0] in TINY
    (tmp_path / "mine.py").write_text(TINY.replace(*change))
    check(run(*SEWA, "--k", 2), 7, message)
    assert left(tmp_path) == {"ckpts", "mine.py"}


def test_the_tasks_own_traceback_is_shown_with_v(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        TINY.replace("return model(batch[0])", "raise KeyError('oops') or model(batch[0])")
    )
    done = run(*SEWA, "--k", 2, "-v")
    assert done.returncode == 7 and "Traceback" in done.stderr and "raise KeyError('oops')" in done.stderr


def test_a_batch_of_one_under_batchnorm(run: Run, ckpts: Path, tmp_path: Path):
    for step in range(1, 5):
        save_file(
            torch.nn.BatchNorm1d(3).state_dict() | {"weight": torch.ones(3) * step}, ckpts / f"step-{step}.safetensors"
        )
    (tmp_path / "mine.py").write_text(TINY.replace("nn.Linear(3, 2)", "nn.BatchNorm1d(3)").replace("size=4", "size=7"))
    check(
        run(*SEWA, "--k", 2),
        7,
        "mine.py:6: in loss, batch 2 of val_dataloader: ValueError: Expected more than 1 value",
        "hint: BatchNorm needs two",
    )


def test_no_task(run: Run, ckpts: Path):
    check(run("sewa", "ckpts"), 2, "sewa learns from data, so it needs a task file", "hint: `ckptavg init`")
    check(run("sewa", "ckpts", "--task", "gone.py"), 2, "no such task file: gone.py")
    check(run("sewa", "ckpts", "--task", "gone_module"), 2, "no task file or module is called gone_module")


def test_a_task_that_lies_among_the_checkpoints_is_not_run(run: Run, ckpts: Path, tmp_path: Path):
    (ckpts / "task.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + TINY)
    check(run("sewa", ".", cwd=ckpts), 2, "./task.py lies among the checkpoints", "hint: if you trust it, name it")
    check(run("sewa", "step-1.safetensors", "step-2.safetensors", cwd=ckpts), 2, "./task.py lies among")
    check(run("sewa", "ckpts"), 2, "needs a task file")
    done = run("swa", ".", "-o", tmp_path / "out.safetensors", cwd=ckpts)  # needs no task
    assert done.returncode == 0 and "Nothing was scored" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_an_output_that_exists(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    check(run(*SWA), 6, "out.safetensors: exists already", "hint: replace it with --force")
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"
    assert run(*SWA, "--force").returncode == 0


def test_an_output_that_cannot_be_written(run: Run, ckpts: Path):
    check(run("swa", "ckpts", "-o", "gone/out.safetensors"), 5, "gone: no such directory", "hint: mkdir -p 'gone'")


def test_a_missing_device(run: Run, ckpts: Path):
    check(
        run(*SEWA, "--k", 2, "--device", "cuda:7" if not torch.cuda.is_available() else "cuda:99"), 2, "--device cuda"
    )
    check(run(*SEWA, "--k", 2, "--device", "abacus"), 2, "--device abacus")


def test_wrong_usage_is_exit_code_two(run: Run, ckpts: Path):
    for arguments in (("swa",), ("swa", "ckpts", "--nonsense"), ("nonsense",), ("swa", "ckpts", "--dtype", "int8")):
        assert run(*arguments).returncode == 2


def test_a_configuration_file_that_is_wrong(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "ckptavg.toml").write_text("k = [")
    check(run(*SEWA), 2, "ckptavg.toml: is not valid TOML")
    (tmp_path / "ckptavg.toml").write_text("kk = 3")
    check(run(*SEWA), 2, "unknown options: kk")


def test_names_with_markup_and_control_characters_are_printed_as_they_are(run: Run, ckpts: Path):
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, ckpts / "lr[red]\n\x1b[9m.safetensors")
    done = run("inspect", "ckpts")
    assert done.returncode == 0 and "lr[red]\\n\\x1b[9m.safetensors" in done.stdout and "\x1b" not in done.stdout
    assert "lr[red]\\n\\x1b[9m" in run(*SWA).stderr


@pytest.mark.thorough
def test_an_interrupted_run_reports_it_and_leaves_only_the_journal(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        TINY.replace("def loss(model, batch):", "def loss(model, batch):\n    print('in loss', flush=True)\n   ")
    )
    command = [sys.executable, "-m", "ckptavg", *SEWA, "--k", "2", "--steps", "1000000"]
    for which in (signal.SIGINT, signal.SIGTERM):
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit an ignored SIGINT
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, ours)
        assert process.stderr is not None and any("in loss" in line for line in process.stderr)
        time.sleep(0.2)
        process.send_signal(which)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 75 and out == ""
        assert "error: interrupted; nothing was written" in err and "Traceback" not in err
    assert left(tmp_path) == {"ckpts", "mine.py", "out.safetensors.ckptavg"}  # the journal for the next run


def test_memory_that_runs_out_is_its_own_exit_code(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        TINY.replace("return model(batch[0])", "return torch.empty(2**45); model(batch[0])")
    )
    check(run(*SEWA, "--k", 2), 8, "out of memory", "hint: use --bits 4")


def test_a_closed_stdout_is_no_error(ckpts: Path):
    command = f"{sys.executable} -m ckptavg inspect {ckpts} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{", "")


def test_the_order_of_task_files(run: Run, ckpts: Path, tmp_path: Path):
    """--task, then CKPTAVG_TASK, then the configuration, then ./task.py; a module by its dotted name."""
    words = {"option": "first", "environment": "second", "configured": "third", "task": "fourth"}
    for name, word in words.items():
        (tmp_path / f"{name}.py").write_text(
            TINY.replace("return model(batch[0])", f"raise ValueError('{word}') or model(batch[0])")
        )
    (tmp_path / "ckptavg.toml").write_text('task = "configured.py"\nk = 2\n')
    base = ("sewa", "ckpts")
    check(run(*base, "--task", "option.py", CKPTAVG_TASK="environment.py"), 7, "first")
    check(run(*base, "--task", "option", CKPTAVG_TASK="environment.py"), 7, "first")
    check(run(*base, CKPTAVG_TASK="environment.py"), 7, "second")
    check(run(*base), 7, "third")
    (tmp_path / "ckptavg.toml").unlink()
    (tmp_path / "pyproject.toml").write_text('[tool.ckptavg]\ntask = "configured.py"\nk = 2\n')
    check(run(*base), 7, "third")
    (tmp_path / "pyproject.toml").unlink()
    check(run(*base, "--k", 2), 7, "fourth")


def test_options_come_from_the_configuration_and_the_environment(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "ckptavg.toml").write_text('task = "mine.py"\nk = 9\nnever-worse = true\n')
    check(run("sewa", "ckpts"), 2, "--k 9 asks")
    check(run("sewa", "ckpts", CKPTAVG_K="8"), 2, "--k 8 asks")
    check(run("sewa", "ckpts", "--k", 7, CKPTAVG_K="8"), 2, "--k 7 asks")
    assert TASK.exists()


@pytest.mark.parametrize(
    ("old", "new", "command", "code", "message"),
    [
        ("return model", "return float('nan') * model", "sewa --k 2", 7, "the loss is nan at step 1 of the search"),
        ("return model", "return float('nan') * model", "twa", 7, "the loss is nan at step 1 of the search"),
        ("return model", "return model(batch[0]).detach().sum(1) if 1 else model", "twa", 7, "loss() has no gradient"),
        ("return model", "return model", "twa --lr 1e300", 7, "smaller --lr"),
        ("return model", "return model", "twa --on train", 2, "--on train needs train data"),
        ("return model", "return model", "aswa --early-reject", 2, "metric_bounds"),
        ("return model", "return model", "sewa --k 99 --dry-run", 2, "--k 99 asks"),
    ],
)
def test_an_unsuitable_task_or_setting_is_reported(
    run: Run, ckpts: Path, tmp_path: Path, old: str, new: str, command: str, code: int, message: str
):
    assert old in TINY
    (tmp_path / "mine.py").write_text(TINY.replace(old, new))
    name, *options = command.split()
    done = run(name, "ckpts", "--task", "mine.py", *options)
    assert done.returncode == code and message in done.stderr and "bug" not in done.stderr, done.stderr
    assert left(tmp_path) == {"ckpts", "mine.py"}


def test_the_shared_options_come_from_the_environment_too(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(TINY)
    done = run("swa", "ckpts", CKPTAVG_TASK="mine.py", CKPTAVG_BITS="4", CKPTAVG_SEED="3", CKPTAVG_JSON="1")
    report = json.loads(done.stdout)
    assert (report["matrix"]["bits"], report["seed"]) == (4, 3)


def test_a_list_in_the_configuration_is_a_list_of_strategies(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(TINY)
    (tmp_path / "ckptavg.toml").write_text('task = "mine.py"\nstrategies = ["swa", "soup"]\n')
    done = run("compare", "ckpts", "--json")
    assert [one["name"] for one in json.loads(done.stdout)["strategies"]] == ["last", "swa", "soup"]


def test_an_output_does_not_replace_a_candidate(run: Run, ckpts: Path, tmp_path: Path):
    before = (ckpts / "step-4.safetensors").read_bytes()
    check(run("swa", "ckpts", "-o", "ckpts/step-4.safetensors", "--force"), 6, "step-4.safetensors: is one of the cand")
    assert (ckpts / "step-4.safetensors").read_bytes() == before
    (tmp_path / "step-4").mkdir()
    (ckpts / "step-4.safetensors").rename(tmp_path / "step-4" / "model.safetensors")
    check(run("swa", "ckpts", "step-4", "-o", "step-4/", "--force"), 6, "model.safetensors: is one of the candidates")
    assert (tmp_path / "step-4" / "model.safetensors").read_bytes() == before


def test_an_unwritable_report_is_refused_before_the_work(run: Run, ckpts: Path, tmp_path: Path):
    check(run(*SEWA, "--report", "gone/r.json"), 5, "gone: no such directory")
    (tmp_path / "folder").mkdir()
    assert left(tmp_path) == {"ckpts", "mine.py", "folder"}


def test_a_report_replaces_no_file_unasked(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "r.json").write_text("precious")
    check(run(*SEWA, "--report", "r.json"), 6, "r.json: exists already", "--force, or choose another --report")
    assert left(tmp_path) == {"ckpts", "mine.py", "r.json"} and (tmp_path / "r.json").read_text() == "precious"
    check(run(*SEWA, "--report", "./out.safetensors", "--force"), 2, "--report and --output both name out.safetensors")
    done = run(*SEWA, "--k", 2, "--report", "r.json", "--force")
    assert done.returncode == 0 and json.loads((tmp_path / "r.json").read_text())["strategy"] == "sewa", done.stderr
    assert run(*SEWA, "--k", 2, "--report", "/dev/null", "--force").returncode == 0


def test_a_file_that_is_not_finite_is_named_by_eval_and_where_it_is_allowed(run: Run, ckpts: Path, tmp_path: Path):
    save_file({"weight": torch.full((2, 3), math.nan), "bias": torch.ones(2)}, ckpts / "step-2.safetensors")
    good, bad = ckpts / "step-1.safetensors", ckpts / "step-2.safetensors"
    check(run("eval", good, bad, "--task", "mine.py"), 3, "step-2.safetensors: weight: 6 values are NaN")
    done = run("best", "ckpts", "--task", "mine.py", "--allow-nonfinite")
    assert done.returncode == 0, done.stderr
    assert "candidate ckpts/step-2.safetensors: loss() gave nan" in done.stderr
    assert not any(f"step-{i}.safetensors: loss" in done.stderr for i in (1, 3, 4))

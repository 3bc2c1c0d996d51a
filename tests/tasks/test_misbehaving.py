"""Faulty tasks: exit code 7, a one-line error naming the function and the batch, and restored process settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import save_file

from ckptavg.tasks.python_file import PythonTask

N = 4
TASK = """
import os, signal, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __init__(self, broken=None): self.broken = broken
    def __len__(self): return 12
    def __getitem__(self, i):
        if i == 5 and self.broken: self.broken()
        return torch.full((3,), float(i))

def model():
    return nn.Linear(3, 2)

def metric(model, batch):
    return -model(batch).square().mean(dim=1)

def loss(model, batch):
    return model(batch).square().mean(dim=1)

def val_dataloader():
    return DataLoader(Data(), batch_size=4)
"""
METRIC, LOSS = "    return -model(batch).square().mean(dim=1)", "    return model(batch).square().mean(dim=1)"
LOADER, MODEL = "    return DataLoader(Data(), batch_size=4)", "    return nn.Linear(3, 2)"
SEARCH = ("sewa", "ckpts", "--k", "2", "--steps", "3", "--task", "bad_task.py")
SCORE = ("best", "ckpts", "--task", "bad_task.py")


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for step in range(1, N + 1):
        save_file({"weight": torch.full((2, 3), step / 10), "bias": torch.full((2,), float(step))},
                  folder / f"step-{step}.safetensors")  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def check_process_settings() -> Iterator[None]:
    """Check that each test restores the working directory, the default dtype and the signal handlers."""
    before = Path.cwd(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), sys.argv
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)]
    yield
    assert (Path.cwd(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before[:4]
    assert sys.argv is before[4]
    found = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)]
    signal.signal(signal.SIGUSR1, handlers[1])  # the command line's own, which it keeps
    assert (found[0], found[2]) == (handlers[0], handlers[2])
    for name in [name for name in sys.modules if "bad_task" in name]:
        del sys.modules[name]


def write(folder: Path, *changes: tuple[str, str]) -> None:
    text = TASK
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "bad_task.py").write_text(text)


def refused(done: subprocess.CompletedProcess[str], message: str, code: int = 7) -> None:
    errors = [line for line in done.stderr.replace("\0", "").splitlines() if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (code, "", 1), done.stderr
    assert message in errors[0], errors[0]
    assert "Traceback" not in done.stderr and "bug in ckptavg" not in done.stderr and len(errors[0]) < 1000


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


# exceptions raised in each task function

RAISED = {
    "ValueError('oops')": "ValueError: oops",
    "SystemExit(0)": "SystemExit: 0",
    "type('Stop', (BaseException,), {})('now')": "Stop: now",
    "type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()": "Mute: (message unavailable: its __str__ failed)",
    "RuntimeError('one\\n  two\\n\\tthree')": "RuntimeError: one two three",
    "AssertionError()": "AssertionError",
    "RuntimeError('x' * 10**6)": "RuntimeError: xxxx",
    "StopIteration(3)": "StopIteration: 3",
    "KeyError('\\udcff\\x1b[31m')": "KeyError: '\\udcff",
}
PLACES = {
    "model": (MODEL, "model:"),
    "loss": (LOSS, "loss, batch 1 of val_dataloader:"),
    "metric": (METRIC, "metric, batch 1 of val_dataloader:"),
    "val_dataloader": (LOADER, "val_dataloader:"),
    "the data": ("        if i == 5 and self.broken: self.broken()", "val_dataloader, batch 2:"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("raised", RAISED)
def test_exceptions_in_a_task_function_are_one_line_errors(
    run: Run, ckpts: Path, tmp_path: Path, place: str, raised: str
):
    if place == "the data" and raised == "StopIteration(3)":
        pytest.skip("that is how Python's own loops end")
    old, where = PLACES[place]
    new = f"        if i == 5: raise {raised}" if place == "the data" else f"    raise {raised}"
    write(tmp_path, (old, new))
    line = TASK[: TASK.index(old)].count("\n") + 1
    refused(run(*SCORE), f"bad_task.py:{line}: in {where} {RAISED[raised]}")
    assert files_in(tmp_path) == {"ckpts", "bad_task.py"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('oops')", "bad_task.py:2: on import: ValueError: oops"),
        ("sys = 1 / 0", "bad_task.py:2: on import: ZeroDivisionError"),
        ("raise SystemExit(0)", "bad_task.py:2: on import: SystemExit: 0"),
        ("class B(BaseException): ...\nraise B", "bad_task.py:3: on import: B"),
        ("import bad_task_neighbour", "bad_task.py:2: on import: ModuleNotFoundError"),
        ("x = 'not closed", "bad_task.py:2: on import: SyntaxError"),
        ("\0", "on import: S"),  # SyntaxError: source code cannot contain null bytes
        ("def f(): f()\nf()", "bad_task.py:2: on import: RecursionError"),
        ("import argparse as a; p = a.ArgumentParser(); p.add_argument('x'); p.parse_args()", "SystemExit: 2"),
        ("model = 3", "has no function `model`"),
    ],
)  # fmt: skip
def test_exceptions_on_import_are_one_line_errors(run: Run, ckpts: Path, tmp_path: Path, code: str, message: str):
    (tmp_path / "bad_task.py").write_text(f"\n{code}\n" + (TASK if code != "model = 3" else ""))
    done = run(*SCORE)
    refused(done, message)
    assert "argparse" not in code or "under: if __name__ == '__main__'" in done.stderr


def test_ctrl_c_in_the_task_interrupts_the_run(run: Run, ckpts: Path, tmp_path: Path):
    write(tmp_path, (LOSS, "    raise KeyboardInterrupt"))
    refused(run(*SCORE), "interrupted; nothing was written", 75)


@pytest.mark.parametrize(
    "error", ["MemoryError()", "torch.OutOfMemoryError('CUDA out of memory. Tried\\nto allocate')"]
)
@pytest.mark.parametrize("command", [SEARCH, SCORE, ("eval", "ckpts", "--task", "bad_task.py"), ("swa", *SCORE[1:])])
@pytest.mark.parametrize("place", [LOSS, MODEL])
def test_out_of_memory_errors(
    run: Run, ckpts: Path, tmp_path: Path, error: str, command: tuple[str, ...], place: str
):  # fmt: skip
    write(tmp_path, (place, f"    raise {error}"))
    refused(run(*command), "out of memory", 8)


# invalid return values

VALUES = {
    "None": "None", "'0.5'": "str", "1j * model(batch).sum()": "complex", "torch.zeros(2)": "[2]",
    "model(batch)": "[4, 2]", "[0.5] * 4": "list", "{'loss': torch.zeros(())}": "dict", "torch.zeros(0)": "[0]",
    "iter([])": "iterator", "torch.nn.Linear(1, 1)": "Linear", "(model(batch).mean(),)": "tuple",
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("function", ["loss", "metric"])
def test_invalid_return_values_of_loss_and_metric(run: Run, ckpts: Path, tmp_path: Path, function: str, value: str):
    write(tmp_path, (LOSS if function == "loss" else METRIC, f"    return {value}"))
    done = run(*SCORE)
    refused(done, f"{function}() must")
    if function == "metric" and "dict" in VALUES[value]:  # of several metrics
        assert "a string other than 'loss'" in done.stderr
    else:
        assert VALUES[value] in done.stderr and "batch 1" in done.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "model() must return a torch.nn.Module, not int"),
        ("return nn.Linear", "model() must return a torch.nn.Module, not type"),
        ("return None", "not NoneType"),
        ("return nn.Sequential()", "the model does not fit"),
        ("return nn.LazyLinear(2)", "its weight has no shape yet"),
        ("return nn.Linear(3, 2, device='meta')", "its weight is on the meta device"),
        ("return torch.compile", "model() must return a torch.nn.Module, not function"),
        ("return nn.Linear(3, 2).half()", ""),
    ],
)
def test_invalid_return_values_of_model(run: Run, ckpts: Path, tmp_path: Path, body: str, message: str):
    write(tmp_path, (MODEL, f"    {body}"))
    refused(run(*SCORE), message)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return []", "val_dataloader() gave no batches"),
        ("return iter([])", "val_dataloader() gave no batches"),
        ("return 3", "in val_dataloader: TypeError: 'int' object is not iterable"),
        ("return None", "in val_dataloader: TypeError: 'NoneType' object is not iterable"),
        ("yield torch.ones(4, 3); raise OSError('disk')", "in val_dataloader, batch 2: OSError: disk"),
        ("return [None]", "is unclear from its parts: none has examples, for batch 1 of val_dataloader"),
        ("return ['text']", "is unclear from its parts: none has examples, for batch 1 of val_dataloader"),
        ("return [3]", "is unclear from its parts: none has examples, for batch 1 of val_dataloader"),
        ("return [{}]", "is unclear from its parts: none has examples, for batch 1 of val_dataloader"),
        ("return [[]]", "is unclear from its parts: none has examples, for batch 1 of val_dataloader"),
        ("return [torch.tensor(1.0)]", "is unclear from its parts: none has examples, for batch 1 of val_dataloader"),
        ("return [torch.ones(4, 7)]", "in loss, batch 1 of val_dataloader: RuntimeError"),
        ("return [torch.ones(4, 3), torch.ones(0, 3), torch.ones(4, 9)]", "in loss, batch 3 of val_dataloader"),
        ("x = []; x.append(x); return [x]", "batch 1"),
        ("return [type('D', (dict,), {'values': lambda self: 1 / 0})(a=torch.ones(4))]", "batch 1"),
        ("return [type('T', (), {'to': lambda self, device: 1 / 0})()]", "batch 1"),
        ("return type('L', (), {'__len__': lambda self: -1, '__iter__': lambda self: iter([])})()", "val_dataloader"),
        ("return type('L', (), {'__len__': lambda self: 1 / 0, '__iter__': lambda self: iter([])})()", "val_data"),
        ("return type('L', (), {'dataset': property(lambda self: 1 / 0), '__iter__': lambda self: iter([])})()", ""),
        ("return type('L', (), {'__getattr__': lambda self, name: 1 / 0})()", "in val_dataloader"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [SCORE, SEARCH])
def test_invalid_return_values_of_val_dataloader(
    run: Run, ckpts: Path, tmp_path: Path, body: str, message: str, command: tuple[str, ...]
):
    write(tmp_path, (LOADER, f"    {body}"))
    refused(run(*command), message.replace("metric", "loss") if command is SEARCH else message)


@pytest.mark.parametrize("options", [("--holdout", "0.5"), ("--bits", "4")])
@pytest.mark.parametrize(
    "body", ["return [None, None]", "return [[]]", "return [torch.ones(1, 3)]", "return [{}, 'x']"]
)
def test_data_that_cannot_be_divided(run: Run, ckpts: Path, tmp_path: Path, body: str, options: tuple[str, ...]):
    write(tmp_path, (LOADER, f"    {body}"))
    done = run("twa", *SCORE[1:], "--patience", "1", "--epochs", "1", *options)
    assert done.returncode == 7, done.stderr
    refused(done, "")


# non-finite values


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["best", "soup", "aswa", "swa", "lawa --k 2", "ema", "last"])
@pytest.mark.parametrize("position", range(N))
@pytest.mark.parametrize("function", ["loss", "metric"])
def test_a_candidate_that_scores_nan_is_never_chosen(
    run: Run, ckpts: Path, tmp_path: Path, strategy: str, position: int, function: str
):
    """Covers the strategies that choose by score; the others average the candidate as specified, or fail."""
    old = LOSS if function == "loss" else METRIC
    nan = f"    if abs(model.bias[0] - {position + 1}) < 1e-4: return model(batch).mean(dim=1) * float('nan')\n{old}"
    write(tmp_path, (old, nan))
    name, *options = strategy.split()
    done = run(name, *SCORE[1:], *options, "--json")
    if name == "last" and position == N - 1:
        refused(done, f"step-{N}.safetensors: {function}() gave nan in batch 1 of the val data")
        return
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    bad = report["candidates"][position]
    assert bad["score"]["invalid"].endswith(f"{function}() gave nan in batch 1 of the val data")
    assert [one["score"].get("invalid") for i, one in enumerate(report["candidates"]) if i != position] == [None] * 3
    warning_text = f"step-{position + 1}.safetensors: {function}() gave nan in batch 1 of the val data: ranked below"
    assert any(warning_text in warning for warning in report["warnings"]) and warning_text in done.stderr
    assert report["best_step"] != position + 1
    assert "invalid" not in report["scores"]["val"]  # mixtures with the bad candidate may be finite
    if name == "best":
        assert bad["coefficient"] == 0.0


@pytest.mark.thorough
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("function", ["loss", "metric"])
def test_the_error_names_the_batch_with_the_nan(
    run: Run, ckpts: Path, tmp_path: Path, function: str, batch: int, value: str
):
    old = LOSS if function == "loss" else METRIC
    first = 4.0 * (batch - 1)
    write(tmp_path, (old, f"    if batch[0, 0] == {first}: return torch.tensor(float('{value}'))\n{old}"))
    refused(run(*SCORE), f"{function}() gave {value} in batch {batch} of the val data")
    refused(run("eval", *SCORE[1:]), f"{function}() gave {value} in batch {batch} of the val data")
    assert files_in(tmp_path) == {"ckpts", "bad_task.py"}


@pytest.mark.parametrize(("command", "where"), [
    ("sewa --k 2 --steps 9 --samples 1", "at step 2 of the search, on batch 2 of the val data"),
    ("twa --epochs 2", "at step 2 of the search, on batch 2 of the val data"),
    ("sewa --k 2 --solver quadratic", "the loss is nan in batch 2, at the mean"),
    ("twa --solver quadratic", "the loss is nan in batch 2"),
    ("compare --strategies swa,soup", "in batch 2 of the val data"), ("landscape --samples 3", "in batch 2"),
])  # fmt: skip
def test_a_search_error_names_the_batch(run: Run, ckpts: Path, tmp_path: Path, command: str, where: str):
    write(tmp_path, (LOSS, f"    if batch[0, 0] == 4.0: return model(batch).mean() * float('nan')\n{LOSS}"))
    name, *options = command.split()
    refused(run(name, *SCORE[1:], *options), where)


def test_gradient_free_searches_avoid_nan(ckpts: Path, run: Run, tmp_path: Path):
    """SeWA and TWA without gradients, as with --score-cmd, on scores that are often NaN."""
    write(tmp_path, (METRIC, f"    if model.bias[0] > 2.4: return torch.tensor(float('nan'))\n{METRIC}"),
          ("def val_dataloader", "class Whole(nn.Module): ...\n\ndef val_dataloader"))  # fmt: skip
    from ckptavg.checkpoints.discover import discover
    from ckptavg.context import Run
    from ckptavg.objective.mixture import Mixture
    from ckptavg.strategies.sewa import SeWA
    from ckptavg.strategies.twa import TWA

    for strategy in (SeWA(k=2, evaluations=6), TWA(evaluations=20)):
        with discover([ckpts]) as found:
            task = PythonTask(str(tmp_path / "bad_task.py"))
            mixture = Mixture(task, found.checkpoints, Run(device=torch.device("cpu")))
            mixture.losses = None
            learned = strategy.learn(mixture)
            assert not mixture.score(learned.coefficients).invalid
            assert any(score.invalid for score in mixture.scoring._scores._values.values())


# changes to process-wide settings

CHANGES = {
    "directory, on import": ("os.chdir('/')\n", ""),
    "directory, in loss": ("", "    os.chdir('/')"),
    "directory that is gone": ("", "    os.makedirs('gone', exist_ok=True); os.chdir('gone'); os.rmdir('../gone')"),
    "grad mode, on import": ("torch.set_grad_enabled(False)\n", ""),
    "seeds": ("torch.manual_seed(3)\n", "    torch.manual_seed(0); __import__('random').seed(0)"),
    "argv": ("sys.argv = ['mine', '--lr', '1']\n", "    sys.argv.append('x')"),
    "argv is parsed": ("import argparse; p = argparse.ArgumentParser(); p.add_argument('--x', default=1); "
                       "assert p.parse_args().x == 1\n", ""),
    "signals": ("signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n", ""),
    "an alarm": ("signal.signal(signal.SIGALRM, lambda *_: None)\n", ""),
    "training mode": ("", "    model.train()"),
    "prints": ("print('on import')\n", "    print('in loss'); sys.stdout.flush()"),
    "writes to descriptor 1": ("os.write(1, b'on import\\n')\n", "    os.write(1, b'in loss\\n')"),
    "a child process prints": ("os.system('echo on import')\n", ""),
    "the first stdout": ("", "    print('in loss', file=sys.__stdout__)"),
    "threads": ("import threading; threading.Thread(target=lambda: time.sleep(0.01)).start()\n", ""),
    "environment": ("os.environ.clear()\n", ""),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("change", CHANGES)
def test_task_settings_do_not_affect_ckptavg(
    run: Run, ckpts: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path)
    assert run(*SEARCH, "-o", "expected.safetensors").returncode == 0
    on_import, in_loss = CHANGES[change]
    write(tmp_path, ("class Data", f"{on_import}\nclass Data"), (LOSS, f"{in_loss}\n{LOSS}"))
    for name, value in dict(os.environ).items():
        monkeypatch.setenv(name, value)  # so that monkeypatch restores it
    done = run(*SEARCH, "-o", "out.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"]["path"] == "out.safetensors"
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_tasks_dtype_device_and_directory_apply_to_its_own_code(run: Run, ckpts: Path, tmp_path: Path):
    for path in ckpts.iterdir():
        save_file({"weight": torch.ones(2, 3).double(), "bias": torch.full((2,), float(path.stem[-1])).double()}, path)
    (tmp_path / "data").mkdir()
    write(
        tmp_path,
        ("class Data", "torch.set_default_dtype(torch.float64)\nos.chdir('data')\nclass Data"),
        ("def model", "torch.set_default_device('cpu:0')\ndef model"),
        (LOSS, "    assert torch.zeros(1).dtype == torch.float64 and torch.get_default_device().index == 0\n" + LOSS),
        (MODEL, "    assert os.getcwd().endswith('data')\n" + MODEL),
        (METRIC, "    assert os.getcwd().endswith('data')\n" + METRIC.replace("batch)", "batch.double())")),
        ("return model(batch).square", "return model(batch.double()).square"),
    )  # fmt: skip
    done = run(*SEARCH)
    assert done.returncode == 0, done.stderr


def test_changing_data_is_reported_as_unpaired(run: Run, ckpts: Path, tmp_path: Path):
    write(tmp_path, ("        return torch.full((3,), float(i))", "        return torch.full((3,), time.time() + i)"))
    done = run("compare", "ckpts", "--strategies", "swa,best", "--task", "bad_task.py", "--json")
    assert done.returncode == 0, done.stderr
    gains = [one["over_last"]["val"] for one in json.loads(done.stdout)["strategies"]]
    assert all(gain["low"] is None or not gain["paired"] for gain in gains)


# hanging calls and dying worker processes


SOON = "signal.setitimer(signal.ITIMER_REAL, 0.01); "  # makes the time limit expire early, even on a busy machine


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("class Data", f"{SOON}time.sleep(90)\nclass Data", "on import: took more than 60 s"),
        (MODEL, f"    {SOON}time.sleep(90)", "in model: took more than 60 s"),
        (LOSS, f"    {SOON}\n    while True: time.sleep(0.01)", "in loss, batch 1 of val_dataloader: took"),
        (LOSS, f"    try:\n        {SOON}time.sleep(90)\n    except Exception: pass", "in loss, batch 1"),
        (METRIC, f"    {SOON}\n    while True: model(batch)", "in metric, batch 1 of val_dataloader: took"),
        (LOADER, f"    {SOON}time.sleep(90)", "in val_dataloader: took more than 60 s"),
        ("        if i == 5 and self.broken: ", f"        if i == 5: {SOON}time.sleep(9) #", "val_dataloader, batch"),
    ],
)  # fmt: skip
def test_the_error_names_a_call_that_takes_too_long(
    run: Run, ckpts: Path, tmp_path: Path, old: str, new: str, where: str
):
    write(tmp_path, (old, new))
    done = run(*SCORE, "--task-timeout", "60")
    refused(done, where)
    assert "--task-timeout" in done.stderr and files_in(tmp_path) == {"ckpts", "bad_task.py"}


def test_the_limit_is_in_seconds(run: Run, ckpts: Path, tmp_path: Path):
    write(tmp_path, (LOSS, "    time.sleep(90)"))
    refused(run(*SCORE, "--task-timeout", "0.5"), "took more than 0.5 s")


def test_a_limit_that_is_not_reached_changes_nothing(run: Run, ckpts: Path, tmp_path: Path):
    write(tmp_path)
    assert run(*SEARCH, "-o", "a.safetensors").returncode == 0
    assert run(*SEARCH, "-o", "b.safetensors", "--task-timeout", "60").returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_an_invalid_limit_is_refused(run: Run, ckpts: Path, tmp_path: Path, seconds: str):
    write(tmp_path)
    refused(run(*SCORE, "--task-timeout", seconds), "--task-timeout must be greater than 0", 2)


WORKER = "    return DataLoader(Data({}), batch_size=4, num_workers=1, multiprocessing_context='fork'{})"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("lambda: os.kill(os.getpid(), signal.SIGKILL)", "a worker process"),
        ("lambda: os._exit(3)", "a worker process"),
        ("lambda: sys.exit(3)", "a worker process"),
        ("lambda: 1 / 0", "in val_dataloader, batch 2: ZeroDivisionError: division by zero (in a worker process)"),
        ("lambda: {}['key']", "in val_dataloader, batch 2: KeyError: 'key' (in a worker process)"),
        ("lambda: os.kill(os.getpid(), signal.SIGSEGV)", "a worker process"),
    ],
)
def test_dead_workers_are_reported(run: Run, ckpts: Path, tmp_path: Path, broken: str, message: str):
    write(tmp_path, (LOADER, WORKER.format(broken, "")))
    refused(run(*SCORE), message)
    assert files_in(tmp_path) == {"ckpts", "bad_task.py"}


@pytest.mark.thorough
def test_a_worker_that_dies_before_its_batch_is_fetched_is_reported_as_dead(run: Run, ckpts: Path, tmp_path: Path):
    """The batch is in the memory of a worker that has removed its socket and is about to exit."""
    waiting = (
        "class Waiting(DataLoader):\n    def __iter__(self):\n        batches = super().__iter__()\n"
        "        while not batches._worker_result_queue._reader.poll(0.01): pass\n        open('sent', 'w').close()\n"
        "        while not os.path.exists('ending'): time.sleep(0.01)\n        return batches\n\n"
        "def die():\n    while not os.path.exists('sent'): time.sleep(0.01)\n"
        "    import multiprocessing.util, shutil; shutil.rmtree(multiprocessing.util.get_temp_dir())\n"
        "    open('ending', 'w').close(); time.sleep(30); os._exit(3)\n\n"
        "def own_folder(_):\n    import multiprocessing.process\n"
        "    multiprocessing.process.current_process()._config.pop('tempdir', None)\n\ndef val_dataloader"
    )
    loader = WORKER.format("die", ", worker_init_fn=own_folder").replace("DataLoader(", "Waiting(")
    write(tmp_path, (LOADER, loader),
          ("def val_dataloader", waiting))  # fmt: skip
    refused(run(*SCORE), "in val_dataloader, batch 1: a worker process died: FileNotFoundError: ")


def test_a_missing_file_in_the_loaders_own_pool_is_not_a_dead_worker(run: Run, ckpts: Path, tmp_path: Path):
    lose = (
        "def lose():\n    from multiprocessing.pool import ThreadPool\n"
        "    with ThreadPool(1) as pool: pool.map(open, ['gone.csv'])\n\ndef val_dataloader"
    )
    write(tmp_path, (LOADER, "    return DataLoader(Data(lose), batch_size=4)"), ("def val_dataloader", lose))
    done = run(*SCORE)
    refused(done, "in val_dataloader, batch 2: FileNotFoundError: ")
    assert "worker process" not in done.stderr


def test_a_worker_that_dies_during_loss_is_not_blamed_on_loss(run: Run, ckpts: Path, tmp_path: Path):
    """torch raises the death of a worker in whatever code the process is running."""
    write(tmp_path, (LOADER, WORKER.format("lambda: os.kill(os.getpid(), signal.SIGKILL)", "")),
          (METRIC, f"    time.sleep(1)\n{METRIC}"))  # fmt: skip
    refused(run(*SCORE), "a worker process died: ")


@pytest.mark.thorough
@pytest.mark.parametrize("options", [", timeout=1", ""])
def test_hanging_workers_are_reported(run: Run, ckpts: Path, tmp_path: Path, options: str):
    """torch waits forever unless the loader or ckptavg has a timeout."""
    write(tmp_path, (LOADER, WORKER.format("lambda: time.sleep(600)", options)))
    limit = () if options else ("--task-timeout", "3")
    done = run(*SCORE, *limit)
    refused(done, "in val_dataloader, batch ")  # batch 2, or batch 1 if the machine is too busy for the worker
    assert "took more than 3 s" in done.stderr if limit else "timed out after 1" in done.stderr


def test_workers_that_print_do_not_corrupt_the_report(run: Run, ckpts: Path, tmp_path: Path):
    body = WORKER.format("lambda: (print('from a worker', flush=True), os.write(1, b'raw'))", "")
    write(tmp_path, (LOADER, body))
    done = run(*SCORE, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["strategy"] == "best"
    assert "from a worker" in done.stderr and "raw" in done.stderr


@pytest.mark.thorough
def test_a_task_that_exits_the_process_leaves_no_partial_output(run: Run, ckpts: Path, tmp_path: Path):
    write(tmp_path, (LOSS, "    os._exit(9)"))
    command = [sys.executable, "-m", "ckptavg", *SEARCH]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (9, "")
    assert files_in(tmp_path) <= {"ckpts", "bad_task.py", "averaged.safetensors.ckptavg"}
    write(tmp_path)
    assert run(*SEARCH, "--no-resume").returncode == 0


@pytest.mark.thorough
def test_signals_reach_ckptavg_although_the_task_ignores_them(ckpts: Path, tmp_path: Path):
    write(
        tmp_path,
        ("class Data", "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\nclass Data"),
        (LOSS, f"    print('in loss', flush=True)\n{LOSS}"),
    )  # fmt: skip
    command = [sys.executable, "-m", "ckptavg", *SEARCH, "--steps", "1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and any("in loss" in line for line in process.stderr)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (75, "") and "error: interrupted" in err

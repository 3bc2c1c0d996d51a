"""The same inputs and seed give the same bytes: again, in other threads, orders and processes, and when resumed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import ckptavg
from ckptavg.runtime.seeds import LACKING, reproducible, reseed, seed_loader
from faults import job
from faults.test_signals import real
from faults.warm import Warm

TASK = Path(job.__file__)
HOOKS: tuple[dict[str, int], ...] = (
    *[{}] * 5,
    *({"threads": n} for n in (1, 2, 4)),
    *({"listing": n} for n in (1, 2)),
)


def plain(ckpts: Path, folder: Path) -> Path:
    """Train candidates without BatchNorm, whose statistics are the model's arithmetic and may depend on threads."""
    (folder / "plain").mkdir()
    for path in ckpts.iterdir():
        state = {name: tensor for name, tensor in torch.load(path).items() if not name.startswith("1.")}
        torch.save(state, folder / "plain" / path.name)
    return folder / "plain"


def test_threads_order_workers_and_hash_seeds_do_not_change_the_output(
    warm: Warm, ckpts: Path, tmp_path: Path, tally: Counter[str]
):
    base = ("sewa", plain(ckpts, tmp_path), "--k", 3, "--steps", 12, "--task", TASK)
    outputs: list[Path] = []

    def run(hook: dict[str, int], wanted: int = 0, name: str = "", **environment: str) -> None:
        outputs.append(tmp_path / (name or f"out-{len(outputs)}"))
        done = warm.run(*base, "-o", outputs[-1], cwd=tmp_path, hook=hook, PLAIN="1", **environment)
        assert done.code == wanted, done.err

    for hook in HOOKS:
        run(hook)
    for workers in ("0", "2"):
        run({}, WORKERS=workers)
    for stop in ("5:SIGKILL", "40:SIGTERM"):
        run({}, -9 if "KILL" in stop else 75, name=stop, LOG=str(tmp_path / "log"), STOP=stop)
        outputs.pop()
        run({}, name=stop)
    process = real(*base, "-o", tmp_path / "fresh", cwd=tmp_path, PLAIN="1", PYTHONHASHSEED="7")
    assert process.communicate() and process.returncode == 0
    outputs.append(tmp_path / "fresh")
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs}
    tally.update({"runs that should agree": len(outputs), "distinct outputs": len(found)})
    assert len(found) == 1 and len(outputs) >= 14


@pytest.mark.parametrize("command", ["aswa", "soup", "sewa --solver quadratic --k 3"])
def test_another_count_of_threads_averages_to_the_same_bytes(warm: Warm, ckpts: Path, tmp_path: Path, command: str):
    name, *options = command.split()
    folder = plain(ckpts, tmp_path)
    for threads in (1, 3):
        arguments = (name, folder, *options, "--task", TASK, "-o", f"out-{threads}")
        assert warm.run(*arguments, cwd=tmp_path, hook={"threads": threads}, PLAIN="1").code == 0
    assert (tmp_path / "out-1").read_bytes() == (tmp_path / "out-3").read_bytes()


def test_random_numbers_of_a_loss_depend_only_on_its_batch():
    drawn = []
    for skipped in (False, True):
        reseed(3, 0)
        if not skipped:
            torch.rand(5)
        reseed(3, 1)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    reseed(3, 2)
    assert not torch.equal(torch.rand(3), drawn[0])


def test_a_loader_with_a_generator_of_its_own_repeats_its_passes():
    generator = torch.Generator()
    data = torch.utils.data.TensorDataset(torch.arange(50))
    loader = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True, generator=generator)
    orders = []
    for seed in (1, 1, 2):
        reseed(seed, 0)
        seed_loader(loader)
        orders.append(next(iter(loader))[0])
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


LACKS = """
from faults.job import *
_loss = loss
def loss(model, batch):
    torch.zeros(4).put_(torch.tensor([1]), torch.tensor([1.0]))
    return _loss(model, batch)
"""


def test_an_operation_without_a_deterministic_form_is_named(warm: Warm, ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(LACKS)
    arguments = ("aswa", ckpts, "--task", "mine.py", "-o", "out")
    done = warm.run(*arguments, "--deterministic", cwd=tmp_path)
    assert done.code == 7, done.err
    error, hint = done.err.splitlines()[-2:]
    assert error == f"error: mine.py:5: in loss, batch 1 of train_dataloader: RuntimeError: put_ {LACKING}"
    assert hint == "hint: leave out --deterministic, or use another operation"
    assert warm.run(*arguments, cwd=tmp_path).code == 0


def test_deterministic_algorithms_are_on_within_and_off_again_afterwards(ckpts: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from faults.job import *\n"
        "def model(_model=model):\n"
        "    assert torch.are_deterministic_algorithms_enabled()\n"
        "    assert os.environ['CUBLAS_WORKSPACE_CONFIG'] and not torch.backends.cudnn.benchmark\n"
        "    return _model()\n"
    )
    ckptavg.best(ckpts, task=tmp_path / "mine.py", output=tmp_path / "out", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with reproducible(0, deterministic=True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"

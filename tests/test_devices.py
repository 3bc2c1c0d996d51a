"""Results on another device equal those on the CPU: scripts/gpu/check.sh runs this with ``--device cuda``."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack
from typing import Any

import pytest
import torch
from conftest import CPU, Job, Run
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import ckptavg
from ckptavg.candidates.plan import FEWER
from ckptavg.objective import Learned
from ckptavg.runtime.seeds import reproducible
from ckptavg.strategies import from_spec, strategies

pytestmark = pytest.mark.gpu
QUICK = {"sewa": "sewa:k=2:steps=10", "lawa": "lawa:k=2", "twa": "twa:epochs=2"}
NAMES = sorted(strategies())
# for coefficients learned in float32, whose sums have another order: AdamW divides a gradient by its own size
BOUND = 1e-3
MATRICES: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    **{f"{bits} bits": {"bits": bits} for bits in FEWER},
    "offload cpu": {"offload": "cpu"},
    "offload disk": {"offload": "disk"},
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    **MATRICES, "deterministic": {"deterministic": True}, "compiled": {"compile": True},
    "bfloat16": {"precision": "bfloat16"},
}  # fmt: skip


def learned(job: Job, spec: str, device: torch.device, **options: Any) -> Learned:
    with reproducible(0), job.mixture(last=5, device=device, **options) as mixture:  # without TF32
        return from_spec(QUICK.get(spec, spec)).learn(mixture)


def agree(found: Learned, expected: Learned) -> None:
    got, want = found.coefficients, expected.coefficients
    assert got.selected == want.selected
    torch.testing.assert_close(torch.tensor(got.values), torch.tensor(want.values), rtol=0, atol=BOUND)


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_finds_what_it_finds_on_the_cpu(jobs: dict[str, Job], device: torch.device, kind: str, name: str):
    agree(learned(jobs[kind], name, device), learned(jobs[kind], name, CPU))


@pytest.mark.parametrize("spec", ["sewa", "twa", "twa:layerwise:epochs=2"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_candidates_kept_in_any_way_are_those_of_the_cpu(
    jobs: dict[str, Job], device: torch.device, spec: str, matrix: str
):
    agree(learned(jobs["mlp"], spec, device, **MATRICES[matrix]), learned(jobs["mlp"], spec, CPU, **MATRICES[matrix]))


@pytest.mark.parametrize("spec", ["sewa:solver=quadratic:k=2", "twa:solver=quadratic"])
def test_the_quadratic_solvers_find_what_they_find_on_the_cpu(jobs: dict[str, Job], device: torch.device, spec: str):
    agree(learned(jobs["mlp"], spec, device), learned(jobs["mlp"], spec, CPU))


def test_batchnorm_has_the_statistics_of_the_cpu(jobs: dict[str, Job], device: torch.device):
    found: list[dict[str, torch.Tensor]] = []
    for there in (CPU, device):
        with reproducible(0), jobs["cnn"].mixture(last=3, device=there) as mixture:
            mixture.mixed.candidates.materialize(mixture.losses.uniform())
            mixture.scoring.recompute_batchnorm()
            found.append({name: mixture.mixed.model.state_dict()[name].cpu() for name in mixture.statistics})
    assert found[0]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_file_has_the_bytes_of_the_cpus(jobs: dict[str, Job], device: torch.device, tmp_path: Path, way: str):
    if way == "compiled" and device.type == "cpu":
        pytest.skip("objective/test_search_settings.py has compiled models on the CPU")
    job, options = jobs["mlp"], {"precision": "float32", **WAYS[way]}
    results: list[ckptavg.Result] = []
    for output, there in (("first", "cpu"), ("second", str(device))):
        results.append(
            ckptavg.sewa(
                job.folder, task=job.task, last=5, k=2, steps=10, baselines=False, device=there,
                output=tmp_path / output, **options,
            )
        )  # fmt: skip
        if way == "compiled":
            assert results[-1].matrix is not None and results[-1].matrix.compiled, results[-1].warnings
    first, second = results
    if way != "bfloat16":  # where devices may choose differently between two equally good candidates
        assert [one.coefficient for one in first.candidates] == [one.coefficient for one in second.candidates]
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert sum(one.coefficient > 0 for one in second.candidates) == 2


def test_only_batchnorms_statistics_differ_from_the_cpus_file(
    run: Run, jobs: dict[str, Job], device: torch.device, tmp_path: Path
):
    job, files = jobs["cnn"], list[Path]()
    for there in ("cpu", device):
        files.append(tmp_path / f"average-{len(files)}.safetensors")
        done = run("swa", job.folder, "--last", 5, "--task", job.task, "--device", there, "-o", files[-1])
        assert done.returncode == 0, done.stderr
    first, second = map(load_file, files)
    for name, tensor in first.items():
        close = {"rtol": 1e-4, "atol": 1e-5} if "running_" in name else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(second[name], tensor, **close)


def test_draws_have_the_bytes_and_their_predictions_the_nll_of_the_cpu(
    run: Run, jobs: dict[str, Job], device: torch.device, tmp_path: Path
):
    job, reports, files = jobs["mlp"], list[dict[str, Any]](), list[dict[str, str]]()
    for name, there in (("first", "cpu"), ("second", device)):
        words = ("swag", job.folder, "--last", 5, "--task", job.task, "--device", there, "--samples", 2, "--draws", 4)
        done = run(*words, "-o", f"{name}/", "--posterior", f"{name}.safetensors", "--json")
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
        outputs = [*reports[-1]["draws"], reports[-1]["posterior"], reports[-1]["output"]]
        files.append({output["path"].removeprefix(name): output["data_digest"] for output in outputs})
    assert len(files[0]) == 4 and files[0] == files[1]
    for split, models in reports[0]["predictions"].items():
        for name, figures in models.items():
            other = reports[1]["predictions"][split][name]["score"]["loss"]
            assert figures["score"]["loss"] == pytest.approx(other, abs=1e-6)


@pytest.mark.thorough
def test_a_killed_run_goes_on(jobs: dict[str, Job], device: torch.device, tmp_path: Path):
    """Kill a run from inside in the middle of its batches, then resume it: the bytes of an uninterrupted run."""
    job, task = jobs["mlp"], tmp_path / "mine.py"
    task.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(job.task.parent)!r})
import {job.task.stem} as real
from {job.task.stem} import *
calls = 0
def loss(model, batch):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return real.loss(model, batch)
""")
    words = [sys.executable, "-m", "ckptavg", "sewa", str(job.folder), "--last", "4", "--k", "2", "--steps", "10"]
    words += ["--task", str(task), "--device", str(device), "--no-baselines"]
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    codes = [
        subprocess.run([*words, "-o", output], cwd=tmp_path, env={**environment, "KILL": kill}).returncode
        for output, kill in (("whole", "0"), ("parts", "12"), ("parts", "0"))
    ]
    assert codes == [0, -9, 0]
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


class Waiting(TorchDispatchMode):
    """Refuses operations that look at values, for which the host would wait on a GPU.

    Samplers draw their indices, and optimizers count their steps, on the host whatever the device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}:
            callers = [frame.f_code.co_filename for frame, _ in walk_stack(None)]
            if not any("/torch/optim/" in file or "/torch/utils/data/" in file for file in callers):
                raise RuntimeError(f"the host waits for {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: torch.device) -> Generator[None]:
    if device.type != "cuda":
        with Waiting():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["cnn", "mlp", "transformer"])
@pytest.mark.parametrize("matrix", ["dense", "4 bits"])
@pytest.mark.parametrize(
    "spec",
    [
        "sewa:k=2:steps=3", "sewa:k=2:steps=3:straight_through", "twa:on=train",
        "twa:on=train:constraint=simplex:clip=1", "twa:on=train:optimizer=sgd:sam_rho=0.1", "twa:on=train:layerwise",
    ],
)  # fmt: skip
def test_a_step_waits_for_nothing(jobs: dict[str, Job], device: torch.device, spec: str, matrix: str, kind: str):
    """Check from the end of the first step, which loads and warms up, to the end of the third of the epoch."""
    with jobs[kind].mixture(last=5, device=device, **MATRICES[matrix]) as mixture:
        steps, forbidden = 0, no_waiting(device)

        def progress(stage: str, done: int, total: int, **_: Any) -> None:
            nonlocal steps
            if not stage.startswith(("learning", "training")):
                return
            if done == 1:
                forbidden.__enter__()
            elif done == 3:
                forbidden.__exit__(None, None, None)
            steps = done

        mixture.progress = progress  # pyright: ignore[reportAttributeAccessIssue]
        try:
            from_spec(spec).learn(mixture)
        finally:
            if steps in (1, 2):
                forbidden.__exit__(None, None, None)
    assert steps >= 3


def test_a_waiting_operation_is_detected(device: torch.device):
    with no_waiting(device), pytest.raises(RuntimeError, match=r"wait|synchroniz"):
        float(torch.ones(1, device=device).sum())

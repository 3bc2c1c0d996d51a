"""--offload, --precision and --compile change how a search computes, but not its results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Job, Run
from torch import nn

import ckptavg
from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.objective.precision import Compiled, precision

CPU = torch.device("cpu")
QUICK: dict[str, dict[str, Any]] = {
    "sewa": {"k": 3, "steps": 30}, "twa": {"epochs": 2}, "soup": {}, "aswa": {}, "swa": {},
}  # fmt: skip


def run_strategy(strategy: str, job: Job, output: Path, **options: Any) -> ckptavg.Result:
    return getattr(ckptavg, strategy)(
        job.folder, task=job.task, last=6, baselines=False, output=output, **QUICK[strategy], **options
    )


def row(result: ckptavg.Result) -> list[Any]:
    return [candidate.coefficient for candidate in result.candidates]


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", QUICK)
def test_streamed_candidates_give_the_result_of_the_dense_matrix(jobs: dict[str, Job], tmp_path: Path, strategy: str):
    dense = run_strategy(strategy, jobs["cnn"], tmp_path / "dense")
    other = run_strategy(strategy, jobs["cnn"], tmp_path / "streamed", offload="disk")
    assert row(other) == pytest.approx(
        row(dense), rel=0, abs=1e-5
    )  # float32 sums in another order, and a search based on them
    if strategy != "twa":
        assert (tmp_path / "dense").read_bytes() == (tmp_path / "streamed").read_bytes()
    assert other.matrix is not None and other.matrix.offload == "disk"
    assert other.scores["val"].loss == pytest.approx(dense.scores["val"].loss, rel=1e-5)


def test_surrogate_of_streamed_candidates_matches_the_dense_matrix(jobs: dict[str, Job]):
    with jobs["mlp"].mixture(last=4) as dense, jobs["mlp"].mixture(last=4, offload="disk") as other:
        q, expected = other.losses.surrogate(), dense.losses.surrogate()
    torch.testing.assert_close(q.gradient_N, expected.gradient_N, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.hessian_NN, expected.hessian_NN, rtol=1e-4, atol=1e-6)


def test_conflicting_options_are_refused(run: Run, digits: Path):
    for options, message in (
        (
            ("--offload", "disk", "--bits", 4, "--task", TASK),
            "--offload keeps the candidates in full precision, --bits 4",
        ),
        (
            ("--offload", "cpu", "--compile", "--score-cmd", "true"),
            "--offload, --compile applies to a model that ckptavg",
        ),
        (("--precision", "auto", "--score-cmd", "true"), "--precision applies to a model"),
    ):
        done = run("soup", digits, *options)
        assert done.returncode == 2 and message in done.stderr


def test_offload_cpu_changes_nothing_on_a_cpu(jobs: dict[str, Job], tmp_path: Path):
    result = run_strategy("soup", jobs["mlp"], tmp_path / "out", offload="cpu")
    assert "--offload cpu changes nothing on a CPU" in " ".join(result.warnings)
    assert result.matrix is not None and result.matrix.offload == "none"


def test_bfloat16_applies_only_to_the_passes_of_the_search(jobs: dict[str, Job]):
    """Loss and gradient equal those under torch.autocast; weights and coefficients keep their dtype."""
    job, seen = jobs["mlp"], list[torch.dtype]()
    with job.mixture(last=4) as plain, job.mixture(last=4, precision="bfloat16") as coarse:
        c = plain.losses.uniform().requires_grad_()
        (batch,) = [next(iter(plain.task.batches("val")))]
        coarse.mixed.model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        (gradient,) = torch.autograd.grad(coarse.losses.loss(c), c)
        plain.mixed.candidates.materialize(c.detach())
        plain.mixed.candidates.zero_gradient()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = job.module.loss(plain.mixed.model, batch).mean()
        loss.backward()
        assert torch.equal(gradient, plain.mixed.candidates.pullback()[0].double())
        assert seen == [torch.bfloat16] and gradient.dtype == torch.float64
        assert all(tensor.dtype == torch.float32 for tensor in coarse.mixed.model.state_dict().values())
        both = Coefficients.uniform([1, 3], 4)
        assert coarse.exact_score(both, "val") == plain.score(both)
        assert coarse.score(both).loss != plain.score(both).loss
        assert coarse.score(both).loss == pytest.approx(plain.score(both).loss, rel=2**-6)
        # a single candidate is scored in the same precision as the mixtures it is compared with
        assert coarse.score(Coefficients.uniform([1], 4)).loss != plain.score(Coefficients.uniform([1], 4)).loss


def test_report_has_the_precision_and_exact_scores(jobs: dict[str, Job], run: Run, tmp_path: Path):
    job = jobs["mlp"]
    base = ("twa", job.folder, "--task", job.task, "--last", 4, "--epochs", 2, "--json", "--no-baselines")
    coarse = json.loads(run(*base, "--precision", "bfloat16", "-o", "a").stdout)
    own = json.loads(run(*base, "--precision", "auto", "-o", "b").stdout)
    assert coarse["matrix"]["precision"] == "bfloat16" and own["matrix"]["precision"] == "float32"
    scored = run("eval", "a", "--task", job.task, "--json")
    assert json.loads(scored.stdout)["files"][0]["val"]["loss"] == coarse["scores"]["val"]["loss"]


def test_auto_is_float32_on_a_cpu_and_bfloat16_is_refused_without_support(monkeypatch: pytest.MonkeyPatch):
    assert precision("auto", CPU) == precision("float32", CPU) == "float32" and precision("bfloat16", CPU) == "bfloat16"
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert precision("auto", torch.device("cuda")) == ("bfloat16" if has else "float32")
    with pytest.raises(UsageError, match="--precision bfloat16: cuda does not support it"):
        precision("bfloat16", torch.device("cuda"))


def test_a_journal_of_another_precision_is_refused(run: Run, jobs: dict[str, Job], tmp_path: Path):
    job = jobs["mlp"]
    base = ("soup", job.folder, "--task", job.task, "--last", 3, "-o", "out", "--no-baselines")
    assert run(*base, "--keep-journal").returncode == 0
    for options, message in ((("--precision", "bfloat16"), "precision"), (("--offload", "disk"), "offload")):
        done = run(*base, "--force", *options)
        assert done.returncode == 6 and f"a different run: {message}" in done.stderr
    assert run(*base, "--force", "--precision", "auto", "--keep-journal").returncode == 0  # auto is float32 here


compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.thorough
@compiler
def test_a_compiled_model_gives_the_same_losses_and_scores(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # a private cache: a shared one may hold code compiled by other processes, perhaps for another processor
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    import torch._inductor.config as inductor

    job, alone = jobs["mlp"], inductor.patch({"compile_threads": 1})
    with alone, job.mixture(last=4) as plain, job.mixture(last=4, compile=True) as fast:
        for chosen in ([0], [1, 3], [0, 1, 2, 3]):
            coefficients = Coefficients.uniform(chosen, 4)
            assert fast.score(coefficients).metric == plain.score(coefficients).metric
            assert fast.score(coefficients).loss == pytest.approx(plain.score(coefficients).loss, rel=1e-5)
        for c in (plain.losses.uniform(), torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)):
            gradients = [
                torch.autograd.grad(mixture.losses.loss(c.requires_grad_()), c)[0] for mixture in (plain, fast)
            ]
            # float32 sums in another order, of terms that nearly cancel
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        assert not fast.notes and fast.matrix.compiled and not plain.matrix.compiled
        # compiled graphs support neither forward mode nor double backward: the surrogate uses the plain model
        assert torch.equal(fast.losses.surrogate().hessian_NN, plain.losses.surrogate().hessian_NN)
        assert fast.mixed.model.state_dict().keys() == plain.mixed.model.state_dict().keys()


@pytest.mark.thorough
def test_without_a_compiler_the_plain_model_runs_with_one_warning(jobs: dict[str, Job], tmp_path: Path):
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # code compiled by another test would be reused for this model
    with inductor.patch({"cpp.cxx": ("/no/such/compiler",)}):
        result = run_strategy("sewa", jobs["mlp"], tmp_path / "out", compile=True)
    (line,) = [warning for warning in result.warnings if "--compile" in warning]
    assert line.startswith("--compile was given up, and the model ran as it is: ") and "\n" not in line
    assert "compiler" in line.lower()
    assert result.matrix is not None and not result.matrix.compiled
    plain = run_strategy("sewa", jobs["mlp"], tmp_path / "plain")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "plain").read_bytes() and row(plain) == row(result)


def test_an_error_of_the_model_is_raised_unchanged():
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("of the user")

    model = Broken()
    compiled = Compiled(model)
    with pytest.raises(ValueError, match="of the user"):
        model(torch.ones(1))
    assert compiled.failure is None

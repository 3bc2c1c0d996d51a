"""Averaged predictions against a literal average of the probabilities of models that torch alone computes.

Shape suffixes: B = examples, C = classes, D = parameters of a tensor, N = candidates, S = models.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Job, Run
from jobs import mlp
from torch import Tensor

from ckptavg.average.gaussian import Draw, Gaussian, Posterior
from ckptavg.batches import cache
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import Coefficients
from ckptavg.errors import TaskError
from ckptavg.objective.mixture import Mixture
from ckptavg.objective.model_average import NoLikelihoodError

N, S = 5, 4
START = """
import sys
sys.path.insert(0, {tests!r})
from jobs.mlp import *
from jobs import mlp
"""
PREDICT = """
def predict(model, batch): return model(batch[0]).softmax(dim=1)
"""
MEAN = """
def loss(model, batch): return mlp.loss(model, batch).mean()
"""
TESTS = str(Path(mlp.__file__).parents[1])


def task(folder: Path, *more: str) -> Path:
    """Write the MLP's task with other functions."""
    path = folder / "mine.py"
    path.write_text(START.format(tests=TESTS) + "".join(more))
    return path


@contextmanager
def opened(job: Job, folder: Path, *more: str, **options: Any) -> Iterator[tuple[Mixture, Posterior]]:
    """Open the objective on the last five checkpoints, and a Gaussian over them."""
    mine = dataclasses.replace(job, task=task(folder, *more))
    with mine.mixture(last=N, **options) as mixture:
        gaussian = Gaussian(scale=0.5, deviations=N, covariance="running", seed=0)
        yield mixture, Posterior.over(mixture.mixed.checkpoints, gaussian)


def averaged(mixture: Mixture, draws: list[Draw]) -> tuple[Any, Any]:
    return mixture.average_predictions([(draw.coefficients, draw.noise) for draw in draws], "val")


def probabilities(posterior: Posterior, draws: list[Draw]) -> tuple[Tensor, Tensor]:
    """Return the averaged probabilities of the draws [B, C] and the labels, from the files and with torch alone."""
    total, labels = torch.zeros(()), torch.cat([labels for _, labels in mlp.val_dataloader()])
    for draw in draws:
        network, state = mlp.model(), dict[str, Tensor]()
        for name in posterior.checkpoints[0].names:
            spec = posterior.checkpoints[0].spec(name)
            w_D = torch.zeros(spec.numel, dtype=torch.float64)
            for c, checkpoint in zip(draw.coefficients.row(name), posterior.checkpoints, strict=True):
                data = bytearray(spec.nbytes)
                checkpoint.read_into(name, 0, memoryview(data))
                w_D += c * torch.frombuffer(data, dtype=TORCH[spec.dtype]).double()
            noise_D = draw.noise(name, 0, spec.numel)
            assert noise_D is not None
            state[name] = (w_D + torch.from_numpy(noise_D)).float().view(spec.shape)
        network.load_state_dict(state)
        with torch.no_grad():
            logits = torch.cat([network(inputs) for inputs, _ in mlp.val_dataloader()])
        total = total + logits.double().softmax(dim=1)
    return total / len(draws), labels


def literal_ece(p_BC: Tensor, labels_B: Tensor) -> float:
    """Return Σ_m |acc_m − conf_m| n_m/n over 15 bins (lo, hi] (Guo et al. 2017, equation 3)."""
    confidence_B, guess_B = (values.numpy() for values in p_BC.max(dim=1))
    right_B, total = guess_B == labels_B.numpy(), 0.0
    for m in range(15):
        inside = (confidence_B > m / 15) & (confidence_B <= (m + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right_B[inside].mean() - confidence_B[inside].mean())
    return total


@pytest.mark.parametrize("more", [(), (PREDICT,)], ids=["loss", "predict"])
@pytest.mark.parametrize("bits", [32, 8])
def test_the_nll_is_that_of_the_averaged_probabilities(jobs: dict[str, Job], tmp_path: Path, more: Any, bits: int):
    """By logsumexp of the losses, or of predict; candidates kept in few bits are read exactly from the files.

    Probabilities in float32, of sums of 32 terms: 10⁻⁶.
    """
    options = {} if bits == 32 else {"bits": bits}
    with opened(jobs["mlp"], tmp_path, *more, **options) as (mixture, posterior):
        draws = [posterior.draw(sample) for sample in range(1, S + 1)]
        score, bins = averaged(mixture, draws)
        p_BC, labels_B = probabilities(posterior, draws)
        alone = [averaged(mixture, [draw])[0].loss for draw in draws]
    nll = float(-p_BC.gather(1, labels_B[:, None]).log().mean())
    assert score.loss == pytest.approx(nll, abs=1e-6) and score.examples == len(labels_B)
    assert score.loss < np.mean(alone) - 1e-3  # Jensen's inequality; the mean of the losses is another figure
    assert (len(bins) > 0) == bool(more)


def test_accuracy_brier_and_ece_are_those_of_the_averaged_probabilities(jobs: dict[str, Job], tmp_path: Path):
    with opened(jobs["mlp"], tmp_path, PREDICT) as (mixture, posterior):
        draws = [posterior.draw(sample) for sample in range(1, S + 1)]
        score, bins = averaged(mixture, draws)
        p_BC, labels_B = probabilities(posterior, draws)
    found = {name: value.metric for name, value in score.others.items()}
    one_hot_BC = torch.nn.functional.one_hot(labels_B, 2)
    assert found["accuracy"] == pytest.approx(float((p_BC.argmax(1) == labels_B).double().mean()), abs=1e-9)
    assert found["brier"] == pytest.approx(float((p_BC - one_hot_BC).square().sum(1).mean()), abs=1e-6)
    assert found["ece"] == pytest.approx(literal_ece(p_BC, labels_B), abs=1e-6)
    assert sum(row["examples"] for row in bins) == len(labels_B)
    gaps = [row["examples"] * abs(row["confidence"] - row["accuracy"]) for row in bins]
    assert sum(gaps) / len(labels_B) == pytest.approx(found["ece"], abs=1e-7)
    assert all(row["low"] < row["confidence"] <= row["high"] for row in bins)


def test_a_model_averaged_with_itself_is_itself(jobs: dict[str, Job], tmp_path: Path):
    with opened(jobs["mlp"], tmp_path, PREDICT) as (mixture, _):
        mean = (Coefficients.uniform(range(N), N), None)
        one, three = (mixture.average_predictions([mean] * count, "val")[0] for count in (1, 3))
        plain = mixture.scoring.find(Coefficients.uniform(range(N), N), "val")
    assert one.loss == pytest.approx(three.loss, abs=1e-12) and one.loss == pytest.approx(plain.loss, abs=1e-6)


def test_a_loss_of_a_batch_is_no_likelihood(jobs: dict[str, Job], tmp_path: Path):
    with opened(jobs["mlp"], tmp_path, MEAN) as (mixture, posterior):
        with pytest.raises(NoLikelihoodError, match="needs one loss per example") as error:
            averaged(mixture, [posterior.draw(1)])
        assert error.value.hint and "predict" in error.value.hint


CHANGES = {
    "order": "[*reversed(batches)] if passes % 2 else batches",
    "fewer": "batches[: -1] if passes > 1 else batches",
    "more": "batches + batches[:1] if passes > 1 else batches",
    "sizes": "[tuple(part[:50] for part in batch) for batch in batches] if passes > 1 else batches",
}
LOADER = """
passes = 0
def val_dataloader():
    class Loader:
        def __iter__(self):
            global passes
            passes += 1
            batches = [tuple(batch) for batch in mlp.val_dataloader()]
            yield from {change}
    return Loader()
"""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [(), (PREDICT,)], ids=["loss", "predict"])
def test_data_that_change_between_passes_are_an_error(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, more: Any
):
    """Probabilities of other examples would be averaged; data that fit into the cache are read once."""
    monkeypatch.setattr(cache, "HOST", 0)
    loader = LOADER.format(change=CHANGES[change])
    with opened(jobs["mlp"], tmp_path, loader, *more) as (mixture, posterior), pytest.raises(TaskError) as error:
        averaged(mixture, [posterior.draw(sample) for sample in (1, 2)])
    assert re.search("other examples, or another order, in every pass", str(error.value)), error.value


def words(job: Job, path: Path, *options: Any) -> tuple[Any, ...]:
    return ("swag", job.folder, "--last", N, "--task", path, "--no-baselines", "--force", *options)


def test_auto_takes_the_scale_of_the_lowest_nll_on_validation_data(run: Run, jobs: dict[str, Job], tmp_path: Path):
    """Test labels that are flipped change neither the scale that is taken nor the table of scales."""
    flipped = """
def test_dataloader(): return [(inputs, 1 - labels) for inputs, labels in mlp.test_dataloader()]
"""
    nll = {}
    for scale in (0, 0.25, 0.5, 1):
        done = run(*words(jobs["mlp"], task(tmp_path, PREDICT), "--scale", scale, "--draws", 3, "--json"))
        nll[scale] = json.loads(done.stdout)["predictions"]["val"]["swag"]["score"]["loss"]
    best = min(nll, key=lambda scale: nll[scale])
    notes = set[str]()
    for more in ((), (flipped,)):
        done = run(*words(jobs["mlp"], task(tmp_path, PREDICT, *more), "--scale", "auto", "--draws", 3, "--json"))
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["gaussian"]["scale"] == best
        for split in ("val", "test"):
            assert report["predictions"][split]["swag"]["models"] == (3 if best else 1)
        assert report["predictions"]["val"]["swag"]["score"]["loss"] == pytest.approx(nll[best], abs=1e-12)
        notes |= {note for note in report["warnings"] if "by scale" in note}
    (note,) = notes
    figures = [float(figure) for figure in re.findall(r": (\d\.\d+)", note)]
    assert figures == pytest.approx([*nll.values()], abs=1e-4) and f"{best:g} was taken" in note


def test_the_draws_that_are_written_have_the_scale_that_was_chosen(run: Run, jobs: dict[str, Job], tmp_path: Path):
    path, options = task(tmp_path, PREDICT), ("--samples", 2, "--draws", 2, "--json")
    chosen = json.loads(run(*words(jobs["mlp"], path, "--scale", "auto", "-o", "a/", *options)).stdout)
    scale = chosen["gaussian"]["scale"]
    given = json.loads(run(*words(jobs["mlp"], path, "--scale", scale, "-o", "b/", *options)).stdout)
    assert [draw["data_digest"] for draw in chosen["draws"]] == [draw["data_digest"] for draw in given["draws"]]


def test_a_loss_of_a_batch_is_a_note_and_the_files_are_written(run: Run, jobs: dict[str, Job], tmp_path: Path):
    done = run(*words(jobs["mlp"], task(tmp_path, MEAN), "-o", "out/", "--samples", 2, "--json"))
    report = json.loads(done.stdout)
    assert report["predictions"] == {} and len(report["draws"]) == 2 and "predictions," not in done.stderr
    assert any(
        "predictions were not averaged" in note and "one loss per example" in note for note in report["warnings"]
    )
    done = run(*words(jobs["mlp"], task(tmp_path, MEAN), "--scale", "auto"))
    assert done.returncode == 7 and "one loss per example" in done.stderr


def test_logits_of_predict_are_an_error(run: Run, jobs: dict[str, Job], tmp_path: Path):
    path = task(tmp_path, "\ndef predict(model, batch): return model(batch[0])\n")
    done = run(*words(jobs["mlp"], path))
    assert done.returncode == 7 and "softmax" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "averaged.safetensors").exists()


def test_scores_of_a_command_are_no_predictions(run: Run, jobs: dict[str, Job], tmp_path: Path):
    options = ("--score-cmd", f"{sys.executable} -c 'print(1.0)'", "--last", 3, "--no-baselines")
    done = run("swag", jobs["mlp"].folder, *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["predictions"] == {}
    assert any("needs a task with a loss, not scores alone" in note for note in report["warnings"])
    done = run("swag", jobs["mlp"].folder, *options, "--scale", "auto", "--force")
    assert done.returncode == 2 and "a task with a loss, not scores alone" in done.stderr


def test_the_report_shows_a_row_for_each_model(run: Run, jobs: dict[str, Job], tmp_path: Path):
    done = run(*words(jobs["mlp"], task(tmp_path, PREDICT), "--draws", 3), COLUMNS="200")
    assert done.returncode == 0 and done.stdout == "averaged.safetensors\n"
    assert re.search(r"predictions, validation data +nll +accuracy +brier +ece", done.stderr)
    for row in ("last", "swa", "swag: 3 draws, scale 0.5"):
        assert re.search(rf"^{row}( +\d\.\d{{2,4}}){{4}} *$", done.stderr, re.MULTILINE), row
    assert "15 bins of equal width" in done.stderr


def test_candidates_that_hardly_differ_are_said_to_give_the_mean(run: Run, jobs: dict[str, Job], tmp_path: Path):
    """As after a decay of the learning rate to 0."""
    (tmp_path / "still").mkdir()
    state = torch.load(jobs["mlp"].folder / "step-70.pt")
    for step in range(1, 6):
        torch.save({n: t * (1 + 1e-6 * step) for n, t in state.items()}, tmp_path / f"still/step-{step}.pt")
    done = run("swag", "still", "--task", task(tmp_path, PREDICT), "--draws", 3)
    assert done.returncode == 0 and "the average over draws is the mean" in done.stderr, done.stderr
    assert "the average over draws is the mean" not in run(*words(jobs["mlp"], tmp_path / "mine.py")).stderr


def test_no_draws_score_the_mean_alone(run: Run, jobs: dict[str, Job], tmp_path: Path):
    done = run(*words(jobs["mlp"], task(tmp_path, PREDICT), "--draws", 0, "--json"))
    assert json.loads(done.stdout)["predictions"] == {}
    done = run(*words(jobs["mlp"], tmp_path / "mine.py", "--draws", 0, "--scale", "auto"))
    assert done.returncode == 2 and "so --draws cannot be 0" in done.stderr

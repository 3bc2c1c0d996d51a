"""Search on quantized candidates: the output is exact, its score is its own, and deviations cause warnings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Job, Run
from safetensors.torch import load_file

import ckptavg
from ckptavg.candidates import plan
from ckptavg.candidates.plan import EXACT, FEWER, Plan
from ckptavg.coefficients import Coefficients

SEARCHES: dict[str, dict[str, Any]] = {
    "sewa": {"steps": 100},
    "twa": {"epochs": 5},
    "twa by layer": {"epochs": 5, "layerwise": True},
}
BITS = (EXACT, *FEWER)
FEW = (32, 4, 1)


@pytest.fixture(scope="session")
def searched(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], ckptavg.Result]:
    """Results of each search on the last twelve candidates at the bits in FEW; SeWA at all in BITS."""
    folder = tmp_path_factory.mktemp("searched")
    return {
        (name, bits): getattr(ckptavg, name.split()[0])(
            digits, task=TASK, last=12, bits=bits, baselines=False, output=folder / f"{name}-{bits}", **settings
        )
        for name, settings in SEARCHES.items()
        for bits in (BITS if name == "sewa" else FEW)
    }


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "bits"), [(name, bits) for name in SEARCHES for bits in ((16, 8, 4) if name == "sewa" else (4,))]
)
def test_from_four_bits_on_the_exact_average_scores_within_the_noise_of_a_search_at_full_precision(
    searched: dict[tuple[str, int], ckptavg.Result], name: str, bits: int
):
    exact, found = searched[name, 32].scores["val"], searched[name, bits].scores["val"]
    assert abs(found.value - exact.value) <= exact.noise and abs(found.loss - exact.loss) <= exact.loss_noise
    assert bits == 4 or not any("--bits" in warning for warning in searched[name, bits].warnings)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sewa", "twa"])
@pytest.mark.parametrize("bits", [4, 1])
def test_a_warning_reports_a_wrong_score_or_a_large_rounding_error(
    searched: dict[tuple[str, int], ckptavg.Result], jobs: dict[str, Job], name: str, bits: int
):
    result = searched[name, bits]
    coefficients = Coefficients((tuple(one.coefficient for one in result.candidates),))
    with jobs["cnn"].mixture(last=12, bits=bits) as coarse:
        coarse_score = coarse.score(coefficients)
    exact = result.scores["val"]
    value_off = abs(coarse_score.value - exact.value) > exact.noise
    loss_off = abs(coarse_score.loss - exact.loss) > exact.loss_noise
    warned = any(f"at --bits {bits}" in warning for warning in result.warnings)
    assert warned == (value_off or loss_off or result.matrix.error > 0.6)


def test_the_report_warns_about_one_bit(searched: dict[tuple[str, int], ckptavg.Result]):
    (warning,) = (w for w in searched["twa", 1].warnings if "--bits" in w)
    assert re.search(r"6\d% of the candidates' differences was lost to rounding. Search with more bits", warning)


def test_the_report_warns_if_the_exact_average_scores_differently(digits: Path, tmp_path: Path):
    found = ckptavg.sewa(digits, k=2, task=TASK, last=12, bits=1, baselines=False, output=tmp_path / "two")
    (warning,) = (w for w in found.warnings if "--bits" in w)
    assert re.search(r"misjudged the average \((loss|score) off by [+-]0\.\d+, noise 0\.\d+", warning)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_file_is_the_exact_average_at_any_number_of_bits(
    searched: dict[tuple[str, int], ckptavg.Result], digits: Path, run: Run, name: str
):
    result = searched[name, 4]
    assert result.output is not None
    done = run("verify", result.output.path, "--sources", digits)
    assert done.returncode == 0, done.stderr
    # the reported score of the file equals that of plain torch
    import task as demo_task

    model = demo_task.model()
    model.load_state_dict(load_file(result.output.path))
    model.eval()
    with torch.no_grad():
        hits = torch.cat([demo_task.metric(model, batch) for batch in demo_task.val_dataloader()])
    assert result.scores["val"].metric == pytest.approx(float(hits.mean()), abs=1e-6)


def test_the_report_contains_memory_and_rounding_error(searched: dict[tuple[str, int], ckptavg.Result]):
    parameters = 10_124
    for bits in BITS:
        matrix = searched["sewa", bits].matrix
        assert matrix is not None and matrix.bits == bits
        per_element = matrix.bytes / (12 * parameters)
        assert per_element == pytest.approx(4 if bits == 32 else bits / 8 + 8 / 128, rel=0.12)  # groups are padded
    errors = [searched["sewa", bits].matrix.error for bits in BITS]  # pyright: ignore
    assert errors[0] == 0 and errors == sorted(errors)


def test_scores_of_the_exact_average_are_cached_separately(jobs: dict[str, Job]):
    both = Coefficients.uniform([1, 4], 5)
    with jobs["cnn"].mixture(last=5) as exact, jobs["cnn"].mixture(last=5, bits=2) as coarse:
        assert coarse.exact_score(both, "val").loss == pytest.approx(exact.score(both).loss, rel=1e-5)
        assert coarse.score(both).loss != pytest.approx(exact.score(both).loss, rel=1e-3)
        spent = coarse.cost().forward_batches
        coarse.exact_score(both, "val")
        coarse.score(both)
        assert coarse.cost().forward_batches == spent


def test_auto_selects_the_most_bits_that_fit(monkeypatch: pytest.MonkeyPatch, digits: Path, tmp_path: Path):
    cpu = torch.device("cpu")

    def most(free: int) -> int:
        monkeypatch.setattr(plan, "free_memory", lambda device: free)
        memory = Plan(n=10, elements=1000, size=4000, gradient=4000, group_size=128, offload="none", device=cpu)
        return memory.at("auto").bits

    # two model-sized vectors and 10 rows; fewer bits need the mean as well
    assert most(round((8000 + 40_000) / 0.7) + 2) == 32 and most(round((8000 + 40_000) / 0.7) - 9) == 16
    sizes = [round((8000 + 4000 + 10_000 * (bits / 8 + 8 / 128)) / 0.7) + 2 for bits in BITS[1:]]
    assert [most(size) for size in sizes] == list(BITS[1:]) and most(0) == 1
    monkeypatch.undo()
    assert plan.free_memory(cpu) > 0
    result = ckptavg.sewa(digits, task=TASK, last=3, k=2, steps=2, bits="auto", baselines=False, output=tmp_path / "x")
    assert result.matrix is not None and result.matrix.bits == 32

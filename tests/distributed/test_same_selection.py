"""Workers together find what one process finds: every strategy, whatever they divide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Job

from ckptavg.strategies import strategies
from distributed.program import carry_out

HERE = Path(__file__).parent
Found = Mapping[str, Mapping[str, Any]]
# what learns by gradients adds float64 numbers in another order; everything else is the same to the last bit
LEARNED = {
    "sewa": "sewa:k=3:steps=6",
    "twa": "twa:epochs=2",
    "twa-layers": "twa:epochs=1:layerwise:on=train",
    "twa-patience": "twa:epochs=2:patience=1",
    "twa-quadratic": "twa:solver=quadratic",
    "sewa-quadratic": "sewa:k=3:solver=quadratic",
    "whole": "twa:epochs=2:on=train",
}
SAME = {
    "aswa": "aswa",
    "aswa-early": "aswa:early_reject",
    "aswa-batchnorm": "aswa",
    "soup": "soup",
    "soup-batches": "soup",
    "soup-candidates": "soup",
    "best": "best",
    "swa": "swa",
    "swa-bfloat16": "swa",
    "lawa": "lawa:k=2",
    "ema": "ema",
    "last": "last",
    "bits": "best",
    "compare": "compare,swa,aswa,soup",
}


def plan(jobs: dict[str, Job]) -> list[dict[str, Any]]:
    """Most on the transformer in double precision; batches of BatchNorm and of awkward loaders are not divided."""
    other: dict[str, tuple[str, Path | None, dict[str, Any]]] = {
        "aswa-batchnorm": ("cnn", jobs["cnn"].task, {"baselines": False}),
        "aswa-early": ("mlp", jobs["mlp"].task, {"parallel": "batches"}),
        "whole": ("mlp", HERE / "loaders_task.py", {}),
        "soup-batches": ("transformer", HERE / "double_task.py", {"parallel": "batches"}),
        "soup-candidates": ("transformer", HERE / "double_task.py", {"parallel": "candidates"}),
        "swa-bfloat16": ("cnn", None, {"dtype": "bfloat16"}),
        "bits": ("transformer", HERE / "double_task.py", {"bits": 4}),
        "compare": ("transformer", jobs["transformer"].task, {"holdout": 0.5}),
    }
    found: list[dict[str, Any]] = []
    for name, strategy in {**LEARNED, **SAME}.items():
        job, task, options = other.get(name, ("transformer", HERE / "double_task.py", {}))
        found.append(
            {
                "name": name, "ckpts": str(jobs[job].folder), "strategy": strategy,
                "task": task and str(task), "options": {"last": 5, **options},
            }
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def alone(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Found:
    return {one["name"]: one for one in carry_out(plan(jobs), tmp_path_factory.mktemp("alone"))}


@pytest.fixture(scope="module")
def ranks(
    jobs: dict[str, Job], together: Callable[..., list[list[dict[str, Any]]]], tmp_path_factory: pytest.TempPathFactory
) -> list[Found]:
    found = together(2, plan(jobs), tmp_path_factory.mktemp("two"))
    return [{one["name"]: one for one in rank} for rank in found]


@pytest.fixture(scope="module")
def three(
    jobs: dict[str, Job], together: Callable[..., list[list[dict[str, Any]]]], tmp_path_factory: pytest.TempPathFactory
) -> list[Found]:
    """Some of it by three workers, by whom nothing here can be divided without remainder."""
    wanted = [
        one for one in plan(jobs) if one["name"] in ("sewa", "twa", "twa-quadratic", "soup-batches", "whole", "swa")
    ]
    found = together(3, wanted, tmp_path_factory.mktemp("three"))
    return [{one["name"]: one for one in rank} for rank in found]


def test_every_strategy_is_here():
    tried = {strategy.split(":")[0] for strategy in {**LEARNED, **SAME}.values()}
    assert tried - {"compare,swa,aswa,soup"} == set(strategies())


def test_every_worker_finds_the_same(ranks: list[Found], three: list[Found]):
    assert ranks[0] == ranks[1] and three[0] == three[1] == three[2]


@pytest.mark.parametrize("name", SAME)
def test_a_selection_by_scores_is_that_of_one_process_to_the_last_bit(alone: Found, ranks: list[Found], name: str):
    """Scores, costs and the file's bytes too."""
    one, two = dict(alone[name]), dict(ranks[0][name])
    if name == "aswa-early":  # both workers' batches of a turn are done before they know that it was enough
        assert 0 <= two["cost"]["forward_batches"] - one["cost"]["forward_batches"] <= one["cost"]["evaluations"]
        two["cost"] = one["cost"]
    assert two == one


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_is_what_one_process_learns_to_rounding(
    alone: Found, ranks: list[Found], three: list[Found], name: str
):
    for found in (ranks[0], three[0]):
        if name in found:
            one, two = alone[name], found[name]
            # some dozens of steps with sums of float64 (float32 where the loader decides): some hundred ulps
            tolerance = 1e-12 if name != "whole" else 1e-4
            assert flat(coefficients(two)) == pytest.approx(flat(coefficients(one)), rel=tolerance, abs=tolerance)
            assert chosen(two) == chosen(one)
            losses = [split["loss"] for split in (two["scores"]["val"], one["scores"]["val"])]
            assert math.isclose(*losses, rel_tol=tolerance)
            if "quadratic" not in name:  # a curvature that is given up at the first batch is given up by all workers
                assert two["cost"] == one["cost"]


def test_three_workers_choose_what_one_process_chooses(alone: Found, three: list[Found]):
    for name in ("soup-batches", "swa"):
        assert three[0][name] == alone[name]


def test_the_report_says_which_batches_could_not_be_divided(alone: Found, ranks: list[Found]):
    assert not any("whole batches" in note for note in alone["whole"]["warnings"])
    assert not any("whole batches" in note for note in ranks[0]["twa"]["warnings"])


def coefficients(report: Mapping[str, Any]) -> list[Any]:
    return [candidate["coefficient"] for candidate in report["candidates"]]


def chosen(report: Mapping[str, Any]) -> list[bool]:
    return [any(flat(coefficient)) for coefficient in coefficients(report)]


def flat(value: Any) -> list[float]:
    return [inner for item in value for inner in flat(item)] if isinstance(value, list | tuple) else [value]

"""Several workers find the same selection as one process: every strategy, for every division of work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Job

from ckptavg.strategies import strategies
from distributed import linear_task, norm_task

HERE = Path(__file__).parent
Found = Mapping[str, Mapping[str, Any]]
# learning by gradients sums float64 numbers in another order; all other results are equal to the last bit
LEARNED = {
    "sewa": "sewa:k=3:steps=6",
    "twa": "twa:epochs=2",
    "twa-layers": "twa:epochs=1:layerwise:on=train",
    "twa-patience": "twa:epochs=2:patience=1",
    "twa-quadratic": "twa:solver=quadratic",
    "sewa-quadratic": "sewa:k=3:solver=quadratic",
    # strategies that compute the same gradients
    "compare-quadratic": "compare,sewa:k=3:solver=quadratic,sewa:k=3:solver=quadratic:verify=3",
    "whole": "twa:epochs=2:on=train",
    "whole-batchnorm": "sewa:k=2:steps=4",
}
# model and candidates in shards: also with BatchNorm modules and odd dimensions
SHARDED = {
    "shard-sewa": "sewa:k=3:steps=4",
    "shard-layers": "twa:epochs=1:layerwise",
    "shard-soup": "soup",
    "shard-batchnorm": "aswa",
    "shard-4-bits": "twa:epochs=1",
    "shard-disk": "twa:epochs=1",
    "shard-disk-soup": "soup",
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
    "linear": "twa:constraint=linear",
    "bits": "best",
    "metrics": "compare,swa,aswa,soup",
    "compare": "compare,swa,aswa,soup",
}
# strategies not listed above must select the same with their defaults
LISTED = {spec.split(":")[0] for spec in (*LEARNED.values(), *SAME.values())}
SAME |= {name: name for name in strategies() if name not in LISTED}


@pytest.fixture(scope="module")
def plan(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the runs: most on the transformer in double precision; BatchNorm and custom loaders are not divided."""
    norm = tmp_path_factory.mktemp("norm")
    norm_task.train(norm)
    shards = tmp_path_factory.mktemp("shards")
    linear_task.save(shards)
    double = jobs["transformer"].folder, HERE / "double_task.py"
    moons = jobs["mlp"].folder, jobs["mlp"].task
    normed = norm, HERE / "norm_task.py"
    other: dict[str, tuple[tuple[Path, Path | None], dict[str, Any]]] = {
        "aswa-batchnorm": (normed, {}),
        "aswa-early": (moons, {"parallel": "batches"}),
        "whole": ((jobs["mlp"].folder, HERE / "loaders_task.py"), {}),
        "whole-batchnorm": (normed, {}),
        "soup-batches": (double, {"parallel": "batches"}),
        "soup-candidates": (double, {"parallel": "candidates"}),
        "swa-bfloat16": ((double[0], None), {"dtype": "bfloat16"}),
        "shard-batchnorm": (normed, {}),
        "shard-4-bits": (double, {"bits": 4}),
        "shard-disk": (double, {"offload": "disk"}),
        "shard-disk-soup": (double, {"offload": "disk"}),
        "bits": (double, {"bits": 4}),
        "linear": ((shards, HERE / "linear_task.py"), {}),
        "metrics": ((moons[0], HERE / "metrics_task.py"), {"holdout": 0.5}),
        "compare": ((jobs["transformer"].folder, jobs["transformer"].task), {"holdout": 0.5}),
    }
    found: list[dict[str, Any]] = []
    for name, strategy in {**LEARNED, **SHARDED, **SAME}.items():
        (folder, task), options = other.get(name, (double, {}))
        found.append(
            {
                "name": name, "ckpts": str(folder), "strategy": strategy, "task": task and str(task),
                "options": {"last": 5, "shard": name in SHARDED, **options},
            }
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def alone(
    plan: list[dict[str, Any]],
    together: Callable[..., list[list[dict[str, Any]]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Found:
    """Run in one process that is started like the others: the last bits of a network's loss depend on earlier work."""
    whole = [{**one, "options": {**one["options"], "shard": False}} for one in plan]
    (found,) = together(1, whole, tmp_path_factory.mktemp("alone"))
    return {one["name"]: one for one in found}


@pytest.fixture(scope="module")
def ranks(
    plan: list[dict[str, Any]],
    together: Callable[..., list[list[dict[str, Any]]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Found]:
    found = together(2, plan, tmp_path_factory.mktemp("two"))
    return [{one["name"]: one for one in rank} for rank in found]


@pytest.fixture(scope="module")
def three(
    plan: list[dict[str, Any]],
    together: Callable[..., list[list[dict[str, Any]]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Found]:
    """Run a part of the plan on three workers, which divide nothing here without remainder."""
    wanted = [
        one for one in plan if one["name"] in ("sewa", "twa", "twa-quadratic", "soup-batches", "swa", "shard-layers")
    ]
    found = together(3, wanted, tmp_path_factory.mktemp("three"))
    return [{one["name"]: one for one in rank} for rank in found]


def test_every_strategy_is_here():
    tried = {strategy.split(":")[0] for strategy in {**LEARNED, **SAME}.values()}
    assert {name for name in tried if not name.startswith("compare,")} == set(strategies())


def test_every_worker_finds_the_same(ranks: list[Found], three: list[Found]):
    for found in (ranks, three):
        assert [same(one) for one in found[1:]] == [same(found[0])] * (len(found) - 1)


@pytest.mark.parametrize("name", SAME)
def test_a_selection_by_scores_is_that_of_one_process_to_the_last_bit(alone: Found, ranks: list[Found], name: str):
    """Scores, costs and the file's bytes are equal as well."""
    one, two = dict(alone[name]), dict(ranks[0][name])
    if name == "aswa-early":  # the batches of both workers in a turn are done before the threshold test
        assert 0 <= two["cost"]["forward_batches"] - one["cost"]["forward_batches"] <= one["cost"]["evaluations"]
        two["cost"] = one["cost"]
    assert two == one


@pytest.mark.parametrize("name", LEARNED)
def test_learned_coefficients_are_those_of_one_process_to_rounding(
    alone: Found, ranks: list[Found], three: list[Found], name: str
):
    for found in (ranks[0], three[0]):
        if name in found:
            one, two = alone[name], found[name]
            # some dozens of steps with sums of float64 (float32 if the loader decides): some hundred ulps
            tolerance = 1e-12 if name not in ("whole", "whole-batchnorm") else 1e-4
            assert flat(coefficients(two)) == pytest.approx(flat(coefficients(one)), rel=tolerance, abs=tolerance)
            assert chosen(two) == chosen(one)
            losses = [split["loss"] for split in (two["scores"]["val"], one["scores"]["val"])]
            assert math.isclose(*losses, rel_tol=tolerance)
            if "quadratic" not in name:  # a curvature estimate abandoned at the first batch is abandoned by all workers
                assert two["cost"] == one["cost"]


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_gives_what_the_whole_one_gives(
    alone: Found, ranks: list[Found], three: list[Found], name: str
):
    for found in (ranks[0], three[0]):
        if name in found:
            one, two = alone[name], found[name]
            # at low bit widths other elements share a scale: as many, except where shards begin
            tolerance = 1e-12 if "bits" not in name else 0.05
            assert flat(coefficients(two)) == pytest.approx(flat(coefficients(one)), rel=tolerance, abs=tolerance)
            losses = [split["loss"] for split in (two["scores"]["val"], one["scores"]["val"])]
            assert math.isclose(*losses, rel_tol=min(tolerance, 1e-3))
            assert two["matrix"]["error"] == pytest.approx(one["matrix"]["error"], rel=0.05)
            assert two["cost"] == one["cost"]


def test_a_worker_has_its_part_of_the_candidates(alone: Found, ranks: list[Found]):
    for name in ("shard-sewa", "shard-4-bits"):
        one, two = (found[name]["matrix"]["bytes"] for found in (alone, ranks[0]))
        assert 0.5 <= two / one < 0.53  # more than half if a dimension is odd, and due to packing at low bit widths


def test_three_workers_choose_what_one_process_chooses(alone: Found, three: list[Found]):
    for name in ("soup-batches", "swa"):
        assert three[0][name] == alone[name]


def test_the_report_names_batches_that_could_not_be_divided(alone: Found, ranks: list[Found]):
    assert not any("whole batches" in note for note in alone["whole"]["warnings"])
    assert not any("whole batches" in note for note in ranks[0]["twa"]["warnings"])
    (said,) = (note for note in ranks[0]["whole-batchnorm"]["warnings"] if "whole batches" in note)
    assert "BatchNorm" in said


def same(found: Found) -> Found:
    """Compare everything except how many bytes of a matrix one worker holds."""
    return {name: {**one, "matrix": None} for name, one in found.items()}


def coefficients(report: Mapping[str, Any]) -> list[Any]:
    return [candidate["coefficient"] for candidate in report["candidates"]]


def chosen(report: Mapping[str, Any]) -> list[bool]:
    return [any(flat(coefficient)) for coefficient in coefficients(report)]


def flat(value: Any) -> list[float]:
    return [inner for item in value for inner in flat(item)] if isinstance(value, list | tuple) else [value]

"""ASWA against a literal reference on three real trajectories, by hand, and with early-stopped scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Job, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quadratic import Quadratic
from torch import Tensor
from torch.optim.swa_utils import update_bn

from ckptavg.coefficients import Coefficients
from ckptavg.errors import UsageError
from ckptavg.score import Score
from ckptavg.strategies.aswa import ASWA

State = dict[str, Tensor]


def reference(states: Sequence[State], score: Callable[[State], float], *, hard: bool) -> list[int]:
    """Return the accepted list by methods.md: real weights, a real rollback, no coefficients."""
    average, n, v, accepted = states[0], 1, score(states[0]), [0]
    for i, w in enumerate(states[1:], 1):
        ahead = {
            name: (n * average[name] + w[name]) / (n + 1) if w[name].is_floating_point() else w[name] for name in w
        }
        v_ahead = score(ahead)
        alone = score(w) if hard else -float("inf")
        if alone > v_ahead and alone > v:
            average, n, v, accepted = w, 1, alone, [i]
        elif v_ahead >= v:
            average, n, v, accepted = ahead, n + 1, v_ahead, [*accepted, i]
    return accepted


def scorer(job: Job) -> Callable[[State], float]:
    """Return a function that scores a state dict in plain torch, with BatchNorm recomputed."""
    model = job.module.model()
    torch.manual_seed(0)
    training = list(job.module.train_dataloader())

    def score(state: State) -> float:
        model.load_state_dict({name: t.to(model.state_dict()[name].dtype) for name, t in state.items()})
        model.eval()
        update_bn((batch[0] for batch in training), model)
        model.eval()
        measure = getattr(job.module, "metric", None)
        with torch.no_grad():
            each = [
                -job.module.loss(model, batch) if measure is None else measure(model, batch)
                for batch in job.module.val_dataloader()
            ]
        return float(torch.cat(each).double().mean())

    return score


@pytest.mark.thorough
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("name", ["cnn", "mlp", "transformer"])
def test_accepted_list_matches_the_reference(jobs: dict[str, Job], name: str, hard: bool):
    job = jobs[name]
    paths = sorted(job.folder.glob("*.pt"), key=lambda path: int(re.findall(r"\d+", path.name)[0]))
    states = [torch.load(path) for path in paths]
    states = [state.get("state_dict", state) for state in states]
    states = [{k: t.double() if t.is_floating_point() else t for k, t in state.items()} for state in states]
    expected = reference(states, scorer(job), hard=hard)
    with job.mixture() as mixture:
        learned = ASWA(hard_updates=hard).learn(mixture)
    assert list(learned.coefficients.selected) == expected
    assert set(learned.coefficients.values[0]) <= {0, 1 / len(expected)}
    decisions = learned.columns["decision"]
    assert decisions[0] == "start" and ("hard" in decisions) <= hard and "soft" in decisions
    assert "reject" in decisions or name == "transformer"  # whose score rises at every candidate


class Table:
    """An objective whose scores are looked up: subset of candidates → value."""

    def __init__(self, n: int, values: dict[tuple[int, ...], float]) -> None:
        self.n, self.values = n, values
        self.asked: list[tuple[int, ...]] = []

    def prefetch(self, coefficients: object) -> None:
        pass

    def score(self, coefficients: Coefficients) -> Score:
        self.asked.append(coefficients.selected)
        value = self.values[coefficients.selected]
        return Score(value=value, loss=-value, metric=None, examples=1)

    def progress(self, *_: Any, **__: Any) -> None:
        """Ignore progress."""


def aswa(values: dict[tuple[int, ...], float], n: int, **settings: Any) -> tuple[tuple[int, ...], list[Any], Table]:
    table = Table(n, values)
    learned = ASWA(**settings).learn(table)  # pyright: ignore[reportArgumentType]
    return learned.coefficients.selected, list(learned.columns["decision"]), table


def test_each_rule_by_hand():
    values = {
        (0,): 1.0,
        (0, 1): 1.0, (1,): 1.0,  # a tie is a soft update
        (0, 1, 2): 0.9, (2,): 0.95,  # rejected: the average is below, the candidate not above
        (0, 1, 3): 1.2, (3,): 1.3,  # hard: the candidate is above both
        (3, 4): 1.4, (4,): 0.1,  # n restarted at 1: the average is of two
        (3, 4, 5): 1.3, (5,): 1.35,  # rejected: above the look-ahead, not above the average
    }  # fmt: skip
    chosen, decisions, _ = aswa(values, 6)
    assert decisions == ["start", "soft", "reject", "hard", "soft", "reject"] and chosen == (3, 4)
    values |= {(0, 1, 3, 4): 1.1, (0, 1, 3, 5): 1.3}
    chosen, decisions, table = aswa(values, 6, hard_updates=False)
    assert decisions == ["start", "soft", "reject", "soft", "reject", "soft"] and chosen == (0, 1, 3, 5)
    assert all(len(asked) > 1 for asked in table.asked[1:])  # only the first candidate is scored alone


def test_the_average_is_never_scored_again():
    values = {(0,): 1.0, (0, 1): 1.1, (1,): 0, (0, 1, 2): 1.2, (2,): 0}
    _, _, table = aswa(values, 3)
    assert sorted(table.asked) == sorted(values)


def test_tolerated_losses_do_not_add_up():
    values = {(0,): 1.0, (0, 1): 0.95, (1,): 0, (0, 1, 2): 0.92, (2,): 0, (0, 1, 2, 3): 0.89, (3,): 0}
    assert aswa(values, 4, tolerance=0.1)[1] == ["start", "soft", "soft", "reject"]
    values |= {(0, 2): 0.5, (0, 3): 0.5}
    assert aswa(values, 4)[1] == ["start", "reject", "reject", "reject"]


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_below_zero_is_refused(tolerance: float):
    with pytest.raises(UsageError, match="--tolerance"):
        ASWA(tolerance=tolerance)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([0.0, 0.05]), st.booleans())
def test_early_rejection_by_the_objective_makes_the_same_decisions(seed: int, n: int, tolerance: float, hard: bool):
    full = ASWA(tolerance=tolerance, hard_updates=hard).learn(Quadratic(n=n, d=3, seed=seed))
    early = ASWA(tolerance=tolerance, hard_updates=hard, early_reject=True).learn(Quadratic(n=n, d=3, seed=seed))
    assert full.columns["decision"] == early.columns["decision"] and full.coefficients == early.coefficients


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.01]), st.booleans())
def test_stopping_early_changes_no_decision_and_saves_batches(
    jobs: dict[str, Job], seed: int, tolerance: float, hard: bool
):
    """On the MLP's real metric, over permutations of its candidates."""
    order = torch.randperm(14, generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[tuple[Any, int]] = []
    for early in (False, True):
        with jobs["mlp"].mixture() as mixture:
            shuffled = [mixture.mixed.checkpoints[i] for i in order]
            mixture = type(mixture)(mixture.task, shuffled, mixture.run)
            learned = ASWA(tolerance=tolerance, hard_updates=hard, early_reject=early).learn(mixture)
            found.append(((learned.coefficients, learned.columns["decision"]), mixture.cost().forward_batches))
    assert found[0][0] == found[1][0] and found[1][1] <= found[0][1]


def test_early_rejection_needs_bounds(run: Run, jobs: dict[str, Job]):
    done = run("aswa", jobs["cnn"].folder, "--task", jobs["cnn"].task, "--early-reject")
    assert done.returncode == 2 and "metric_bounds = (0.0, 1.0)" in done.stderr

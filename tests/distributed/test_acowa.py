"""The recipe of ACOWA.

Shape suffixes: B = points, D = features, P = shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import acowa
import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize

PENALTY = 0.03
CLOSE = {"rel": 2e-2, "abs": 1e-2}  # LIBLINEAR stops at a thousandth of the initial slope


@pytest.fixture(scope="module")
def points() -> acowa.Points:
    """Ninety points of six features, of which three matter, one weakly."""
    random = np.random.default_rng(0)
    x_BD = random.normal(size=(90, 6)) * (random.random((90, 6)) < 0.6)
    y_B = np.where(x_BD @ [2.0, -1.0, 0.3, 0, 0, 0] + 0.5 * random.normal(size=90) > 0, 1, -1)
    return acowa.Points(sparse.csr_matrix(x_BD), y_B, np.ones(90))


def objective(w_D: Any, points: acowa.Points, count: int, penalty: float, v_D: Any) -> float:
    """(1/count)·Σ_i s_i·log(1 + exp(−y_i·w·x_i)) + penalty·Σ_j |w_j|/v_j."""
    losses_B = np.logaddexp(0, -points.y_B * (points.x_BD.toarray() @ w_D))
    return float(points.s_B @ losses_B / count + penalty * np.sum(np.abs(w_D) / v_D))


def solved(points: acowa.Points, count: int, penalty: float, v_D: Any) -> Any:
    """Minimise the objective as a smooth problem of twice the size: w = a − b, a ≥ 0, b ≥ 0."""
    x_BD, d = points.x_BD.toarray(), len(v_D)

    def value(ab: Any) -> tuple[float, Any]:
        margins_B = points.y_B * (x_BD @ (ab[:d] - ab[d:]))
        slope_D = -x_BD.T @ (points.s_B * points.y_B / (1 + np.exp(margins_B))) / count
        penalties = np.concatenate([penalty / v_D, penalty / v_D])
        loss = points.s_B @ np.logaddexp(0, -margins_B) / count
        return loss + penalties @ ab, np.concatenate([slope_D, -slope_D]) + penalties

    result = minimize(value, np.zeros(2 * d), jac=True, method="L-BFGS-B", bounds=[(0, None)] * (2 * d), tol=1e-14)
    return result.x[:d] - result.x[d:]


def literal(shards: list[acowa.Points], penalty: float) -> Any:
    """Both rounds of ACOWA by dense loops and another solver."""
    centres = []
    for x_BD, y_B, _ in shards:
        for label in (-1, 1):
            chosen = [row for row, y in zip(x_BD.toarray(), y_B, strict=True) if y == label]
            if chosen:
                centres.append((np.mean(chosen, axis=0), label, 0.1 * len(chosen)))
    more = [np.array(each) for each in zip(*centres, strict=True)]
    augmented = [
        acowa.Points(
            sparse.csr_matrix(np.vstack([x_BD.toarray(), more[0]])), np.append(y_B, more[1]), np.append(s_B, more[2])
        )
        for x_BD, y_B, s_B in shards
    ]
    d = shards[0].x_BD.shape[1]
    first = [solved(a, len(s.y_B), penalty, np.ones(d)) for a, s in zip(augmented, shards, strict=True)]
    v_D = np.array([1 + 10 * sum(abs(w_D[j]) > 1e-6 for w_D in first) / len(shards) for j in range(d)])
    scaled = penalty / np.mean(1 / v_D)
    assert np.mean(scaled / v_D) == pytest.approx(penalty) and len(set(v_D)) > 2
    return np.stack([solved(a, len(s.y_B), scaled, v_D) for a, s in zip(augmented, shards, strict=True)])


def test_one_shard_without_weights_is_the_plain_l1_fit(points: acowa.Points):
    (w_D,) = acowa.owa([points], PENALTY)
    assert w_D == pytest.approx(solved(points, 90, PENALTY, np.ones(6)), **CLOSE)
    assert 0 < np.count_nonzero(w_D) < 6


def test_weights_of_a_scaled_fit_are_those_of_the_features_as_they_are(points: acowa.Points):
    v_D = np.array([11.0, 1.0, 6.0, 1.0, 2.0, 11.0])
    weighted = points._replace(s_B=np.linspace(0.1, 2, 90))
    w_D = acowa.fit(weighted, 50, PENALTY, v_D)
    wanted_D = solved(weighted, 50, PENALTY, v_D)
    best = objective(wanted_D, weighted, 50, PENALTY, v_D)
    assert objective(w_D, weighted, 50, PENALTY, v_D) == pytest.approx(best, rel=1e-4)
    assert weighted.x_BD @ w_D == pytest.approx(weighted.x_BD @ wanted_D, **CLOSE)


def test_every_feature_has_its_penalty_the_last_too(points: acowa.Points):
    for j in range(6):
        v_D = np.ones(6)
        v_D[j] = 1e-3
        assert acowa.fit(points, 90, PENALTY, v_D)[j] == 0
    assert acowa.fit(points._replace(x_BD=points.x_BD[:, ::-1]), 90, PENALTY)[::-1] == pytest.approx(
        acowa.fit(points, 90, PENALTY), **CLOSE
    )


def test_centroids_are_the_means_of_the_classes_with_a_tenth_of_their_counts(points: acowa.Points):
    x_BD, y_B, s_B = acowa.centroids(points)
    assert y_B.tolist() == [-1, 1] and s_B.tolist() == pytest.approx([0.1 * np.sum(points.y_B == y) for y in (-1, 1)])
    for row, label in zip(x_BD.toarray(), y_B, strict=True):
        assert row == pytest.approx(points.x_BD.toarray()[points.y_B == label].mean(axis=0))


def test_two_rounds_are_those_of_dense_loops_and_another_solver(points: acowa.Points):
    order = np.argsort(points.y_B[:30])  # the first shard has points of one class alone
    rows = [order[:12], np.arange(30, 60), np.concatenate([order[12:], np.arange(60, 90)])]
    shards = [points.at(some) for some in rows]
    assert len(set(shards[0].y_B)) == 1 and len(set(shards[2].y_B)) == 2
    assert acowa.acowa(shards, PENALTY) == pytest.approx(literal(shards, PENALTY), **CLOSE)


def test_shards_sample_and_test_share_no_point_except_that_the_sample_is_of_the_training():
    shards, sample, test = acowa.split(1000, 7, seed=3)
    train = np.concatenate(shards)
    assert sorted([*train, *test]) == list(range(1000)) and len(test) == 200
    assert len(set(sample)) == len(sample) == 80 and set(sample) <= set(train)
    assert len({shard for shard, rows in enumerate(shards) if set(rows) & set(sample)}) == 7


def test_a_file_in_svmlights_format_is_read(tmp_path: Path):
    (tmp_path / "data.svm").write_text("0 1:0.5\n1 2:1 3:2\n")
    x_BD, y_B, s_B = acowa.read(tmp_path / "data.svm")
    assert x_BD.toarray().tolist() == [[0.5, 0, 0], [0, 1, 2]] and y_B.tolist() == [-1, 1] and s_B.tolist() == [1, 1]

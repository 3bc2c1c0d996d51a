"""SWAG's Gaussian: the distribution of its draws against the paper's formula, computed literally by numpy.

Shape suffixes: N = candidates, D = parameters, K = kept deviations, S = draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference import swag_moments
from stored import averaged, stored
from torch import Tensor

from ckptavg.average import plan_output
from ckptavg.average.gaussian import Covariance, Gaussian, Posterior
from ckptavg.average.noise import Deviations, standard_normal, stream_key
from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.discover import discover
from ckptavg.checkpoints.kept import keeping
from ckptavg.checkpoints.torch_dtypes import TORCH
from ckptavg.coefficients import EVERYTHING
from ckptavg.runtime.workers import ALONE

N, DRAWS = 6, 10_000
SETTINGS: Mapping[str, tuple[int, Covariance]] = {
    "running": (4, "running"), "running, all": (N, "running"), "sample": (4, "sample"), "sample, all": (N, "sample"),
    "diagonal": (0, "running"),
}  # fmt: skip


def gaussian(deviations: int = 3, covariance: Covariance = "running", scale: float = 0.5, seed: int = 0) -> Gaussian:
    return Gaussian(scale=scale, deviations=deviations, covariance=covariance, seed=seed)


def correlated(seed: int = 0) -> NDArray[np.float64]:
    """Return [N, 5] candidates drawn from a known Gaussian, as float32 holds them."""
    draws = np.random.default_rng(seed)
    factor = np.array([[2, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, -1, 0.5, 0, 0], [0.3, 0, 0, 2, 0], [1, 0, 0, 0, 0.1]])
    return (3 + draws.standard_normal((N, 5)) @ factor.T).astype(np.float32).astype(np.float64)


def split(w_ND: NDArray[np.float64]) -> list[dict[str, Tensor]]:
    """Return states of two tensors, of three and two parameters."""
    return [{"a": torch.tensor(w[:3]).float(), "b": torch.tensor(w[3:]).float()} for w in w_ND]


def drawn(posterior: Posterior, w_ND: NDArray[np.float64], sample: int) -> NDArray[np.float64]:
    """Return [D], a draw in float64, before it is rounded to the dtype of a file."""
    draw = posterior.draw(sample)
    noise = [draw.noise(name, 0, count) for name, count in (("a", 3), ("b", 2))]
    added_D = np.concatenate([np.zeros(3 - i) if z is None else z for i, z in enumerate(noise)])
    return np.array(draw.coefficients.values[0]) @ w_ND + added_D


def bytes_of(
    checkpoints: Sequence[Checkpoint], posterior: Posterior, sample: int = 1, *, dtype: str | None = None, **how: Any
) -> dict[str, Tensor]:
    """Return the tensors of a draw as they are written."""
    draw, specs = posterior.draw(sample), output_specs(checkpoints, dtype)
    data = {name: bytearray(spec.nbytes) for name, spec in specs.items()}
    for name, offset, part in weighted_average(checkpoints, draw.coefficients, specs, noise=draw.noise, **how):
        data[name][offset : offset + len(part)] = part
    return {name: torch.frombuffer(data[name], dtype=TORCH[s.dtype]).view(s.shape) for name, s in specs.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_have_the_mean_and_the_covariance_of_the_paper(tmp_path: Path, name: str):
    """Within five standard errors, √(C_ii/S) of a mean and √((C_ii C_jj + C_ij²)/S) of a covariance."""
    (k, covariance), w_ND = SETTINGS[name], correlated()
    posterior = Posterior.over(stored(tmp_path, split(w_ND)), gaussian(k, covariance))
    w_SD = np.stack([drawn(posterior, w_ND, sample) for sample in range(1, DRAWS + 1)])
    mean_D, cov_DD = swag_moments(w_ND, k, 0.5, running=covariance == "running")
    variance_D = np.diag(cov_DD)
    assert (np.abs(w_SD.mean(axis=0) - mean_D) < 5 * np.sqrt(variance_D / DRAWS)).all()
    errors_DD = np.sqrt((np.outer(variance_D, variance_D) + cov_DD**2) / DRAWS)
    assert (np.abs(np.cov(w_SD.T) - cov_DD) < 5 * errors_DD).all()


@pytest.mark.parametrize("n", [2, 5])
def test_all_deviations_from_the_mean_give_the_sample_covariance(n: int):
    w_ND = correlated()[:n]
    d_KD = np.array(gaussian(n, "sample").rows(n)) @ w_ND
    np.testing.assert_allclose(d_KD.T @ d_KD / (n - 1), np.cov(w_ND.T, ddof=1), rtol=1e-13, atol=1e-14)


def test_the_sample_covariance_does_not_depend_on_the_order_and_the_running_one_does():
    w_ND = correlated()
    covariances = {
        kind: [(lambda d: d.T @ d)(np.array(gaussian(N, kind).rows(N)) @ w) for w in (w_ND, w_ND[::-1])]
        for kind in ("running", "sample")
    }
    np.testing.assert_allclose(*covariances["sample"], rtol=1e-12, atol=1e-13)
    assert not np.allclose(*covariances["running"], rtol=0.1)


@pytest.mark.parametrize(("n", "k"), [(2, 2), (6, 3), (6, 6), (40, 20)])
@pytest.mark.parametrize("covariance", ["running", "sample"])
def test_the_low_rank_part_of_a_draw_is_a_sum_of_candidates(n: int, k: int, covariance: Covariance):
    """β sums to 1, and Σ β_j w_j is the mean and √(c/(K − 1)) Σ z_k d_k; a few roundings of numbers of order 1."""
    own, w_ND = gaussian(k, covariance, scale=0.7), np.random.default_rng(n).uniform(-1, 1, (n, 50))
    z_K = standard_normal(stream_key(own.seed, 3), 0, k)
    expected_D = w_ND.mean(axis=0)
    for z, i in zip(z_K, range(n - k, n), strict=True):
        before = w_ND[: i + 1] if covariance == "running" else w_ND
        expected_D = expected_D + math.sqrt(0.7 / (k - 1)) * z * (w_ND[i] - before.mean(axis=0))
    (row,) = own.coefficients(n, 3).values
    assert abs(math.fsum(row) - 1) < 1e-14
    np.testing.assert_allclose(np.array(row) @ w_ND, expected_D, rtol=0, atol=1e-14)


def test_the_running_coefficients_are_those_of_the_closed_form():
    """β_j = 1/N + √(c/(K − 1)) (z_j [j kept] − Σ_{i kept, i ≥ j} z_i/i)."""
    n, k, own = 7, 4, gaussian(4)
    z = dict(zip(range(n - k + 1, n + 1), standard_normal(stream_key(0, 1), 0, k), strict=True))
    factor = math.sqrt(own.scale / (k - 1))
    expected = [
        1 / n + factor * (z.get(j, 0) - sum(z_i / i for i, z_i in z.items() if i >= j)) for j in range(1, n + 1)
    ]
    assert own.coefficients(n, 1).values[0] == pytest.approx(expected, abs=1e-15)


def test_the_deviations_are_divided_by_the_number_kept_and_not_by_the_number_asked_for():
    """Two deviations kept: the variance of the draws is that of √(1/(2 − 1)), not of √(1/(20 − 1))."""
    w_N = np.array([0.0, 2.0])  # d_1 = 0 and d_2 = 1
    values = [np.array(gaussian(2, scale=1.0).coefficients(2, sample).values[0]) @ w_N for sample in range(1, 4001)]
    assert np.var(values) == pytest.approx(1, abs=5 * math.sqrt(2 / 4000))


def test_one_tensor_varies_with_another_in_the_low_rank_part_and_not_in_the_noise(tmp_path: Path):
    w_ND = correlated()
    posterior = Posterior.over(stored(tmp_path, split(w_ND)), gaussian(N, "sample"))
    rows_SN = np.array([posterior.draw(sample).coefficients.values[0] for sample in range(1, 4001)])
    noise = [[posterior.draw(sample).noise(name, 0, 2) for name in "ab"] for sample in range(1, 4001)]
    between = np.corrcoef((rows_SN @ w_ND).T)[:3, 3:]
    np.testing.assert_allclose(between, np.corrcoef(w_ND.T)[:3, 3:], rtol=0, atol=5 / math.sqrt(4000))
    assert np.abs(between).max() > 0.5
    a_S2, b_S2 = (np.stack([z[i] for z in noise if (z[i]) is not None]) for i in (0, 1))  # pyright: ignore
    assert np.abs(np.corrcoef(a_S2.T, b_S2.T)[:2, 2:]).max() < 5 / math.sqrt(4000)


def test_draws_are_reproducible_and_each_differs(tmp_path: Path):
    checkpoints = stored(tmp_path, split(correlated()))
    found = [
        tuple(bytes_of(checkpoints, Posterior.over(checkpoints, gaussian(seed=seed)), sample)["a"].tolist())
        for seed, sample in itertools.product((0, 1), (1, 2))
    ]
    again = bytes_of(checkpoints, Posterior.over(checkpoints, gaussian(seed=1)), 2)["a"].tolist()
    assert len({*found}) == 4 and tuple(again) == found[3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bytes_depend_neither_on_the_chunk_nor_on_the_threads(tmp_path: Path, dtype: torch.dtype):
    draws = torch.Generator().manual_seed(0)
    states = [{name: torch.randn(301, generator=draws).to(dtype) for name in "abc"} for _ in range(4)]
    checkpoints = stored(tmp_path, states)
    posterior = Posterior.over(checkpoints, gaussian())
    whole = bytes_of(checkpoints, posterior)
    for chunk, threads in ((1, 1), (7, 3), (100, 2)):
        part = bytes_of(checkpoints, posterior, chunk=chunk, threads=threads)
        assert all(torch.equal(part[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in "abc")


def test_a_tensor_has_the_same_noise_beside_other_tensors(tmp_path: Path):
    draws = torch.Generator().manual_seed(0)
    alone = [{"w": torch.randn(50, generator=draws)} for _ in range(4)]
    beside = [{"0": torch.randn(77, generator=draws), **state, "z": torch.ones(3) * i} for i, state in enumerate(alone)]
    found: list[Tensor] = []
    for name, states in (("alone", alone), ("beside", beside)):
        checkpoints = stored(tmp_path / name, states)
        found.append(bytes_of(checkpoints, Posterior.over(checkpoints, gaussian()))["w"])
    assert torch.equal(*found)


@pytest.mark.parametrize("target", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_draw_is_summed_in_float64_and_rounded_once(tmp_path: Path, dtype: torch.dtype, target: str | None):
    """Numpy's sum of mean, low-rank part and noise, rounded by numpy, or for bfloat16 to nearest even by hand."""
    draws = torch.Generator().manual_seed(0)
    states = [{"w": (1 + torch.randn(4000, generator=draws)).to(dtype)} for _ in range(5)]
    checkpoints = stored(tmp_path, states)
    posterior = Posterior.over(checkpoints, gaussian())
    w_ND = np.stack([state["w"].double().numpy() for state in states])
    (row,) = posterior.draw(1).coefficients.values
    sigma_D = np.sqrt(((w_ND - w_ND.mean(axis=0)) ** 2).mean(axis=0)).astype(np.float32)
    z_D = standard_normal(stream_key(0, 1, "w"), 0, 4000)
    exact_D = sum(c * w_D for c, w_D in zip(row, w_ND, strict=True)) + math.sqrt(0.5) * sigma_D.astype(np.float64) * z_D
    result = bytes_of(checkpoints, posterior, dtype=target)["w"]
    kind = dtype if target is None else getattr(torch, target)
    assert result.dtype == kind
    values = torch.from_numpy(exact_D)
    if kind == torch.bfloat16:  # 8 significant bits, ties to even
        unit_D = 2.0 ** (np.floor(np.log2(np.abs(exact_D))) - 7)
        expected = torch.from_numpy(np.rint(exact_D / unit_D) * unit_D)
    else:
        expected = torch.from_numpy(exact_D.astype(str(kind).removeprefix("torch."))).double()
    # the order of the sum may change the last of 53 bits, which decides about a tie once in 2²⁹ elements
    assert torch.equal(result.double(), expected), (result.double() - expected).abs().max()
    if kind != torch.float32:  # the test is effective: a mean rounded before noise is added is another
        part = torch.from_numpy(np.array(row) @ w_ND).to(kind).double()
        assert not torch.equal((part + (values - torch.from_numpy(np.array(row) @ w_ND))).to(kind), result)


def test_a_scale_of_0_is_the_mean_bit_for_bit(tmp_path: Path):
    checkpoints = stored(tmp_path, split(correlated()))
    draw = bytes_of(checkpoints, Posterior.over(checkpoints, gaussian(scale=0.0)))
    mean = averaged(checkpoints, [1 / N] * N)
    assert all(torch.equal(draw[name], mean[name]) for name in mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_never_changes_is_equal_in_every_draw(tmp_path: Path, dtype: torch.dtype):
    """A frozen tensor bit for bit with its negative zeros, and a frozen element of a tensor that changes by value."""
    frozen = torch.tensor([0.1, -0.0, 1 / 3, -torch.inf, 1e-30]).to(dtype)
    mixed = [torch.tensor([0.1, float(i), 0.7]).to(dtype) for i in range(3)]
    checkpoints = stored(tmp_path, [{"frozen": frozen, "mixed": w} for w in mixed])
    posterior = Posterior.over(checkpoints, gaussian())
    assert [*posterior.names] == ["mixed"]
    for sample in range(1, 5):
        draw = bytes_of(checkpoints, posterior, sample)
        assert torch.equal(draw["frozen"].view(torch.uint8), frozen.view(torch.uint8))
        assert draw["mixed"][1] != 1
        # Σ β w of equal float64 values is off by some ulps, but no noise is added
        tolerance = 0 if dtype != torch.float64 else 4 * 2**-52
        torch.testing.assert_close(draw["mixed"][::2], mixed[0][::2], rtol=tolerance, atol=0)


def test_tied_tensors_have_one_noise(tmp_path: Path):
    """Copies in safetensors, and names that share memory in a file of torch; other tensors of their shape have not."""
    draws = torch.Generator().manual_seed(0)
    w = [torch.randn(4, 3, generator=draws) for _ in range(4)]
    other = [torch.randn(4, 3, generator=draws) for _ in range(4)]
    copies = stored(tmp_path / "copies", [{"a": x, "b": x.clone(), "c": y} for x, y in zip(w, other, strict=True)])
    (tmp_path / "shared").mkdir()
    for i, (x, y) in enumerate(zip(w, other, strict=True)):
        torch.save({"a": x, "b": x, "c": y}, tmp_path / "shared" / f"step-{i}.pt")
    with discover([tmp_path / "shared"]) as found:
        for checkpoints in (copies, found.checkpoints):
            posterior = Posterior.over(checkpoints, gaussian())
            assert posterior.names == {"a": "a", "b": "a", "c": "c"}
            draw = bytes_of(checkpoints, posterior)
            assert torch.equal(draw["a"], draw["b"]) and not torch.equal(draw["a"], draw["c"])


def test_statistics_of_batchnorm_and_buffers_are_the_mean_and_integers_the_last(tmp_path: Path):
    states = [
        {
            "bn.running_mean": torch.full((3,), float(i)), "bn.running_var": torch.full((3,), i + 1.0),
            "bn.weight": torch.full((3,), float(i)), "bn.num_batches_tracked": torch.tensor(i),
            "scale": torch.tensor([float(i)]), "scale.weight": torch.tensor([float(i)]),
        } for i in range(5)
    ]  # fmt: skip
    checkpoints = stored(tmp_path, states)
    posterior = Posterior.over(checkpoints, gaussian(), buffers=["scale"])
    draw = bytes_of(checkpoints, posterior)
    assert draw["bn.running_mean"].tolist() == [2.0] * 3 and draw["bn.running_var"].tolist() == [3.0] * 3
    assert int(draw["bn.num_batches_tracked"]) == 4 and draw["scale"].tolist() == [2.0]
    assert posterior.names == {"bn.weight": "bn.weight", "scale.weight": "scale.weight"}
    low_rank = posterior.draw(1).coefficients
    assert low_rank.row("scale.weight") == low_rank.row("bn.weight") != low_rank.row("scale")
    plain = Posterior.over(stored(tmp_path / "plain", [{"w": state["bn.weight"]} for state in states]), gaussian())
    assert plain.groups == EVERYTHING


def test_a_kept_tensor_is_copied_from_the_last_candidate(tmp_path: Path):
    checkpoints = keeping(stored(tmp_path, [{"k": torch.ones(2) * i, "w": torch.ones(2) * i} for i in range(4)]), ["k"])
    posterior = Posterior.over(checkpoints, gaussian())
    assert posterior.names == {"w": "w"} and bytes_of(checkpoints, posterior)["k"].tolist() == [3.0, 3.0]
    assert plan_output(checkpoints, posterior.draw(1).coefficients, noise=posterior.draw(1).noise).not_averaged == ["k"]


def test_the_spread_is_the_relative_standard_deviation(tmp_path: Path):
    w_ND = correlated()
    posterior = Posterior.over(stored(tmp_path, split(w_ND)), gaussian())
    assert posterior.spread(ALONE) is None
    drawn(posterior, w_ND, 1)
    sigma_D, mean_D = w_ND.std(axis=0), w_ND.mean(axis=0)
    assert posterior.spread(ALONE) == pytest.approx(np.linalg.norm(sigma_D) / np.linalg.norm(mean_D), rel=1e-12)


def test_a_mask_is_no_part_of_the_spread(tmp_path: Path):
    """Elements of −inf in a parameter that changes elsewhere have neither mean nor deviation."""
    states = [{"w": torch.tensor([float(i), -torch.inf])} for i in range(1, 4)]
    posterior = Posterior.over(stored(tmp_path, states), gaussian())
    assert posterior.deviation("w", 0, 2).tolist() == pytest.approx([math.sqrt(2 / 3), 0])
    assert posterior.spread(ALONE) == pytest.approx(math.sqrt(2 / 3) / 2)


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
def test_the_deviation_is_right_where_the_weights_are_far_larger(tmp_path: Path, ratio: float):
    """Float64 has 16 digits, of which a ratio |w|/σ of 10⁶ leaves 10; σ is then rounded to float32."""
    w_ND = ratio + np.random.default_rng(0).standard_normal((20, 500))
    checkpoints = stored(tmp_path, [{"w": torch.tensor(w)} for w in w_ND])
    found_D = Deviations(checkpoints)("w", 0, 500)
    exact_D = np.array([np.sqrt(np.mean((w - np.mean(w)) ** 2)) for w in w_ND.astype(np.longdouble).T], float)
    np.testing.assert_allclose(found_D, exact_D, rtol=2**-24 + 1e-9)

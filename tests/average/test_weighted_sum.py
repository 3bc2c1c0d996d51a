"""The average against exact rational arithmetic: within the documented bound, for any chunking."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from reference import bound, exact_sum, nearest
from stored import averaged, stored
from torch import Tensor

from ckptavg.average import plan_output
from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.checkpoints.kept import keeping
from ckptavg.coefficients import Coefficients
from ckptavg.errors import InputError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROWS = {
    "thirds": [1 / 3] * 3,
    "tenths": [0.1, 0.2, 0.7],
    "negative": [1.5, -0.8, 0.3],
    "one": [0.0, 1.0, 0.0],
}


def awkward(dtype: torch.dtype, seed: int) -> Tensor:
    """Return random numbers over the whole range, subnormals, zeros of both signs, ties, and pairs that cancel."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    exponents = torch.empty(200, dtype=torch.float64).uniform_(-12, 12, generator=generator)
    spread = torch.randn(200, generator=generator, dtype=torch.float64) * 2**exponents
    small = torch.randn(50, generator=generator, dtype=torch.float64) * info.tiny
    large = torch.randn(50, generator=generator, dtype=torch.float64).clamp(-3, 3) * (info.max / 16)
    ties = (1 + torch.arange(40, dtype=torch.float64) * info.eps) * (1 if seed % 2 else 3)
    cancel = (-1) ** seed * torch.linspace(1, 2, 40, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, info.smallest_normal, -info.smallest_normal, info.eps, 1.0])
    return torch.cat([spread, small, large, ties, cancel, special.double()]).to(dtype)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_within_the_bound_of_the_exact_sum(tmp_path: Path, dtype: torch.dtype, row: list[float]):
    states = [{"w": awkward(dtype, seed)} for seed in range(3)]
    result = averaged(stored(tmp_path, states), row)["w"]
    assert result.dtype == dtype
    columns = zip(*(state["w"].tolist() for state in states), strict=True)
    for got, values in zip(result.tolist(), columns, strict=True):
        assert abs(Fraction(got) - exact_sum(row, values)) <= bound(row, values, dtype), (got, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_results_are_rounded_once(tmp_path: Path, dtype: torch.dtype):
    """Half of x + y is slightly above a tie; via float32 the excess is lost and the tie rounds down to even."""
    step = torch.finfo(dtype).eps
    x = torch.tensor([1 + step, 1 + 3 * step, -1 - step], dtype=torch.float64)
    hair = torch.tensor([2.0**-40, -(2.0**-40), -(2.0**-40)], dtype=torch.float64)
    states = [{"w": torch.ones(3, dtype=torch.float64) * x.sign()}, {"w": x + hair}]
    result = averaged(stored(tmp_path, states), [0.5, 0.5], str(dtype).removeprefix("torch."))["w"]
    exact = [exact_sum([0.5, 0.5], values) for values in zip(*(s["w"].tolist() for s in states), strict=True)]
    assert result.tolist() == [float(nearest(value, dtype)) for value in exact]
    twice = torch.tensor([float(value) for value in exact], dtype=torch.float64).to(torch.float32).to(dtype)
    assert not torch.equal(result, twice)  # the test is effective: torch's own conversion rounds twice


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_from_float64_is_to_nearest_even_over_the_whole_range(tmp_path: Path, dtype: torch.dtype):
    """All sixteen-bit numbers, the midpoints between neighbours, and both sides of each midpoint."""
    every = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].to(torch.float64)
    middle = (every[:-1] + every[1:]) / 2
    up, down = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)
    near = torch.cat([middle, torch.nextafter(middle, up), torch.nextafter(middle, down), every])
    values = torch.cat([near, -near])
    name = str(dtype).removeprefix("torch.")
    result = averaged(stored(tmp_path, [{"w": values}, {"w": values}]), [0.5, 0.5], name)["w"].to(torch.float64)
    even = torch.where(torch.arange(len(every) - 1) % 2 == 0, every[:-1], every[1:])
    expected = torch.cat([even, every[1:], every[:-1], every])
    assert torch.equal(result, torch.cat([expected, -expected]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_chunk(tmp_path: Path, dtype: torch.dtype):
    checkpoints = stored(tmp_path, [{"w": awkward(dtype, seed)} for seed in range(5)])
    row = [0.3, 0.1, 0.25, -0.05, 0.4]
    whole = averaged(checkpoints, row)["w"]
    for chunk in (1, 7, 100):
        part = averaged(checkpoints, row, chunk=chunk)["w"]
        assert torch.equal(part.view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("row", [[0.3, 0.1, 0.25, -0.05, 0.4], [0.2] * 5], ids=["weighted", "equal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_and_order_do_not_depend_on_the_threads(tmp_path: Path, dtype: torch.dtype, row: list[float]):
    states = [{f"w{i}": awkward(dtype, seed + i) for i in range(9)} for seed in range(5)]
    checkpoints = stored(tmp_path, states)
    specs = output_specs(checkpoints)

    def parts(threads: int) -> list[tuple[str, int, bytes]]:
        found = weighted_average(checkpoints, Coefficients((tuple(row),)), specs, chunk=100, threads=threads)
        return [(name, offset, bytes(data)) for name, offset, data in found]

    assert parts(1) == parts(2) == parts(5)


def test_small_tensors_share_a_chunk_and_keep_their_own_bytes(tmp_path: Path):
    states = [{f"w{i:02}": torch.full((i,), float(i + j)) for i in range(1, 20)} for j in (-1, 1)]
    result = averaged(stored(tmp_path, states), [0.5, 0.5], chunk=32)
    assert all(torch.equal(result[f"w{i:02}"], torch.full((i,), float(i))) for i in range(1, 20))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("chunk", [1, 20, 1000])
def test_tensors_that_lie_together_are_summed_as_one_and_judged_alone(tmp_path: Path, row: list[float], chunk: int):
    """With a mask of −inf among them, a kept one and another dtype."""
    states: list[dict[str, Tensor]] = []
    for seed in range(3):
        state = {f"w{i:02}": piece.clone() for i, piece in enumerate(awkward(torch.float32, seed).split(7))}
        mask = torch.full((3,), -torch.inf)
        states.append({**state, "w07": mask, "w20": torch.arange(4), "w30": state["w30"].half()})
    together = keeping(stored(tmp_path, states), ["w11"])
    alone = tuple(replace(each, reader=replace(each.reader, flat=False)) for each in together)
    found, expected = averaged(together, row, chunk=chunk), averaged(alone, row, chunk=chunk)
    assert all(torch.equal(found[name], expected[name]) for name in state)
    specs, coefficients = output_specs(together), Coefficients((tuple(row),))
    some = {name: range(spec.numel)[i % 3 : spec.numel - i % 2] for i, (name, spec) in enumerate(sorted(specs.items()))}
    for name, offset, data in weighted_average(together, coefficients, specs, only=some, chunk=chunk):
        elements = expected[name].view(torch.uint8)[offset : offset + len(data)]
        assert offset // expected[name].itemsize in some[name] and bytes(data) == bytes(elements.numpy())


def test_equal_coefficients_do_not_overflow_float64(tmp_path: Path):
    huge = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert torch.equal(averaged(stored(tmp_path, [{"w": huge}] * 4), [0.25] * 4)["w"], huge)


def test_non_floating_point_tensors_are_copied_from_the_last_selected(tmp_path: Path):
    states = [{"n": torch.tensor(i), "m": torch.tensor([i % 2 == 0]), "w": torch.ones(1) * i} for i in range(4)]
    checkpoints = stored(tmp_path, states)
    result = averaged(checkpoints, [0.5, 0.0, 0.5, 0.0])
    assert (int(result["n"]), bool(result["m"]), float(result["w"])) == (2, True, 1.0)
    assert plan_output(checkpoints, Coefficients.uniform([0], len(checkpoints))).not_averaged == ["m", "n"]


def test_a_single_checkpoint_is_copied_bit_for_bit(tmp_path: Path):
    states = [{"w": awkward(torch.bfloat16, seed)} for seed in range(2)]
    result = averaged(stored(tmp_path, states), [0.0, 1.0])["w"]
    assert torch.equal(result.view(torch.int16), states[1]["w"].view(torch.int16))


def test_shapes_of_every_rank_survive(tmp_path: Path):
    state = {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "cube": torch.ones(2, 3, 4)}
    result = averaged(stored(tmp_path, [state, {name: 3 * t for name, t in state.items()}]), [0.5, 0.5])
    assert {name: t.shape for name, t in result.items()} == {name: t.shape for name, t in state.items()}
    assert float(result["scalar"]) == 4.0 and torch.equal(result["cube"], 2 * torch.ones(2, 3, 4))


def test_candidates_with_coefficient_zero_are_not_read(tmp_path: Path):
    checkpoints = stored(tmp_path, [{"w": torch.ones(4) * i} for i in range(3)])
    checkpoints[1].reader.close()  # reading it would fail
    assert torch.equal(averaged(checkpoints, [0.5, 0.0, 0.5])["w"], torch.ones(4))


def test_groups_have_separate_coefficients():
    table = Coefficients(((0.5, 0.5), (1.0, 0.0), (0.0, 1.0)), (("",), ("layer.", "tied"), ("layer.1.",)))
    assert [table.row(name) for name in ("head", "layer.0.w", "layer.1.w", "tied")] == [
        (0.5, 0.5),
        (1.0, 0.0),
        (0.0, 1.0),
        (1.0, 0.0),
    ]
    assert table.candidate(0) == (0.5, 1.0, 0.0) and table.selected == (0, 1)


@pytest.mark.parametrize("row", [(), ((0.5, 0.4),), ((float("nan"), 1.0),), ((1.0,), (0.5, 0.5))])
def test_coefficients_that_do_not_sum_to_one_are_refused(row: tuple[tuple[float, ...], ...]):
    with pytest.raises(ValueError, match=r"sum to 1|need one row|be finite"):
        Coefficients(row, (("",),) * max(1, len(row)))


def test_linear_coefficients_have_any_finite_sum_and_are_no_plain_mean():
    doubled = Coefficients(((2.0, 0.0, 2.0),), linear=True)
    assert doubled.selected == (0, 2) and doubled.effective is None and not doubled.uniform_subset
    with pytest.raises(ValueError, match="finite"):
        Coefficients(((float("inf"), 1.0),), linear=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_value_is_reported_with_file_and_element(tmp_path: Path, bad: float):
    states = [{"w": torch.ones(1000)} for _ in range(3)]
    states[1]["w"][700] = bad
    with pytest.raises(
        InputError, match=r"step-1\.safetensors: w: 1 value is NaN or infinite, the first at element 700"
    ):
        averaged(stored(tmp_path, states), [0.4, 0.3, 0.3], chunk=256)
    with pytest.raises(InputError, match=r"step-1\.safetensors: w"):
        averaged(stored(tmp_path, states), [0.0, 1.0, 0.0])


@pytest.mark.parametrize("row", [*ROWS.values(), [1 / 49] * 3 + [46 / 49], [-7.3, 9.1, -0.8]], ids=str)
@pytest.mark.parametrize("target", [None, "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_that_all_candidates_share_is_reproduced_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, target: str | None, row: list[float]
):
    """Not only by value: zeros keep their sign, and a narrower dtype gets the nearest number to the stored one."""
    value = awkward(dtype, 1).double()
    value = value[value.abs() < 60000].to(dtype)  # what float16 holds
    result = averaged(stored(tmp_path, [{"w": value}] * len(row)), row, target, chunk=100)["w"]
    expected = averaged(stored(tmp_path, [{"w": value}]), [1.0], target)["w"]
    assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))
    if target is None:
        assert torch.equal(result.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shared_mask_is_copied_and_reported(tmp_path: Path, dtype: torch.dtype, row: list[float]):
    mask = torch.full((20, 20), -torch.inf, dtype=dtype).triu(1)
    mask[0, 0] = torch.nan
    checkpoints = stored(tmp_path, [{"mask": mask, "w": torch.ones(3) * i} for i in range(3)])
    plan = plan_output(checkpoints, Coefficients((tuple(row),)))
    assert b"".join(data for name, _, data in plan.parts if name == "mask") == mask.view(torch.uint8).numpy().tobytes()
    assert plan.copied == {"mask"}


def test_an_infinite_value_that_an_unselected_candidate_has_not_is_an_error(tmp_path: Path):
    values = [torch.tensor([1.0, i]) for i in (torch.inf, torch.inf, 2.0)]
    checkpoints = stored(tmp_path, [{"w": value} for value in values])
    with pytest.raises(InputError, match=r"step-0\.safetensors: w: 1 value is NaN or infinite"):
        averaged(checkpoints, [0.5, 0.5, 0.0])


def test_a_shared_tensor_that_overflows_the_output_dtype_is_an_error(tmp_path: Path):
    shared = torch.tensor([1e6, -torch.inf])
    with pytest.raises(InputError, match="the average overflows float16"):
        averaged(stored(tmp_path, [{"w": shared}] * 2), [0.5, 0.5], "float16")


def test_kept_tensors_are_copied_even_if_they_are_not_finite(tmp_path: Path):
    states = [{"least": torch.tensor([torch.inf, float(i)]), "w": torch.ones(2) * i} for i in range(3)]
    checkpoints = keeping(stored(tmp_path, states), ["le*"])
    result = averaged(checkpoints, [0.5, 0.5, 0.0])
    assert result["least"].tolist() == [torch.inf, 1.0] and result["w"].tolist() == [0.5, 0.5]


def test_an_overflow_of_the_output_dtype_is_reported(tmp_path: Path):
    checkpoints = stored(tmp_path, [{"w": torch.tensor([60000.0])}, {"w": torch.tensor([80000.0])}])
    with pytest.raises(InputError, match="the average overflows float16") as caught:
        averaged(checkpoints, [0.5, 0.5], "float16")
    assert caught.value.hint and "--dtype" in caught.value.hint


def test_dtypes_that_cannot_be_averaged_are_refused_by_name(tmp_path: Path):
    checkpoints = stored(tmp_path, [{"w": torch.ones(2).to(torch.float8_e4m3fn)}])
    with pytest.raises(InputError, match=r"w: dtype F8_E4M3 cannot be averaged"):
        output_specs(checkpoints)


def test_dtype_changes_floating_tensors_only(tmp_path: Path):
    checkpoints = stored(tmp_path, [{"w": torch.ones(2), "n": torch.tensor(1)}])
    assert {name: spec.dtype for name, spec in output_specs(checkpoints, "bfloat16").items()} == {
        "w": "BF16",
        "n": "I64",
    }


MEASURE = """
import re, sys
from pathlib import Path
from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.coefficients import Coefficients
from ckptavg.checkpoints.discover import discover
checkpoints = discover([Path(sys.argv[1])]).checkpoints
specs = output_specs(checkpoints)
for part in weighted_average(checkpoints, Coefficients.uniform(range(len(checkpoints)), len(checkpoints)), specs):
    pass
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.thorough
def test_memory_does_not_grow_with_candidates_or_model(tmp_path: Path):
    def peak(name: str, candidates: int, elements: int) -> int:
        stored(tmp_path / name, ({"w": torch.full((elements,), float(i))} for i in range(candidates)))
        command = [sys.executable, "-c", MEASURE, str(tmp_path / name)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    small = peak("small", 2, 4_000_000)
    # 16 MB per file; 20 MB is interpreter noise, and one more copy of any tensor would be 16 to 80 MB
    assert peak("more", 8, 4_000_000) < small + 20_000
    assert peak("larger", 2, 20_000_000) < small + 20_000

"""Posterior files: what is in them, the draws that they give, and damaged or hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from peft_by_hand import save_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckptavg
from ckptavg.average.gaussian import Gaussian
from ckptavg.average.noise import standard_normal, stream_key
from ckptavg.pipeline import posterior_draws

N = 6


def states(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return [
        {
            "w": torch.randn(30, 4, generator=draws).to(dtype), "b": torch.randn(30, generator=draws).to(dtype),
            "tied": torch.zeros(0), "w.kept": torch.ones(2) * 3, "bn.running_var": torch.full((3,), i + 1.0),
            "mask": torch.full((3, 3), -torch.inf).triu(1), "count": torch.tensor(i),
        } for i in range(N)
    ]  # fmt: skip


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    for i, state in enumerate(states(dtype)):
        save_file(state, folder / f"step-{i + 1}.safetensors")
    return folder


@pytest.fixture
def posterior(tmp_path: Path) -> Path:
    """A posterior of six candidates, with all deviations."""
    ckptavg.swag(saved(tmp_path / "ckpts"), posterior=tmp_path / "p.safetensors", output=tmp_path / "mean.safetensors")
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize("covariance", ["running", "sample"])
def test_the_file_has_mean_deviation_and_kept_deviations(tmp_path: Path, covariance: str):
    """Against numpy in float64, rounded to float32; frozen tensors, statistics and integers have a mean alone."""
    path = tmp_path / "p.safetensors"
    ckptavg.swag(
        saved(tmp_path / "ckpts"), posterior=path, output=tmp_path / "m.safetensors", covariance=covariance,
        deviations=4,
    )  # fmt: skip
    found, own = load_file(path), states(torch.float32)
    assert {name.partition("::")[0] for name in found} == own[0].keys()
    assert {name for name in found if "::" in name} == {"w::sd", "w::dev", "b::sd", "b::dev"}
    for name in ("w", "b"):
        w_N = np.stack([state[name].double().numpy() for state in own])
        np.testing.assert_allclose(found[name], w_N.mean(axis=0), rtol=2**-23, atol=2**-30)
        np.testing.assert_allclose(found[f"{name}::sd"], w_N.std(axis=0), rtol=2**-23)
        for k, i in enumerate(range(N - 4, N)):
            d = w_N[i] - (w_N[: i + 1] if covariance == "running" else w_N).mean(axis=0)
            np.testing.assert_allclose(found[f"{name}::dev"][k], d, rtol=2**-23, atol=2**-50)
    assert int(found["count"]) == N - 1 and found["bn.running_var"].tolist() == [3.5] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"deviations": 3, "covariance": "sample"}, {"deviations": 0}], ids=str)
def test_the_draws_of_a_file_are_those_of_the_candidates_within_its_rounding(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
):
    """Mean and deviations are off by half an ulp of float32 each, 2⁻²⁴ (|w̄| + Σ_k |s_k d_k|); σ is float32 in both.

    The result is then rounded to the dtype of the candidates, by which two numbers so close may differ by an ulp.
    """
    folder = saved(tmp_path / "ckpts", dtype)
    direct = ckptavg.swag(folder, samples=3, output=f"{tmp_path}/a/", posterior=tmp_path / "p.safetensors", **options)
    read = ckptavg.swag(from_=tmp_path / "p.safetensors", samples=3, output=f"{tmp_path}/b/")
    assert read.gaussian == direct.gaussian and read.candidates == ()
    gaussian, own = Gaussian(**direct.gaussian), states(dtype)
    for sample, (one, two) in enumerate(zip(direct.draws, read.draws, strict=True), 1):
        a, b = load_file(one.path), load_file(two.path)
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
        for name in a.keys() - {"w", "b"}:
            assert torch.equal(a[name], b[name]), name
        for name in ("w", "b"):
            w_N = np.stack([state[name].double().numpy() for state in own])
            k = gaussian.deviations
            steps, rows = (gaussian.steps(sample), gaussian.rows(N)) if k else ((), ())
            moved = sum((np.abs(s * np.tensordot(row, w_N, 1)) for s, row in zip(steps, rows, strict=True)), 0)
            stored = 2**-24 if dtype != torch.float64 else 2**-50
            bound = stored * (np.abs(w_N.mean(axis=0)) + moved) + torch.finfo(dtype).eps * np.abs(
                a[name].double().numpy()
            )
            assert (np.abs(a[name].double().numpy() - b[name].double().numpy()) <= bound).all(), name
        assert not torch.equal(a["w"], states(dtype)[0]["w"])


def test_another_scale_seed_and_dtype_are_those_of_the_command(run: Run, posterior: Path, tmp_path: Path):
    """Deviations from the mean grow by the root of the scale; the numbers of a seed are its own."""
    words = ("swag", "--from", posterior, "--samples", 1)
    for folder, options in (
        ("half", ()), ("two", ("--scale", 2)), ("zero", ("--scale", 0)), ("seed", ("--seed", 1)),
        ("narrow", ("--dtype", "bfloat16")),
    ):  # fmt: skip
        done = run(*words, "-o", f"{folder}/", *options)
        assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    half, two, zero, seed, narrow = (
        load_file(tmp_path / folder / "sample-1/model.safetensors")
        for folder in ("half", "two", "zero", "seed", "narrow")
    )
    mean = load_file(tmp_path / "mean.safetensors")
    assert all(torch.equal(zero[name], mean[name]) for name in mean)
    torch.testing.assert_close(two["w"] - mean["w"], 2 * (half["w"] - mean["w"]), rtol=1e-5, atol=1e-6)
    assert not torch.equal(seed["w"], half["w"]) and torch.equal(narrow["w"], half["w"].bfloat16())


def test_one_line_says_what_was_written_from_a_file(run: Run, posterior: Path, tmp_path: Path):
    done = run("swag", "--from", posterior, "--samples", 2, "-o", "out/", "--json")
    found = json.loads(done.stdout)
    assert done.stderr == "wrote 2 draws to out\n" and len(found["draws"]) == 2
    assert run("swag", "--from", posterior, "--samples", 2, "-o", "out/").returncode == 6


def test_neither_a_posterior_nor_its_draws_can_be_verified(run: Run, posterior: Path, tmp_path: Path):
    assert run("swag", "--from", posterior, "--samples", 1, "-o", "out/").returncode == 0
    for path in (posterior, tmp_path / "out/sample-1/model.safetensors"):
        done = run("verify", path, "--sources", "ckpts")
        assert done.returncode == 3 and "is a posterior of swag, or was drawn from one" in done.stderr
        assert len(done.stderr.splitlines()) == 2


def test_a_posterior_of_adapters_gives_adapters(run: Run, tmp_path: Path):
    folder = save_adapters(tmp_path / "run")
    posterior = "out/posterior.safetensors"  # beside adapter_config.json
    assert run("swag", folder, "--posterior", posterior, "-o", "out/", "--samples", 1).returncode == 0
    assert run("swag", "--from", posterior, "-o", "again/", "--samples", 1).returncode == 0
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / posterior).read_bytes())
    alone = run("swag", "--from", "alone.safetensors", "-o", "bare/", "--samples", 1)
    assert alone.returncode == 0 and "adapter_config.json is not beside alone.safetensors" in alone.stderr
    one, two = (load_file(tmp_path / f"{name}/sample-1/adapter_model.safetensors") for name in ("out", "again"))
    configs = [(tmp_path / f"{name}/sample-1/adapter_config.json").read_bytes() for name in ("out", "again")]
    assert configs[0] == configs[1]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
HOSTILE: Mapping[str, Change] = {
    "no mean": lambda tensors, record: tensors.pop("w"),
    "no deviation": lambda tensors, record: tensors.pop("w::sd"),
    "no kept deviations": lambda tensors, record: tensors.pop("b::dev"),
    "another tensor": lambda tensors, record: tensors.update(more=torch.ones(1)),
    "a deviation of another shape": lambda tensors, record: tensors.update({"w::sd": torch.ones(4, 30)}),
    "too few kept deviations": lambda tensors, record: tensors.update({"w::dev": tensors["w::dev"][1:].clone()}),
    "a deviation of another dtype": lambda tensors, record: tensors.update({"w::sd": tensors["w::sd"].half()}),
    "integers": lambda tensors, record: tensors.update({n: tensors[n].int() for n in ("w", "w::sd", "w::dev")}),
    "no posterior": lambda tensors, record: record.pop("posterior"),
    "a posterior that is a list": lambda tensors, record: record.update(posterior=[]),
    "no list of tensors": lambda tensors, record: record.pop("not_averaged"),
    "tensors that are numbers": lambda tensors, record: record.update(not_averaged=[3]),
    **{
        f"{key} of {value!r}": lambda tensors, record, key=key, value=value: record["posterior"].update({key: value})
        for key, value in (
            ("gaussian", None), ("gaussian", {}), ("names", ["w", "b"]), ("names", {"w": 3, "b": "b"}),
            ("names", {"absent": "w"}), ("names", "w"), ("dtypes", {}), ("dtypes", None), ("candidates", "x"),
            ("candidates", None), ("names", {"w": "w", "b": "b", "count": "count"}),
        )
    },
    **{
        f"{key} = {value!r}": lambda tensors, record, key=key, value=value: record["posterior"]["gaussian"].update(
            {key: value}
        )
        for key, value in (
            ("deviations", 10**9), ("deviations", -1), ("deviations", 1), ("deviations", 2.0), ("deviations", True),
            ("deviations", "3"), ("deviations", 5), ("scale", "x"), ("scale", None), ("scale", -1), ("scale", []),
            ("covariance", 3), ("covariance", "both"), ("seed", "x"), ("seed", 1.5), ("more", 1),
        )
    },
    **{
        f"w as {dtype}": lambda tensors, record, dtype=dtype: record["posterior"]["dtypes"].update(w=dtype)
        for dtype in ("I64", "BOOL", "F8_E4M3", "x", "", 3, None)
    },
    "a tensor that is drawn and copied": lambda tensors, record: record["not_averaged"].append("w"),
    "file that is a number": lambda tensors, record: record["posterior"].update(file=3),
    "count as F32": lambda tensors, record: record["posterior"]["dtypes"].update(count="F32"),
}  # fmt: skip


def rewritten(path: Path, change: Change) -> None:
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    tensors, record = load_file(path), json.loads(metadata["ckptavg"])
    change(tensors, record)
    save_file(tensors, path, {**metadata, "ckptavg": json.dumps(record)})


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_posterior_is_one_line_and_nothing_is_written(run: Run, posterior: Path, tmp_path: Path, name: str):
    rewritten(posterior, HOSTILE[name])
    done = run("swag", "--from", posterior, "--samples", 1, "-o", "out/")
    assert done.returncode == 3 and done.stdout == "" and not (tmp_path / "out").exists(), done.stderr
    assert "is no posterior of ckptavg, or a damaged one" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_posterior_in_which_nothing_is_drawn_gives_the_mean_whatever_its_number_of_deviations(
    run: Run, posterior: Path, tmp_path: Path
):
    """No memory is taken for 10⁹ deviations of no tensor."""

    def frozen(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        for name in ("w::sd", "w::dev", "b::sd", "b::dev"):
            del tensors[name]
        record["posterior"].update(names={}, candidates=10**9)
        record["posterior"]["gaussian"].update(deviations=10**9)

    rewritten(posterior, frozen)
    done = run("swag", "--from", posterior, "--samples", 1, "-o", "out/")
    assert done.returncode == 0, done.stderr
    drawn, mean = load_file(tmp_path / "out/sample-1/model.safetensors"), load_file(tmp_path / "mean.safetensors")
    assert all(torch.equal(drawn[name], mean[name]) for name in mean)


TEXTS = {
    "no JSON": "{", "a number": "3", "a list": "[]", "a key twice": '{"posterior": 1, "posterior": 2}',
    "deep": "[" * 99999, "NaN": '{"posterior": NaN}',
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_metadata_that_are_no_posterior_are_one_line(run: Run, tmp_path: Path, name: str):
    save_file({"w": torch.ones(1)}, tmp_path / "p.safetensors", {"ckptavg": TEXTS[name]})
    done = run("swag", "--from", "p.safetensors", "--samples", 1, "-o", "out/")
    assert done.returncode == 3 and "is no posterior of ckptavg" in done.stderr and not (tmp_path / "out").exists()


def test_files_of_other_kinds_are_one_line(run: Run, tmp_path: Path):
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("model.pt", "empty.safetensors", "absent.safetensors", "."):
        done = run("swag", "--from", name, "--samples", 1, "-o", "out/")
        assert done.returncode in (2, 3) and "Traceback" not in done.stderr and not (tmp_path / "out").exists(), name
        assert done.stderr.startswith("error: "), done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_deviation_that_is_not_finite_is_an_error(run: Run, posterior: Path, tmp_path: Path, value: float):
    rewritten(posterior, lambda tensors, record: tensors["w::sd"].fill_(value))
    done = run("swag", "--from", posterior, "--samples", 2, "-o", "out/")
    assert done.returncode == 3 and "w: " in done.stderr and not (tmp_path / "out").exists(), done.stderr


def test_a_failure_removes_the_draws_before_it(posterior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = posterior_draws._write

    def second(stored: Any, sample: int, *rest: Any) -> Any:
        if sample == 2:
            raise OSError(28, "No space left on device")
        return write(stored, sample, *rest)

    monkeypatch.setattr(posterior_draws, "_write", second)
    with pytest.raises(OSError, match="No space"):
        ckptavg.swag(from_=posterior, samples=3, output=f"{tmp_path}/out/")
    assert not (tmp_path / "out").exists()


def test_the_noise_of_a_draw_is_that_of_its_name(posterior: Path, tmp_path: Path):
    """Against numpy: mean, low-rank part and noise from the tensors of the file alone."""
    found = ckptavg.swag(from_=posterior, samples=1, output=f"{tmp_path}/out/", seed=4)
    stored, z_K = load_file(posterior), standard_normal(stream_key(4, 1), 0, N)
    drawn = load_file(found.draws[0].path)
    for name in ("w", "b"):
        z = standard_normal(stream_key(4, 1, name), 0, stored[name].numel()).reshape(stored[name].shape)
        moved = np.tensordot(z_K, stored[f"{name}::dev"].double().numpy(), 1) / np.sqrt(N - 1)
        expected = stored[name].double().numpy() + np.sqrt(0.5) * (moved + stored[f"{name}::sd"].double().numpy() * z)
        np.testing.assert_allclose(drawn[name], expected, rtol=2**-23, atol=2**-40)

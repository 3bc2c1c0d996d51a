"""Outputs of ckptavg are verified, whatever made them and whatever their sources are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK, Run
from faults.formats import FORMATS, written
from peft_by_hand import save_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.coefficients import Coefficients
from ckptavg.objective import PlainAverage
from ckptavg.pipeline.verification import verify
from ckptavg.strategies import from_spec, strategies

SPECS = (
    "last", "best", "swa", "lawa:k=2", "ema", "ema:decay=0", "ema:decay=1e-200", "wsm", "blend", "soup", "aswa",
    "aswa:hard_updates=false", "sewa:k=2:steps=5", "sewa:k=2:solver=quadratic", "sewa:k=auto:solver=quadratic",
    "twa:epochs=1", "twa:epochs=1:constraint=simplex", "twa:epochs=1:layerwise", "twa:epochs=1:block_size=0",
    "twa:solver=quadratic", "twa:solver=quadratic:constraint=simplex",
    "twa:epochs=1:constraint=linear:force_linear",
)  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_an_output_of_every_strategy_is_verified(digits: Path, tmp_path: Path, spec: str):
    options = {"task": TASK, "last": 5, "baselines": False, "output": tmp_path / "out"}
    result = ckptavg.run(digits, from_spec(spec), **options)
    found = verify(tmp_path / "out", digits)
    assert (len(found.agree), found.differ, len(found.unchecked)) == (12, [], 4)
    assert (found.without_digest, found.own_strategy) == ([], None) and result.strategy == spec.partition(":")[0]


@pytest.mark.parametrize("spec", ["swa", "lawa:k=2", "ema:decay=0.5", "wsm"])
def test_an_average_by_run_is_verified_with_its_runs(run: Run, digits: Path, tmp_path: Path, spec: str):
    """Two runs of two and three candidates: each run has half of the weight, and other runs give other coefficients."""
    for i, step in enumerate((300, 315, 330, 345, 360)):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        shutil.copy(digits / f"step-{step}.pt", tmp_path / "ab"[i % 2])
    result = ckptavg.run([tmp_path / "a", tmp_path / "b"], f"{spec}:by_run", output=tmp_path / "out")
    runs = [candidate.columns["run"] for candidate in result.candidates]
    assert runs == ["1", "2", "1", "2", "1"] and "run" in str(result.to_dict()["candidates"][0])
    for name in ("1", "2"):
        weights = [c.coefficient for c, its in zip(result.candidates, runs, strict=True) if its == name]
        assert sum(weights) == pytest.approx(0.5, abs=1e-12)  # pyright: ignore
    assert not verify(tmp_path / "out", tmp_path).differ
    with safe_open(tmp_path / "out", "pt") as stored:
        metadata = stored.metadata()
    record = json.loads(metadata["ckptavg"])
    record["runs"][0] = record["runs"][1]
    save_file(load_file(tmp_path / "out"), tmp_path / "out", {**metadata, "ckptavg": json.dumps(record)})
    done = run("verify", "out", "--sources", tmp_path)
    assert done.returncode == 3 and f"not those of {spec.partition(':')[0]} with its settings" in done.stderr


@pytest.mark.parametrize("command", ["lawa", "compare"])
def test_a_k_beyond_the_shortest_run_is_refused_before_anything_is_scored(
    run: Run, digits: Path, tmp_path: Path, command: str
):
    for i, step in enumerate((300, 315, 330, 345, 360)):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        shutil.copy(digits / f"step-{step}.pt", tmp_path / "ab"[i % 2])
    own = ("--k", 3, "--by-run") if command == "lawa" else ("--strategies", "lawa:k=3:by_run", "--task", TASK)
    done = run(command, "a", "b", *own)
    assert (
        done.returncode == 2
        and "--k 3 asks for more checkpoints than the 2 candidates of the shortest run" in done.stderr
    )


def test_every_strategy_is_among_them():
    assert {spec.partition(":")[0] for spec in SPECS} == set(strategies())


OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": ("swa", "--dtype", "bfloat16"), "wider": ("swa", "--dtype", "float64"),
    "keep": ("swa", "--keep", "*.bias", "--average", "1.bias"), "no task": ("ema",),
    "shards": ("swa", "--max-shard-size", "10KB", "-o", "dir/"), "dcp": ("swa", "--format", "dcp"),
    "directory": ("swa", "-o", "dir/"), "two in one": ("lawa", "--k", 2, "--last", 3),
    "compare": ("compare", "--strategies", "swa,soup", "--task", TASK),
    "never worse": ("sewa", "--k", 3, "--steps", 2, "--never-worse", "--task", TASK),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_an_output_with_every_option_is_verified(run: Run, digits: Path, name: str):
    command, *options = OPTIONS[name]
    done = run(command, digits, "--last", 4, *options)
    assert done.returncode == 0, done.stderr
    done = run("verify", done.stdout.strip(), "--sources", digits)
    assert done.returncode == 0, done.stderr


def test_the_best_checkpoint_written_instead_of_the_selection_is_verified(run: Run, digits: Path, tmp_path: Path):
    (tmp_path / "ckpts").mkdir()
    for step, noise in ((1, 0.0), (2, 9.0)):
        saved = torch.load(digits / "step-360.pt")
        draws = torch.Generator().manual_seed(step)
        for tensor in (t for t in saved["state_dict"].values() if t.is_floating_point() and noise):
            tensor += noise * torch.rand(tensor.shape, generator=draws)
        torch.save({**saved, "global_step": step}, tmp_path / "ckpts" / f"step-{step}.pt")
    done = run("swa", "ckpts", "--task", TASK, "--never-worse", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"].endswith("was written instead."), done.stderr
    assert run("verify", "averaged.safetensors", "--sources", "ckpts").returncode == 0


@dataclass(frozen=True)
class First(PlainAverage):
    """A strategy of one's own, with a setting."""

    place: int = 0

    def coefficients(self, n: int) -> Coefficients:
        return Coefficients.uniform([self.place], n)


def test_a_strategy_of_ones_own_is_named_because_its_settings_are_not_checked(run: Run, digits: Path, tmp_path: Path):
    ckptavg.run(digits, First(), output=tmp_path / "out")
    done = run("verify", "out", "--sources", digits)
    assert done.returncode == 0 and "First is no strategy of ckptavg, so its settings were not checked" in done.stderr
    assert json.loads(run("verify", "out", "--sources", digits, "--json").stdout)["own_strategy"] == "First"


def test_absent_digests_are_reported(run: Run, digits: Path):
    assert run("swa", digits, "--last", 3, "--digests", "none").returncode == 0
    done = run("verify", "averaged.safetensors", "--sources", digits, "--json")
    assert "no digest of 3 sources" in done.stderr
    names = [f"step-{step}.pt" for step in (330, 345, 360)]
    assert json.loads(done.stdout)["without_digest"] == names


def _state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(4.0) + step, "count": torch.tensor(step)}


def _files(digits: Path, folder: Path, format: str) -> list[Path]:
    """Write three checkpoints of the digits in one format of `faults.formats`."""
    few = folder.with_name("few")
    few.mkdir()
    for i, step in enumerate((330, 345, 360)):
        torch.save(torch.load(digits / f"step-{step}.pt")["state_dict"], few / f"{i}.pt")
    written(format, few, folder)
    return [folder]


def _trainer(digits: Path, folder: Path) -> list[Path]:
    for step in (5, 10):
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        save_file(_state(step), place / "model.safetensors")
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step * 100}))
    return [folder]


def _fsdp(digits: Path, folder: Path) -> list[Path]:
    _files(digits, folder, "dcp")
    for step in (1, 2, 3):
        inner = folder / f"checkpoint-{step}" / "pytorch_model_fsdp_0"
        inner.parent.mkdir()
        (folder / f"step-{step}").rename(inner)
    return [folder]


def _named(digits: Path, folder: Path) -> list[Path]:
    """Write checkpoints without a step, named in their order."""
    folder.mkdir()
    for name, step in (("b", 1), ("a", 2)):
        save_file(_state(step), folder / f"{name}.safetensors")
    return [folder / "b.safetensors", folder / "a.safetensors"]


def _same_names(digits: Path, folder: Path) -> list[Path]:
    """Write two runs whose files have the same names."""
    for step, name in enumerate(("one", "two"), 1):
        (folder / name).mkdir(parents=True)
        save_file(_state(step), folder / name / "step-1.safetensors")
    return [folder / "one", folder / "two"]


def _linked(digits: Path, folder: Path) -> list[Path]:
    """Write directories that are links to others."""
    (elsewhere,) = _trainer(digits, folder.with_name("elsewhere"))
    folder.mkdir()
    for step in (5, 10):
        (folder / f"checkpoint-{step}").symlink_to(elsewhere / f"checkpoint-{step}")
    return [folder]


def _one_directory(digits: Path, folder: Path) -> list[Path]:
    return [_trainer(digits, folder)[0] / "checkpoint-5"]


SOURCES: dict[str, Callable[[Path, Path], list[Path]]] = {
    **{name: lambda digits, folder, name=name: _files(digits, folder, name) for name in FORMATS},
    "Trainer": _trainer, "FSDP in a Trainer's": _fsdp, "order given": _named, "runs of the same names": _same_names,
    "links": _linked, "one directory": _one_directory,
    "adapters": lambda digits, folder: [save_adapters(folder)],
}  # fmt: skip


@pytest.mark.parametrize("digests", ["blake3", "none"])
@pytest.mark.parametrize("kind", SOURCES)
def test_sources_of_every_kind_are_found(run: Run, digits: Path, tmp_path: Path, kind: str, digests: str):
    paths = SOURCES[kind](digits, tmp_path / "run")
    done = run("swa", *paths, "-o", "out", "--digests", digests)
    assert done.returncode == 0, done.stderr
    done = run("verify", "out", "--sources", paths[0] if kind == "one directory" else "run")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rank", [(), ("--rank", 2), ("--rank", 99)])
def test_an_exact_adapter_is_verified(run: Run, tmp_path: Path, rank: tuple[Any, ...]):
    folder = save_adapters(tmp_path / "run")
    assert run("swa", folder, "-o", "out/", "--adapter", "exact", *rank).returncode == 0
    done = run("verify", "out/adapter_model.safetensors", "--sources", folder)
    assert done.returncode == 0 and "4 tensors equal" in done.stderr, done.stderr


def test_a_copy_of_the_sources_elsewhere_is_found(run: Run, digits: Path, tmp_path: Path):
    assert run("swa", digits, "--last", 2).returncode == 0
    shutil.copytree(digits, tmp_path / "a" / "b")
    (tmp_path / "a" / "step-360.pt").write_bytes(b"damaged")  # another file of that name
    assert run("verify", "averaged.safetensors", "--sources", "a").returncode == 0


def test_a_hint_of_an_average_is_not_given(run: Run, digits: Path, tmp_path: Path):
    """A source cannot be left out of what was averaged."""
    shutil.copytree(digits, tmp_path / "run")
    assert run("swa", "run", "--last", 2, "--digests", "none").returncode == 0
    saved = torch.load(tmp_path / "run" / "step-360.pt")
    torch.save({**saved, "state_dict": {"w": torch.ones(2)}}, tmp_path / "run" / "step-360.pt")
    done = run("verify", "averaged.safetensors", "--sources", "run")
    assert done.returncode == 4 and "--exclude" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn.running_mean": torch.zeros(2, 1), "bn.running_var": torch.ones(2, 1)}, "by the shapes"),
        ({"bn.running_mean": torch.zeros(3)}, "by the shapes"),
        ({"bn.weight": torch.zeros(3)}, "by the shapes"),
        ({"bn.bias": torch.zeros(3)}, "by the shapes"),
        ({"bn.num_batches_tracked": torch.tensor([1, 2])}, "by the shapes"),
        ({"bn.num_batches_tracked": torch.tensor(1.0)}, "by the dtypes"),
        ({"bn.running_mean": torch.zeros(2, dtype=torch.int64)}, "by the dtypes"),
        ({"bn.num_batches_tracked": None}, "the sources have no bn.num_batches_tracked"),
    ],
)
def test_only_the_layout_of_batchnorm_may_be_recomputed(
    run: Run, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
):
    """Statistics without affine weights are those of BatchNorm too."""
    state = {
        "bn.running_mean": torch.zeros(2),
        "bn.running_var": torch.ones(2),
        "bn.num_batches_tracked": torch.tensor(1),
    }
    for changed, expected in ((state, None), ({**state, **change}, message)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        for step in (1, 2):
            weights = {name: tensor for name, tensor in changed.items() if tensor is not None}
            save_file({"w": torch.full((2,), float(step)), **weights}, tmp_path / "run" / f"step-{step}.safetensors")
        assert run("swa", "run", "-o", "out", "--force").returncode == 0
        with safe_open(tmp_path / "out", "pt") as stored:
            metadata = stored.metadata()
        record = {**json.loads(metadata["ckptavg"]), "recomputed": ["bn.running_mean", "bn.running_var"]}
        save_file(load_file(tmp_path / "out"), tmp_path / "out", {**metadata, "ckptavg": json.dumps(record)})
        done = run("verify", "out", "--sources", "run")
        assert (done.returncode == 0) if expected is None else (done.returncode == 3 and expected in done.stderr)


def test_the_kind_of_step_may_be_one_that_the_sources_alone_would_not_have(run: Run, tmp_path: Path):
    """Steps are taken from the names, because a checkpoint that was not selected has no other one."""
    (tmp_path / "run").mkdir()
    for step in (1, 2, 3):
        inside = {"global_step": 100 * step} if step < 3 else {}
        torch.save({"state_dict": _state(step), **inside}, tmp_path / "run" / f"step-{step}.pt")
    assert run("swa", "run", "--stop", 2).returncode == 0
    with safe_open(tmp_path / "averaged.safetensors", "pt") as stored:
        assert [s["step"] for s in json.loads(stored.metadata()["ckptavg"])["sources"]] == [1, 2]
    assert run("verify", "averaged.safetensors", "--sources", "run").returncode == 0


def test_a_source_without_a_digest_that_lies_in_two_places_is_refused(run: Run, digits: Path, tmp_path: Path):
    _same_names(digits, tmp_path / "run")
    assert run("last", "run/one", "-o", "out", "--digests", "none").returncode == 0
    done = run("verify", "out", "--sources", "run")
    assert done.returncode == 3 and "without digests it cannot be told from" in done.stderr, done.stderr

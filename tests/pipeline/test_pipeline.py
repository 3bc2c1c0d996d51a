"""Whole runs: output directories, dry runs, the caller's state and the Python API."""

from __future__ import annotations

import inspect
import json
import pkgutil
import random
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints.test_discover import trainer, weights
from conftest import TASK, Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptavg
from ckptavg.coefficients import Coefficients
from ckptavg.errors import OutputError, OutputExistsError
from ckptavg.filesystem.digest import algorithm_of
from ckptavg.objective import PlainAverage
from ckptavg.strategies import strategies
from ckptavg.strategies.lawa import LAWA


@pytest.fixture
def ckpts(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for step in range(1, 5):
        save_file(
            weights(step), folder / f"step-{step}.safetensors", metadata={"format": "pt", "alias": "fc", "n": str(step)}
        )
    return folder


def test_plain_averages_without_a_task_match_the_definition(run: Run, ckpts: Path, tmp_path: Path):
    for command, chosen in (("swa", [1, 2, 3, 4]), ("lawa --k 2", [3, 4]), ("last", [4])):
        done = run(*command.split(), "ckpts", "--force")
        assert done.returncode == 0 and "Nothing was scored" in done.stderr
        for name, tensor in load_file(tmp_path / "averaged.safetensors").items():
            expected = torch.stack([weights(step)[name] for step in chosen]).double().mean(dim=0).float()
            torch.testing.assert_close(tensor, expected, rtol=2**-23, atol=0)
    assert run("ema", "ckpts", "--decay", 0.5, "--force").returncode == 0
    for name, tensor in load_file(tmp_path / "averaged.safetensors").items():
        parts = zip((1 / 8, 1 / 8, 1 / 4, 1 / 2), range(1, 5), strict=True)
        expected = torch.stack([c * weights(step)[name].double() for c, step in parts]).sum(dim=0).float()
        torch.testing.assert_close(tensor, expected, rtol=2**-23, atol=2**-24)


@pytest.mark.parametrize("name", ["aswa", "best", "sewa", "soup", "twa"])
def test_search_without_a_task_is_a_usage_error(run: Run, ckpts: Path, name: str):
    done = run(name, "ckpts")
    assert done.returncode == 2 and "ckptavg init" in done.stderr


def test_swa_warns_that_batchnorm_statistics_were_averaged(run: Run, digits: Path):
    done = run("swa", digits)
    assert done.returncode == 0 and "BatchNorm" in done.stderr and "--task" in done.stderr


def test_metadata_holds_the_recipe_and_no_paths(ckpts: Path, tmp_path: Path):
    ckptavg.lawa(ckpts, k=2, output=tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["alias"] == "fc" and "n" not in metadata  # kept where all agree
    record = json.loads(metadata["ckptavg"])
    assert [(s["name"], s["step"], s["coefficient"]) for s in record["sources"]] == [
        ("step-3.safetensors", 3, 0.5), ("step-4.safetensors", 4, 0.5),
    ]  # fmt: skip
    assert all(algorithm_of(digest) for source in record["sources"] for digest in source["digests"].values())
    assert str(tmp_path) not in metadata["ckptavg"] and record["settings"] == {"by_run": False, "k": 2}


@pytest.mark.parametrize("name", ["out/", "there"])
def test_output_directory_gets_the_model_and_companion_files(run: Run, tmp_path: Path, name: str):
    for step in (10, 20):
        folder = trainer(tmp_path / "run" / f"checkpoint-{step}", step)
        (folder / "tokenizer.json").write_text(str(step))
        (folder / "generation_config.json").write_text("{}")
    (tmp_path / "there").mkdir()
    done = run("swa", "run", "-o", name)
    assert (done.returncode, done.stdout) == (0, f"{name.rstrip('/')}/model.safetensors\n")
    folder = tmp_path / name
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md",
    }  # fmt: skip
    assert (folder / "tokenizer.json").read_text() == "20"


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("avg.ckpt", "avg.safetensors"), ("a b/avg.PT", "a b/avg.safetensors"), ("x.pth.tar", "x.safetensors"),
        ("lr0.1.bin", "lr0.1.safetensors"), ("x.gguf", "x.safetensors"), ("x.svg", "x.safetensors"),
        ("x.safetensors.json", "x.safetensors"),
    ],
)  # fmt: skip
def test_an_output_named_after_another_format_is_refused_with_a_name_that_works(
    run: Run, ckpts: Path, tmp_path: Path, name: str, works: str
):
    (tmp_path / "a b").mkdir()
    suffix = Path(name).suffix
    message = f"error: --output {name}: a safetensors file is written, which no reader of {suffix} files can load\n"
    (tmp_path / "ckptavg.toml").write_text(f"output = '{name}'")
    for words, environment in (
        (("swa", "gone", "-o", name), {}), (("swa", "gone"), {}), (("swa", "gone"), {"CKPTAVG_OUTPUT": name}),
        (("compare", "gone", "--score-cmd", "true"), {}),
    ):  # fmt: skip
        done = run(*words, **environment)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    words = shlex.split(done.stderr.partition("hint: ")[2].replace(",", " "))
    assert words[:2] == ["-o", works] and run("swa", ckpts, *words[:2]).stdout == f"{works}\n"
    assert ("from_pretrained" in done.stderr) == (suffix == ".bin") and ("--report" in done.stderr) == (
        suffix == ".json"
    )


def test_an_unknown_suffix_is_a_part_of_the_name_and_a_directory_may_have_any(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "there.ckpt").mkdir()
    for name, path in (("avg.v2", "avg.v2"), ("x.pt/", "x.pt/model.safetensors"), ("there.ckpt",) * 2):
        done = run("swa", ckpts, "-o", name)
        assert done.returncode == 0 and done.stdout.startswith(path), done.stderr
    assert run("swa", ckpts, "-o", "sharded.ckpt", "--format", "dcp").returncode == 0


def test_failed_run_leaves_no_output_directory(ckpts: Path, tmp_path: Path):
    state = weights(9)
    state["fc.bias"][0] = float("nan")
    save_file(state, ckpts / "step-9.safetensors")
    with pytest.raises(ckptavg.CkptavgError, match="NaN"):
        ckptavg.swa(ckpts, output=f"{tmp_path}/out/")
    assert {p.name for p in tmp_path.iterdir()} == {"ckpts"}
    with pytest.raises(OutputError, match="no such directory"):
        ckptavg.swa(ckpts, output=f"{tmp_path}/far/out/")


def test_refuses_a_directory_with_a_sharded_model(ckpts: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OutputError, match=r"model\.safetensors\.index\.json: belongs to a sharded model"):
        ckptavg.swa(ckpts, output=tmp_path / "out")


def test_averages_a_sharded_pytorch_model(run: Run, tmp_path: Path):
    for step in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for i, (name, tensor) in enumerate(weights(step).items(), 1):
            torch.save({name: tensor}, folder / f"pytorch_model-0000{i}-of-00002.bin")
        shards = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in enumerate(weights(step), 1)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert run("swa", "run").returncode == 0
    written = load_file(tmp_path / "averaged.safetensors")
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, (weights(1)[name] + weights(2)[name]) / 2, rtol=2**-23, atol=0)
    done = run("verify", "averaged.safetensors", "--sources", "run")
    assert done.returncode == 0 and "2 tensors equal" in done.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(run: Run, digits: Path, tmp_path: Path):
    done = run("sewa", digits, "--dry-run", "--task", TASK)
    assert (done.returncode, done.stdout) == (0, "") and not list(tmp_path.iterdir())
    assert (
        "would read 24 candidates" in done.stderr
        and "24 candidates 0.97 MB + model 40.5 kB + gradient 40.5 kB" in done.stderr
    )


def test_restores_the_random_state_and_settings_of_the_caller(digits: Path, tmp_path: Path):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.backends.cudnn.benchmark
    ckptavg.sewa(digits, k=2, last=3, steps=2, task=TASK, output=tmp_path / "x", baselines=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_num_threads(), torch.backends.cudnn.benchmark) == before[1:]


def test_result_depends_on_the_seed_only(digits: Path, tmp_path: Path):
    def probabilities(seed: int) -> list[float]:
        result = ckptavg.sewa(digits, k=2, last=4, steps=5, task=TASK, output=tmp_path / "x", force=True, seed=seed)
        return [one.columns["s"] for one in result.candidates]

    assert probabilities(0) == probabilities(0) != probabilities(1)


def test_sewa_can_learn_on_training_data(digits: Path, tmp_path: Path):
    result = ckptavg.sewa(digits, k=2, last=4, steps=5, on="train", task=TASK, output=tmp_path / "x")
    assert result.settings["on"] == "train" and result.scored_on == "val"


@pytest.mark.parametrize("name", sorted(strategies()))
def test_every_strategy_is_a_function_with_its_settings_and_the_shared_options(name: str):
    function = getattr(ckptavg, name)
    parameters = inspect.signature(function).parameters
    assert {"ckpts", "output", "task", "device", "seed", "force", "last", "exclude"} <= set(parameters)
    assert set(inspect.signature(strategies()[name]).parameters) <= set(parameters) and name in dir(ckptavg)
    assert function.__doc__


def test_no_submodule_shadows_a_public_name():
    """Importing ``ckptavg.verify`` would replace the function of that name."""
    public = {name for name in dir(ckptavg) if not name.startswith("_")}
    assert not public & {module.name for module in pkgutil.iter_modules(ckptavg.__path__)}
    assert all(callable(getattr(ckptavg, name)) for name in public)


def test_run_accepts_a_strategy_object(ckpts: Path, tmp_path: Path):
    result = ckptavg.run(ckpts, LAWA(k=2), output=tmp_path / "x")
    assert result.strategy == "lawa" and [one.coefficient for one in result.candidates] == [0, 0, 0.5, 0.5]


def test_api_raises_the_errors_of_the_command_line(ckpts: Path, tmp_path: Path):
    ckptavg.swa(ckpts, output=tmp_path / "x")
    with pytest.raises(OutputExistsError, match="exists already") as caught:
        ckptavg.swa(str(ckpts), output=tmp_path / "x")
    assert caught.value.exit_code == 6
    with pytest.raises(AttributeError):
        _ = ckptavg.nonsense


def test_dtype_selects_float16_output_of_bfloat16_checkpoints(tmp_path: Path):
    for step in (1, 2):
        save_file({n: t.bfloat16() for n, t in weights(step).items()}, tmp_path / f"step-{step}.safetensors")
    ckptavg.swa(tmp_path, output=tmp_path / "same")
    ckptavg.swa(tmp_path, output=tmp_path / "half", dtype="float16")
    assert {t.dtype for t in load_file(tmp_path / "same").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / "half").values()} == {torch.float16}


def test_a_strategy_of_ones_own_runs_by_its_class_and_choices_are_checked(ckpts: Path, tmp_path: Path):
    class First(PlainAverage):
        def coefficients(self, n: int) -> Coefficients:
            return Coefficients.uniform([0], n)

    result = ckptavg.run(ckpts, dataclass(frozen=True)(First)(), output=tmp_path / "x")
    assert result.strategy == "First" and result.candidates[0].coefficient == 1
    with pytest.raises(ckptavg.CkptavgError, match="--optimizer must be one of adamw, sgd, not adam"):
        ckptavg.twa(ckpts, optimizer="adam", output=tmp_path / "y", task=TASK)

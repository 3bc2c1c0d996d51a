"""``ckptavg swag``: the files it writes, its report, what it refuses, and what it leaves on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task as demo_task
import torch
from conftest import TASK, Job, Run
from jobs import mlp
from peft_by_hand import save_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

import ckptavg
from ckptavg import candidates
from ckptavg.errors import UsageError
from ckptavg.pipeline import posterior_file, swag
from ckptavg.report.posterior import PosteriorResult

STEPS = range(1, 6)


def state(step: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(step)
    return {
        "fc.weight": torch.randn(30, 40, generator=draws), "fc.bias": torch.randn(30, generator=draws),
        "half": torch.randn(50, generator=draws).half(), "brain": torch.randn(50, generator=draws).bfloat16(),
        "frozen": torch.tensor([0.1, -0.0]), "mask": torch.full((4, 4), -torch.inf).triu(1),
        "count": torch.tensor(step), "bn.running_mean": torch.randn(4, generator=draws),
    }  # fmt: skip


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five checkpoints with tensors of every kind."""
    folder = tmp_path_factory.mktemp("swag") / "ckpts"
    folder.mkdir()
    for step in STEPS:
        save_file(state(step), folder / f"step-{step}.safetensors")
    return folder


@pytest.fixture
def ckpts(saved: Path, tmp_path: Path) -> Path:
    """A copy of them, ``./ckpts``."""
    return shutil.copytree(saved, tmp_path / "ckpts")


def data(path: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor of a file."""
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in load_file(path).items()}


def report(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_mean_is_the_file_of_swa_and_a_scale_of_0_gives_its_tensors(run: Run, ckpts: Path, tmp_path: Path):
    assert run("swa", "ckpts", "-o", "swa/").stdout == "swa/model.safetensors\n"
    done = run("swag", "ckpts", "-o", "out/", "--samples", 2, "--scale", 0)
    assert (done.returncode, done.stdout) == (0, "out/model.safetensors\n"), done.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "swa/model.safetensors").read_bytes()
    for sample in (1, 2):
        assert data(tmp_path / f"out/sample-{sample}/model.safetensors") == data(tmp_path / "swa/model.safetensors")


@pytest.fixture(scope="session")
def drawn(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three draws of the five checkpoints, their mean and their posterior."""
    folder = tmp_path_factory.mktemp("drawn")
    ckptavg.swag(saved, samples=3, output=f"{folder}/out/", posterior=folder / "posterior.safetensors")
    return folder


def test_the_report_has_the_gaussian_the_spread_and_the_files(run: Run, ckpts: Path, tmp_path: Path):
    found = report(run("swag", "ckpts", "-o", "out/", "--samples", 2, "--posterior", "p.safetensors", "--json"))
    assert found["gaussian"] == {"scale": 0.5, "deviations": 5, "covariance": "running", "seed": 0}
    assert 0 < found["spread"] < 10 and found["predictions"] == {}
    for output in (*found["draws"], found["posterior"], found["output"]):
        assert (tmp_path / output["path"]).stat().st_size == output["bytes"]
    assert [output["path"] for output in found["draws"]] == [f"out/sample-{i}/model.safetensors" for i in (1, 2)]
    assert [row["coefficient"] for row in found["candidates"]] == [0.2] * 5
    assert len({output["data_digest"] for output in (*found["draws"], found["output"])}) == 3


def test_a_few_deviations_are_called_few(run: Run, ckpts: Path):
    few = run("swag", "ckpts", "-o", "out/", "--samples", 1, "--deviations", 2)
    assert "2 deviations are few" in few.stderr and "covariance of 5 candidates, 2 deviations, scale 0.5" in few.stderr
    diagonal = run("swag", "ckpts", "-o", "other/", "--samples", 1, "--deviations", 0)
    assert "the diagonal alone, scale 1;" in diagonal.stderr and "few" not in diagonal.stderr


def test_every_draw_is_reproduced_and_numbers_and_seeds_give_others(ckpts: Path, drawn: Path, tmp_path: Path):
    again = ckptavg.swag(ckpts, samples=3, output=f"{tmp_path}/again/")
    more = ckptavg.swag(ckpts, samples=12, output=f"{tmp_path}/more/")
    assert [draw.path.parent.name for draw in more.draws[::11]] == ["sample-01", "sample-12"]
    for i in range(3):
        bytes_of = (drawn / f"out/sample-{i + 1}/model.safetensors").read_bytes()
        assert bytes_of == again.draws[i].path.read_bytes()
        assert data(again.draws[i].path) == data(more.draws[i].path)
    other = ckptavg.swag(ckpts, samples=1, seed=1, output=f"{tmp_path}/seed/")
    assert len({draw.data_digest for draw in (*more.draws, *other.draws)}) == 13


def test_shards_have_the_tensors_of_one_file(run: Run, ckpts: Path, drawn: Path, tmp_path: Path):
    assert run("swag", "ckpts", "-o", "out/", "--samples", 2, "--max-shard-size", "2KB").returncode == 0
    for sample in (1, 2):
        folder = tmp_path / f"out/sample-{sample}"
        shards = [data(path) for path in folder.glob("model-*.safetensors")]
        assert len(shards) > 1 and {name: t for shard in shards for name, t in shard.items()} == data(
            drawn / f"out/sample-{sample}/model.safetensors"
        )
        assert run("verify", folder / "model.safetensors.index.json", "--sources", "ckpts").returncode == 0


def test_tensors_that_are_not_drawn_are_those_of_swa(drawn: Path):
    mean, draw = (load_file(drawn / f"out{sample}/model.safetensors") for sample in ("", "/sample-1"))
    for name in ("frozen", "mask", "count", "bn.running_mean"):
        assert torch.equal(mean[name], draw[name]) and torch.signbit(mean[name]).equal(torch.signbit(draw[name]))
    for name in ("fc.weight", "fc.bias", "half", "brain"):
        assert (mean[name] != draw[name]).float().mean() > 0.9 and mean[name].dtype == draw[name].dtype


def test_the_dtype_of_draws_is_the_one_asked_for(run: Run, ckpts: Path, drawn: Path, tmp_path: Path):
    """A draw in bfloat16 is that in float32, rounded: the chance that two roundings differ is 2⁻¹⁶ each."""
    assert run("swag", "ckpts", "-o", "out/", "--samples", 1, "--dtype", "bfloat16").returncode == 0
    narrow = load_file(tmp_path / "out/sample-1/model.safetensors")
    wide = load_file(drawn / "out/sample-1/model.safetensors")
    assert {t.dtype for t in narrow.values()} == {torch.bfloat16, torch.int64}
    assert torch.equal(narrow["fc.weight"], wide["fc.weight"].bfloat16())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_candidates_in_dcp_give_the_draws_of_safetensors(run: Run, saved: Path, drawn: Path, tmp_path: Path):
    (tmp_path / "dcp").mkdir()
    for step in STEPS:
        tensors = load_file(saved / f"step-{step}.safetensors")
        save(tensors, storage_writer=FileSystemWriter(tmp_path / f"dcp/step-{step}"), no_dist=True)
    done = run("swag", "dcp", "-o", "out/", "--samples", 1)
    assert done.returncode == 0, done.stderr
    assert data(tmp_path / "out/sample-1/model.safetensors") == data(drawn / "out/sample-1/model.safetensors")


@pytest.mark.parametrize("options", [(), ("--deviations", 0), ("--covariance", "sample"), ("--dtype", "float16")])
def test_every_draw_is_verified(run: Run, ckpts: Path, options: tuple[Any, ...]):
    found = report(run("swag", "ckpts", "-o", "out/", "--samples", 2, "--json", *options))
    for draw in (found["output"], *found["draws"]):
        done = run("verify", draw["path"], "--sources", "ckpts")
        assert done.returncode == 0 and "8 tensors equal" in done.stderr, done.stderr


def tampered(path: Path, change: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Rewrite the metadata of a draw."""
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    record = json.loads(metadata["ckptavg"])
    record |= change or {}
    record["settings"] |= settings or {}
    save_file(load_file(path), path, {**metadata, "ckptavg": json.dumps(record)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": 2}, "the coefficients of 5 sources are not those of draw 2"),
        ({"seed": 1}, "are not those of draw 1"),
        ({"scale": 0.6}, "are not those of draw 1"),
        ({"covariance": "sample"}, "are not those of draw 1"),
        ({"deviations": 4}, "are not those of draw 1"),
        ({"sample": 0}, "settings.sample cannot be 0"),
        ({"sample": True}, "settings.sample cannot be True"),
        ({"deviations": 10**9}, "settings.deviations cannot be 1000000000"),
        ({"deviations": 1}, "settings.deviations cannot be 1"),
        ({"scale": -1}, "settings.scale cannot be -1"),
        ({"scale": "x"}, "settings.scale cannot be x"),
        ({"covariance": []}, "settings.covariance cannot be"),
        ({"more": 1}, "settings.more is no setting of a draw"),
    ],
    ids=str,
)
def test_a_draw_with_other_settings_is_refused(
    run: Run, saved: Path, drawn: Path, tmp_path: Path, settings: Mapping[str, Any], message: str
):
    path = shutil.copy(drawn / "out/sample-1/model.safetensors", tmp_path / "draw.safetensors")
    tampered(path, settings=settings)
    done = run("verify", path, "--sources", saved)
    assert done.returncode == 3 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_draw_of_another_coefficient_or_byte_is_found(run: Run, saved: Path, drawn: Path, tmp_path: Path):
    path = shutil.copy(drawn / "out/sample-1/model.safetensors", tmp_path / "draw.safetensors")
    with safe_open(path, "pt") as stored:
        sources = json.loads(stored.metadata()["ckptavg"])["sources"]
    sources[0]["coefficient"][0] += 1e-6
    sources[1]["coefficient"][0] -= 1e-6
    tampered(path, {"sources": sources})
    assert "are not those of draw 1" in run("verify", path, "--sources", saved).stderr
    shutil.copy(drawn / "out/sample-1/model.safetensors", path)
    flipped = bytearray(path.read_bytes())
    flipped[flipped.index(data(path)["fc.bias"][:32])] ^= 1
    path.write_bytes(flipped)
    done = run("verify", path, "--sources", saved)
    assert done.returncode == 3 and "1 tensor not equal" in done.stderr and "fc.bias" in done.stderr


def test_a_draw_with_a_prefix_of_another_tensor_in_its_second_group_is_refused(
    run: Run, saved: Path, drawn: Path, tmp_path: Path
):
    path = shutil.copy(drawn / "out/sample-1/model.safetensors", tmp_path / "draw.safetensors")
    tampered(path, {"groups": [[""], ["bn.running_mean", "fc"]]})
    done = run("verify", path, "--sources", saved)
    assert done.returncode == 3 and "not equal" in done.stderr, done.stderr


REFUSED: Mapping[str, tuple[int, str, tuple[Any, ...]]] = {
    "samples in a file": (2, "--samples 2 writes models in a directory", ("--samples", 2)),
    "one deviation": (2, "--deviations", ("--deviations", 1)),
    "more deviations than candidates": (2, "--deviations 20 asks for more than the 5 candidates", ("--deviations", 20)),
    "one candidate": (2, "swag needs at least 2 candidates", ("--last", 1)),
    "no samples": (2, "--samples", ("--samples", 0, "-o", "out/")),
    "a negative scale": (2, "--scale", ("--scale", -1)),
    "a scale that is none": (2, "must be a number or auto", ("--scale", "half")),
    "a scale of no task": (2, "--scale auto chooses by the NLL", ("--scale", "auto")),
    "an exact adapter": (2, "No such option", ("--adapter", "exact")),
    "from without samples": (2, "so it needs --samples N", ("--from", "p.safetensors")),
    "from with candidates": (2, "--from draws from a file", ("--from", "p.safetensors", "--samples", 1, "-o", "out/")),
    "the posterior over a candidate": (
        6, "is one of the candidates", ("--posterior", "ckpts/step-1.safetensors", "--force")
    ),
    "the posterior over the output": (6, "is -o", ("--posterior", "averaged.safetensors")),
    "a posterior that exists": (6, "notes.safetensors: exists already", ("--posterior", "ckpts/notes.safetensors")),
    "another format": (2, "hint: --posterior p.safetensors", ("--posterior", "p.pt")),
    "a posterior in a directory": (2, "hint: --posterior p.safetensors", ("--posterior", "p/")),
    "an empty name": (2, "--posterior is empty", ("--posterior", "")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_and_writes_nothing(run: Run, ckpts: Path, tmp_path: Path, case: str):
    code, message, options = REFUSED[case]
    if "exists" in case:
        shutil.copy(ckpts / "step-1.safetensors", ckpts / "notes.safetensors")
        options = (*options, "--include", "step-*")
    before = files(tmp_path)
    done = run("swag", "ckpts", *options, COLUMNS="200")
    assert (done.returncode, done.stdout, files(tmp_path)) == (code, "", before), done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_no_candidates_and_no_posterior_is_a_usage_error(run: Run):
    done = run("swag")
    assert done.returncode == 2 and "give the checkpoints, or --from FILE" in done.stderr


def test_several_runs_are_refused_with_a_way_out(run: Run, ckpts: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    for step in STEPS:
        save_file(state(10 * step), tmp_path / f"other/step-{step}.safetensors")
    done = run("swag", "ckpts", "other")
    assert done.returncode == 2 and "are of several runs" in done.stderr and "MultiSWAG" in done.stderr


def test_draws_that_exist_are_replaced_with_force_alone(run: Run, ckpts: Path, drawn: Path, tmp_path: Path):
    shutil.copytree(drawn / "out/sample-1", tmp_path / "out/sample-2")
    done = run("swag", "ckpts", "-o", "out/", "--samples", 2)
    assert done.returncode == 6 and "out/sample-2/model.safetensors: exists already" in done.stderr
    assert files(tmp_path / "out") == ["sample-2/model.safetensors"]
    assert run("swag", "ckpts", "-o", "out/", "--samples", 2, "--force").returncode == 0
    assert data(tmp_path / "out/sample-2/model.safetensors") == data(drawn / "out/sample-2/model.safetensors")


def test_a_dry_run_says_what_would_be_drawn_and_writes_nothing(run: Run, ckpts: Path, drawn: Path, tmp_path: Path):
    before = files(tmp_path)
    for options in (("ckpts",), ("--from", drawn / "posterior.safetensors")):
        done = run("swag", *options, "--samples", 3, "-o", "out/", "--dry-run")
        assert done.returncode == 0 and "3 draws" in done.stderr and files(tmp_path) == before, done.stderr


def test_outputs_among_the_checkpoints_are_left_out(run: Run, ckpts: Path, drawn: Path):
    shutil.copytree(drawn / "out", ckpts / "drawn")
    shutil.copytree(drawn / "out/sample-2", ckpts / "step-9")
    shutil.copy(drawn / "posterior.safetensors", ckpts / "step-7.safetensors")
    found = json.loads(run("inspect", "ckpts", "--json").stdout)
    assert [Path(row["path"]).name for row in found["candidates"]] == [f"step-{step}.safetensors" for step in STEPS]
    reasons = {Path(file["path"]).name: file["reason"] for file in found["left_out"]}
    assert reasons["step-7.safetensors"] == reasons["step-9"] == "an earlier output of ckptavg"


def test_a_failed_run_leaves_nothing(run: Run, ckpts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk is full at the third draw or the posterior, or Ctrl-C comes at the mean; a file that was there stays."""
    (tmp_path / "mine").write_text("precious")
    before = files(tmp_path)
    write = swag.write_output
    full = OSError(28, "No space left on device")
    for failing, error in ((3, full), (4, KeyboardInterrupt()), ("posterior", full)):
        calls = list[int]()

        def fail(
            *words: Any, failing: Any = failing, calls: list[int] = calls, error: BaseException = error, **named: Any
        ) -> Any:
            calls.append(1)
            if len(calls) == failing:
                raise error
            return write(*words, **named)

        def unwritten(*_: Any, error: BaseException = error) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(swag, "write_output", fail)
            if failing == "posterior":
                patch.setattr(posterior_file, "_parts", unwritten)
            with pytest.raises(type(error)):
                ckptavg.swag(ckpts, samples=3, output=f"{tmp_path}/out/", posterior=tmp_path / "p.safetensors")
        assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_failure_keeps_what_it_would_have_replaced(ckpts: Path, drawn: Path, tmp_path: Path):
    shutil.copytree(drawn / "out", tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    with pytest.raises(UsageError):
        ckptavg.swag(ckpts, samples=3, output=f"{tmp_path}/out/", force=True, scale="auto")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before


def test_the_python_function_gives_what_the_command_gives(run: Run, ckpts: Path, tmp_path: Path):
    shown = report(run("swag", "ckpts", "-o", "out/", "--samples", 2, "--covariance", "sample", "--json"))
    found = ckptavg.swag(ckpts, samples=2, covariance="sample", output=f"{tmp_path}/python/")
    assert isinstance(found, PosteriorResult) and found.gaussian == shown["gaussian"]
    assert [draw.data_digest for draw in found.draws] == [draw["data_digest"] for draw in shown["draws"]]
    assert found.spread == pytest.approx(shown["spread"])
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"deviation": 2}, "has no option 'deviation'"), ({"scale": "x"}, "--scale"), ({"adapter": "exact"}, "adapter"),
    ]  # fmt: skip
    for options, message in mistakes:
        with pytest.raises(UsageError, match=message):
            ckptavg.swag(ckpts, **options)


def test_batchnorm_is_recomputed_for_every_draw(run: Run, digits: Path, tmp_path: Path):
    """Statistics are those of the activations of each draw's own weights, computed without ckptavg's code."""
    options = ("--task", TASK, "-o", "out/", "--samples", 2, "--draws", 0)
    found = report(run("swag", digits, "--last", 4, *options, "--json"))
    images = torch.cat([images for images, _ in demo_task.train_dataloader()])
    means = list[Tensor]()
    for draw in found["draws"]:
        assert run("verify", draw["path"], "--sources", digits).returncode == 0
        tensors = load_file(tmp_path / draw["path"])
        activations = torch.nn.functional.conv2d(images, tensors["0.weight"], tensors["0.bias"], padding=1)
        means.append(tensors["1.running_mean"])
        torch.testing.assert_close(means[-1], activations.mean(dim=(0, 2, 3)), rtol=0.05, atol=0.02)
    assert not torch.allclose(*means, rtol=0.02)
    mean = load_file(tmp_path / found["output"]["path"])
    assert not any(torch.equal(each, mean["1.running_mean"]) for each in means)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of this function
def test_a_draw_has_the_spectral_norm_of_its_own_weight(run: Run, tmp_path: Path):
    """By numpy's SVD; a posterior, which has no vectors of a drawn weight, is refused."""
    torch.manual_seed(0)
    layer = torch.nn.utils.spectral_norm(torch.nn.Linear(6, 5))
    (tmp_path / "ckpts").mkdir()
    for step in STEPS:
        with torch.no_grad():
            layer.weight_orig.add_(0.2 * torch.randn(5, 6))
        for _ in range(50):
            layer(torch.ones(1, 6))
        torch.save(layer.state_dict(), tmp_path / f"ckpts/step-{step}.pt")
    found = report(run("swag", "ckpts", "-o", "out/", "--samples", 2, "--json"))
    for draw in found["draws"]:
        tensors = load_file(tmp_path / draw["path"])
        sigma = tensors["weight_u"].double() @ tensors["weight_orig"].double() @ tensors["weight_v"].double()
        assert float(sigma) == pytest.approx(np.linalg.svd(tensors["weight_orig"].numpy())[1][0], rel=1e-6)
        assert run("verify", draw["path"], "--sources", "ckpts").returncode == 0
    refused = run("swag", "ckpts", "-o", "other/", "--posterior", "p.safetensors")
    assert refused.returncode == 2 and "spectral norm, such as weight_u" in refused.stderr


def test_draws_of_adapters_are_adapters_of_their_rank(run: Run, tmp_path: Path):
    folder = save_adapters(tmp_path / "run")
    found = report(run("swag", folder, "-o", "out/", "--samples", 2, "--json"))
    config = (folder / "checkpoint-3/adapter_config.json").read_text()
    for draw in found["draws"]:
        path = tmp_path / draw["path"]
        assert path.name == "adapter_model.safetensors"
        assert json.loads((path.parent / "adapter_config.json").read_text()) == json.loads(config)
        written, own = load_file(path), load_file(folder / "checkpoint-3/adapter_model.safetensors")
        assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in own.items()}
        assert run("verify", path, "--sources", folder).returncode == 0


NARROW = """
import sys
sys.path.insert(0, {tests!r})
from jobs.mlp import *
from jobs import mlp
def model(): return mlp.model().bfloat16()
def loss(model, batch): return mlp.loss(model, [batch[0].bfloat16(), batch[1]])
def metric(model, batch): return mlp.metric(model, [batch[0].bfloat16(), batch[1]])
"""


@pytest.mark.parametrize("kind", ["cnn", "mlp", "transformer", "bfloat16"])
def test_the_predictions_of_a_draw_are_those_of_its_file(
    run: Run, jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """Noise is added to the weights of the model as it is to the bytes of the file; BatchNorm is recomputed in both."""
    monkeypatch.setattr(candidates, "COLUMNS", 50)  # elements that get noise at a time
    job = jobs["mlp" if kind == "bfloat16" else kind]
    (tmp_path / "narrow.py").write_text(NARROW.format(tests=str(Path(mlp.__file__).parents[1])))
    task = tmp_path / "narrow.py" if kind == "bfloat16" else job.task
    words = ("swag", job.folder, "--last", 3, "--task", task, "-o", "out/", "--samples", 1, "--no-baselines")
    found = report(run(*words, "--draws", 1, "--json"))
    (scored,) = json.loads(run("eval", "out/sample-1/model.safetensors", "--task", task, "--json").stdout)["files"]
    loss = found["predictions"]["val"]["swag"]["score"]["loss"]
    assert loss == pytest.approx(scored["val"]["loss"], rel=1e-5)
    assert abs(loss / found["predictions"]["val"]["swa"]["score"]["loss"] - 1) > 1e-3


def test_predictions_are_scored_on_every_split(run: Run, jobs: dict[str, Job]):
    found = report(run("swag", jobs["mlp"].folder, "--last", 5, "--task", jobs["mlp"].task, "--draws", 3, "--json"))
    for split in ("val", "test"):
        table = found["predictions"][split]
        assert [table[name]["models"] for name in ("last", "swa", "swag")] == [1, 1, 3]
        assert table["swa"]["score"]["loss"] == pytest.approx(found["scores"][split]["loss"], abs=1e-6)
        assert table["last"]["score"]["loss"] == pytest.approx(found["baselines"]["last"][split]["loss"], abs=1e-6)
    assert found["draws"] == [] and found["spread"] > 0


def test_draws_of_another_run_are_not_mixed_with_new_ones(run: Run, ckpts: Path, tmp_path: Path):
    assert run("swag", "ckpts", "--samples", 3, "-o", "out/").returncode == 0
    before = files(tmp_path)
    for samples in (2, 10):
        done = run("swag", "ckpts", "--samples", samples, "-o", "out/", "--force")
        assert done.returncode == 6 and "is of another run" in done.stderr, done.stderr
        assert files(tmp_path) == before
    assert run("swag", "ckpts", "--samples", 3, "-o", "out/", "--force").returncode == 0


def test_a_scale_of_0_is_the_mean_and_is_called_that(run: Run, jobs: dict[str, Job]):
    done = run("swag", jobs["mlp"].folder, "--last", 5, "--task", jobs["mlp"].task, "--draws", 3, "--scale", 0)
    assert done.returncode == 0 and "scale 0: every draw is the mean" in done.stderr
    assert "hardly differ" not in done.stderr and "swag: 1 draw, scale 0" in done.stderr
    done = run(
        "swag", jobs["mlp"].folder, "--last", 5, "--task", jobs["mlp"].task, "--draws", 1, "-o", "one.safetensors"
    )
    assert done.returncode == 0 and "every draw is the mean" not in done.stderr, done.stderr


def test_a_scale_is_not_chosen_by_scores_and_none_is_measured(run: Run, ckpts: Path, tmp_path: Path):
    done = run("swag", "ckpts", "--score-cmd", "touch ran; echo 1", "--scale", "auto")
    assert done.returncode == 2 and "a task with a loss, not scores alone" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_draws_from_a_file_take_no_option_of_candidates(run: Run, ckpts: Path, tmp_path: Path):
    assert run("swag", "ckpts", "--posterior", "p.safetensors").returncode == 0
    drawn = ("swag", "--from", "p.safetensors", "--samples", 1, "-o", "out/")
    for words in (("--last", 3), ("--exclude", "step-1"), ("--holdout", 0.5)):
        done = run(*drawn, *words)
        assert done.returncode == 2 and f"{words[0]} has no use with --from" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and run(*drawn, "--seed", 1, "--dtype", "float64").returncode == 0

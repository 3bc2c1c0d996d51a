"""The Python API: text paths, objects as a task, mistakes in a call, and the display of results."""

from __future__ import annotations

import json
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Job
from jobs import mlp
from torch import nn

import ckptavg
from ckptavg.errors import TaskError, UsageError
from ckptavg.report.as_json import to_dict
from ckptavg.report.result import CandidateResult, Comparison, Result
from ckptavg.strategies import specs

VAL = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture(scope="session")
def compared(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A comparison whose paths are texts and whose task is of objects."""
    output = tmp_path_factory.mktemp("api") / "best.safetensors"
    task: dict[str, Any] = {"model": mlp.model, "loss": loss, "val": mlp.val_dataloader(), "metric": mlp.metric}
    return ckptavg.compare(str(jobs["mlp"].folder), "last, swa", last=np.int64(3), output=str(output), **task)


def test_objects_give_the_file_and_the_report_of_a_task_file(jobs: dict[str, Job], tmp_path: Path):
    """The model is a module, which stays as it is; loaders are a DataLoader, a function and a list."""
    net = mlp.model().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    common: dict[str, Any] = {"last": 4, "steps": 5, "k": 2, "device": torch.device("cpu")}
    given = ckptavg.sewa(
        jobs["mlp"].folder, model=net, loss=mlp.loss, metric=mlp.metric, val=mlp.val_dataloader(),
        train=mlp.train_dataloader, test=[*mlp.test_dataloader()], output=tmp_path / "a", **common,
    )  # fmt: skip
    written = ckptavg.sewa([jobs["mlp"].folder], task=jobs["mlp"].task, output=tmp_path / "b", **common)
    assert given.output and written.output and given.output.data_digest == written.output.data_digest
    assert (given.scores, given.verdict, given.trace) == (written.scores, written.verdict, written.trace)
    assert net.training and all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    scored = ckptavg.evaluate(str(tmp_path / "a"), model=net, loss=loss, val=mlp.val_dataloader)
    assert scored.files[0].scores["val"].loss == pytest.approx(given.scores["val"].loss, abs=1e-6)


def test_a_forward_of_objects_serves_loss_and_metric(jobs: dict[str, Job]):
    def score(**functions: Any) -> tuple[Any, int]:
        net, calls = mlp.model(), list[int]()

        def forward(model: nn.Module, batch: Any) -> torch.Tensor:
            calls.append(1)
            return model(batch[0])

        functions |= {"forward": forward} if functions else {"loss": loss, "metric": lambda m, b: m(b[0]).sum(dim=1)}
        done = ckptavg.evaluate(jobs["mlp"].folder, model=net, val=mlp.val_dataloader, **functions)
        return [(each.scores["val"].loss, each.scores["val"].metric) for each in done.files], len(calls)

    by_output, calls = score(
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1], reduction="none"),
        metric=lambda output, batch: output.sum(dim=1),
    )
    assert by_output == score()[0] and calls == len(by_output) * len(mlp.val_dataloader())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kk": 3}, r"sewa\(\) has no option 'kk' hint: did you mean 'k'"),
        ({"k": "five"}, "--k must be a whole number or 'auto', not 'five'"),
        ({"last": 2.5}, "--last must be a whole number, not 2.5"),
        ({"seed": None}, "--seed must be a whole number, not None"),
        ({"keep": 3}, "--keep must be a list of texts, not 3"),
        ({"force": "no"}, "--force must be True or False, not 'no'"),
        ({"model": {}}, "model must be a torch.nn.Module or a function that returns one, not dict"),
        ({"loss": None}, "needs model, loss and val: model, val given, loss missing"),
        ({"loss": nn.CrossEntropyLoss()}, "must be a function of .model, batch., not the module CrossEntropyLoss"),
        ({"loss": lambda batch: batch}, r"loss is called as loss\(model, batch\), but the one given takes \(batch\)"),
        ({"val": iter(VAL)}, r"val is an iterator \(list_iterator\), which can be read only once"),
        ({"val": mlp.val_dataloader().dataset}, r"val is a dataset, not its batches hint: val=DataLoader\(val"),
        ({"val": VAL[0]}, r"val must be batches, not tuple hint: .*val=\[\(inputs, labels\)\]"),
        ({"val": "val.jsonl"}, "val is a path, but with model and loss it must be batches"),
        ({"val": 3}, "val must be batches, not int"),
        ({"task": "task.py"}, "--task and model each define how a mixture is scored"),
        ({"model": lambda: 3}, r"model\(\) must return a torch.nn.Module, not int"),
        ({"loss": lambda model, batch: model.no}, r"test_api.py:\d+: in loss, batch 1 of val_dataloader: Attribute"),
        ({"ckpts": 5}, "checkpoints must be paths, not 5"),
        ({"ckpts": []}, "checkpoints must be at least one path"),
    ],
)
def test_a_mistake_in_a_call_is_one_line_with_its_hint(jobs: dict[str, Job], tmp_path: Path, change: Any, message: str):
    call: dict[str, Any] = {"ckpts": jobs["mlp"].folder, "model": mlp.model, "loss": loss, "val": VAL, "last": 2}
    with pytest.raises((UsageError, TaskError)) as caught:
        ckptavg.sewa(**call | {"output": tmp_path / "x", "k": 1} | change)
    shown = " ".join("".join(traceback.format_exception_only(caught.value)).split())
    assert re.search(message, shown), shown


def test_other_functions_refuse_options_that_they_do_not_take(jobs: dict[str, Job]):
    for call, message in (
        (lambda: ckptavg.evaluate("x", force=True), r"evaluate\(\) has no option 'force'"),
        (lambda: ckptavg.compare("x", baselines=False), r"compare\(\) has no option 'baselines'"),
        (lambda: ckptavg.check("x", output="y"), r"check\(\) has no option 'output'"),
        (lambda: ckptavg.inspect("x", lastt=3), r"inspect\(\) has no option 'lastt'"),
        (lambda: ckptavg.run("x", "sop"), "no strategy 'sop'"),
        (lambda: specs([3]), "strategies must be texts"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_every_key_of_a_report_is_an_attribute_of_the_result(compared: Comparison, jobs: dict[str, Job]):
    path = str(compared.output.path) if compared.output else ""
    evaluated = ckptavg.evaluate(path, model=mlp.model, loss=loss, val=VAL)
    verified = ckptavg.verify(path, sources=str(jobs["mlp"].folder))
    inspected = ckptavg.inspect(str(jobs["mlp"].folder), last=2)
    for result in (compared, evaluated, verified, inspected):
        report = to_dict(result)
        assert all(hasattr(result, key) for key in report.keys() - {"schema_version", "run"}), report.keys()
        assert json.loads(result.to_json()) == result.to_dict() == report
    for strategy, row in zip(compared.strategies, to_dict(compared)["strategies"], strict=True):
        assert vars(strategy).keys() == row.keys()
    assert [one["step"] for one in inspected.candidates] == [65, 70] and "step-70.pt" in str(inspected)
    assert "4 tensors equal to the average" in str(verified) and not verified.differ
    assert f"{evaluated.files[0].scores['val'].loss:.4f}" in str(evaluated)
    checked = ckptavg.check(str(jobs["mlp"].folder), model=mlp.model(), loss=loss, val=mlp.val_dataloader, last=2)
    assert "the last of 2 candidates" in str(checked) and not checked.problems


def test_a_result_prints_its_verdict_and_a_small_table(compared: Comparison):
    text = str(compared)
    assert " ".join(compared.verdict.split()) in " ".join(text.split()) and "swa" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80 and "candidates\n" not in text
    assert repr(compared) == f"<Comparison {compared.winner} {compared.output.path if compared.output else ''}>"


def test_a_notebook_shows_the_whole_report_with_names_escaped(compared: Comparison):
    html = compared._repr_html_()
    assert "3 candidates" in html and compared.strategies[0].name in html and html.startswith("<pre")
    candidate = CandidateResult(path=Path("<script>[red].pt"), step=1, coefficient=1.0)
    html = Result(strategy="swa", settings={}, seed=0, candidates=[candidate])._repr_html_()
    assert "&lt;script&gt;[red].pt" in html and "<script" not in html


def test_a_table_for_pandas_has_a_row_per_strategy_or_candidate(compared: Comparison, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="needs pandas") as caught:
        compared.to_pandas()
    assert caught.value.hint == "pip install pandas"
    monkeypatch.undo()
    pytest.importorskip("pandas")
    rows = compared.to_pandas()
    assert [*rows["name"]] == [one.name for one in compared.strategies]
    assert [*rows["scores.val.loss"]] == [one.scores["val"].loss for one in compared.strategies]


class Kernel(ModuleType):
    """IPython, as a notebook's kernel imports it."""

    @staticmethod
    def get_ipython() -> SimpleNamespace:
        return SimpleNamespace(kernel=object())


def test_progress_shows_in_a_notebook_and_not_in_a_script(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    call: dict[str, Any] = {"ckpts": jobs["mlp"].folder, "model": mlp.model, "loss": loss, "val": VAL, "last": 3}
    ckptavg.soup(output=tmp_path / "a", **call)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "IPython", Kernel("IPython"))
    ckptavg.soup(output=tmp_path / "b", **call)
    lines = capsys.readouterr().out.split("\r")
    assert any(line.startswith("growing the soup 2/2") for line in lines) and not lines[-1].strip(), lines
    stages: list[str] = []
    ckptavg.soup(output=tmp_path / "c", watch=lambda stage, *_: stages.append(stage), **call)
    assert stages and not capsys.readouterr().out


@pytest.mark.parametrize("module", [True, False])
def test_an_interrupted_run_without_a_task_file_is_never_resumed(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: bool
):
    """Nothing tells whether its functions and data are the same, so scores of the first loss must not be used."""
    calls = 0

    def failing(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss(model, batch) + 5

    def task(function: Any) -> dict[str, Any]:
        if not module:
            return {"model": mlp.model, "loss": function, "val": VAL}
        cell = ModuleType("cell")  # as `__main__` of a notebook is
        vars(cell).update(model=mlp.model, loss=function, val_dataloader=lambda: VAL)
        monkeypatch.setitem(sys.modules, "cell", cell)
        return {"task": "cell"}

    common: dict[str, Any] = {"ckpts": jobs["mlp"].folder, "last": 3, "output": tmp_path / "x"}
    with pytest.raises(KeyboardInterrupt):
        ckptavg.best(**common, **task(failing))
    assert not list(tmp_path.iterdir())
    assert all(
        (score := one.score) and score.loss and score.loss < 5
        for one in ckptavg.best(**common, **task(loss)).candidates
    )

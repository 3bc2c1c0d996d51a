"""PythonTask: lookup, import like a script, and errors attributed to the function that failed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptavg.errors import TaskError, UsageError
from ckptavg.tasks.python_file import PythonTask

BODY = """
import torch
from torch import nn
def model(): return nn.Linear(2, 1)
def loss(model, batch): return model(batch).mean()
def val_dataloader(): return [torch.ones(3, 2), torch.ones(1, 2)]
"""


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    modules, path = dict(sys.modules), [*sys.path]
    yield
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]
    sys.path[:] = path


def written(folder: Path, body: str = BODY, name: str = "mine.py") -> str:
    (folder / name).write_text(body)
    return str(folder / name)


def test_the_functions_of_the_file_are_used(tmp_path: Path):
    task = PythonTask(written(tmp_path))
    assert isinstance(task.model(), torch.nn.Linear)
    assert [len(batch) for batch in task.batches("val")] == [3, 1] == [len(batch) for batch in task.batches("val")]
    assert task.has("val") and not task.has("train") and not task.has("test")
    assert (task.metric, task.metric_goal, task.examples("val"), task.examples("train")) == (None, "max", None, None)


def test_an_iterator_loader_is_created_for_each_pass(tmp_path: Path):
    task = PythonTask(
        written(tmp_path, BODY.replace("return [torch", "return iter([torch").replace("1, 2)]", "1, 2)])"))
    )
    assert [len(list(task.batches("val"))) for _ in range(3)] == [2, 2, 2]


def test_other_loaders_are_created_once(tmp_path: Path):
    task = PythonTask(
        written(
            tmp_path, f"{BODY}made = []\ndef train_dataloader():\n    made.append(1)\n    return [1]\n", "made_once.py"
        )
    )
    for _ in range(3):
        list(task.batches("train"))
    assert sys.modules["made_once"].made == [1]


def test_sibling_modules_can_be_imported(tmp_path: Path):
    (tmp_path / "neighbour_of_mine.py").write_text("from torch import nn\nclass Net(nn.Linear): ...\n")
    source = written(tmp_path, "from neighbour_of_mine import Net\n" + BODY.replace("nn.Linear(2", "Net(2"))
    assert type(PythonTask(source).model()).__name__ == "Net"


def test_the_file_may_share_its_name_with_a_loaded_module(tmp_path: Path):
    assert PythonTask(written(tmp_path, name="json.py")).has("val")
    import json

    assert json.dumps(1) == "1"


def test_training_data_alone_is_sufficient(tmp_path: Path):
    task = PythonTask(written(tmp_path, BODY.replace("val_dataloader", "train_dataloader")))
    assert task.has("train") and not task.has("val")


def test_an_error_in_a_helper_names_the_calling_line_of_the_task(tmp_path: Path):
    (tmp_path / "helper_of_mine.py").write_text("def fail():\n    raise ZeroDivisionError('deep')\n")
    source = written(tmp_path, "from helper_of_mine import fail\n" + BODY.replace("model(batch).mean()", "fail()"))
    with pytest.raises(TaskError, match=r"mine\.py:6: in loss: ZeroDivisionError: deep"):
        PythonTask(source).loss(torch.nn.Linear(2, 1), torch.ones(1, 2))


def test_an_error_while_loading_data_names_the_loader(tmp_path: Path):
    body = BODY.replace(
        "return [torch.ones(3, 2), torch.ones(1, 2)]", "\n    yield torch.ones(1, 2)\n    raise OSError('gone')"
    )
    with pytest.raises(TaskError, match=r"in val_dataloader, batch 2: OSError: gone"):
        list(PythonTask(written(tmp_path, body)).batches("val"))


def test_running_out_of_memory_is_not_blamed_on_the_task(tmp_path: Path):
    task = PythonTask(written(tmp_path, BODY.replace("model(batch).mean()", "(_ for _ in ()).throw(MemoryError())")))
    with pytest.raises(MemoryError):
        task.loss(torch.nn.Linear(2, 1), torch.ones(1, 2))


def test_a_missing_file_or_module_is_a_usage_error(tmp_path: Path):
    with pytest.raises(UsageError, match="no such task file"):
        PythonTask(str(tmp_path / "gone.py"))
    with pytest.raises(UsageError, match="called no_such_module_here"):
        PythonTask("no_such_module_here")


@pytest.mark.parametrize("bounds", ["1.0", "(1.0, 0.0)", "(0, 'one')", "(0.0, float('nan'))", "(0, 1, 2)"])
def test_metric_bounds_must_be_two_increasing_numbers(tmp_path: Path, bounds: str):
    with pytest.raises(TaskError, match="metric_bounds must be two numbers"):
        PythonTask(written(tmp_path, BODY + f"metric_bounds = {bounds}\n"))
    assert PythonTask(written(tmp_path, BODY + "metric_bounds = [0, 1]\n")).metric_bounds == (0.0, 1.0)

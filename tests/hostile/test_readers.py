"""Tests of the readers called from Python: each refuses a hostile input by an error of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch_archives import values

from ckptavg.errors import InputError
from ckptavg.readers import open_reader
from hostile.case import Case
from hostile.corpus import corpus

READ = ("index", "dcp", "zero")  # of directories; others are found out about before anything in them is read
SLOW = ("bomb", "deep", "huge", "many", "100000", "million")
ELSEWHERE = (  # what is found out before a reader opens it, or by who looks for a model or at values in what it read
    "special/name-", "special/link-through", "safetensors/header-empty", "safetensors/header-only", "safetensors/bool-",
    "torch/bool-values", "torch/zip-flipped-weights", "torch/pickle-an-empty-dict", "torch/pickle-numbers",
)  # fmt: skip


def _is_for_readers(case: Case) -> bool:
    return (
        (case.code, case.inspect, case.nobody) == (3, 3, False)
        and (case.id.split("/")[0] in READ or not case.tree)
        and not case.id.startswith(ELSEWHERE)
        and not any(word in case.id for word in SLOW)
    )


def said(path: Path) -> str:
    """The error; of a file that is read, what is said of the tensors that are refused when they are wanted."""
    try:
        reader = open_reader(path)
        try:
            found = values(reader)
        finally:
            reader.close()
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return "; ".join(f"{path}: {name}: {value}" for name, value in found.items() if str(value).startswith("refused"))


@pytest.mark.parametrize("name", [name for name, case in corpus().items() if _is_for_readers(case)])
def test_they_refuse_it(tmp_path: Path, name: str) -> None:
    case = corpus()[name]
    case.build(tmp_path)
    path = tmp_path / Path(case.at).parts[0]
    text = said(next(path.glob("*.index.json"), path) if case.tree else path)
    assert re.search(case.message, text.replace("refused: ", "")), text

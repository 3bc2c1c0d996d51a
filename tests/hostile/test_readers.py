"""Readers called from Python: each refuses a hostile input with its own error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch_archives import values

from ckptavg.errors import InputError
from ckptavg.readers import open_reader
from hostile.case import Case
from hostile.corpus import corpus

READ = ("index", "dcp", "zero")  # cases of directories; others are detected before any file in them is read
SLOW = ("bomb", "deep", "huge", "many", "100000", "million")
ELSEWHERE = (  # cases detected before a reader opens the file, or later, when looking for a model or at values
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


def error_of(path: Path) -> str:
    """Return the error; for a file that is read, the errors of the tensors that are refused on access."""
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
def test_readers_refuse_hostile_input(tmp_path: Path, name: str) -> None:
    case = corpus()[name]
    case.build(tmp_path)
    path = tmp_path / Path(case.at).parts[0]
    text = error_of(next(path.glob("*.index.json"), path) if case.tree else path)
    assert re.search(case.message, text.replace("refused: ", "")), text

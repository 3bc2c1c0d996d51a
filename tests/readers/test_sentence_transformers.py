"""``modules.json`` of untrusted content: a model, or an InputError of one line; nothing outside is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch_archives import values

from ckptavg.errors import InputError
from ckptavg.readers import open_reader

BODY = {"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
DENSE = {"name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}


def model(folder: Path, modules: Any, router: Any = None) -> Path:
    (folder / "model" / "1_Dense").mkdir(parents=True)
    for place in (".", "..", "1_Dense"):
        save_file({"w": torch.ones(2)}, folder / "model" / place / "model.safetensors")
    (folder / "model" / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))
    if router is not None:
        (folder / "model" / "1_Dense" / "router_config.json").write_text(json.dumps(router))
    return folder / "model"


def test_a_release_before_the_body_was_renamed_has_its_old_name(tmp_path: Path):
    reader = open_reader(model(tmp_path, [BODY, DENSE]))
    assert values(reader).keys() == {"0.auto_model.w", "1.w"}
    assert list(reader.named_files) == ["modules.json", "model.safetensors", "1_Dense/model.safetensors"]
    reader.close()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("[", "is not valid JSON"), ({}, "is not a list of modules"), ([], "is not a list of modules"),
        ([1], "has an entry without"), ([BODY | {"type": 5}], "has an entry without"),
        ([BODY, BODY | {"path": "1_Dense"}], "without names of their own"),
        ([BODY | {"name": "\n"}], "without names of their own"),
        ([BODY | {"path": ".."}, DENSE], "leads out of the directory"),
        ([BODY | {"path": "/"}, DENSE], "leads out of the directory"),
        ([BODY | {"path": "1_Dense/../.."}], "leads out of the directory"),
        ([BODY, DENSE | {"path": "2_Dense"}], "the module Dense has no weights"),
        ([BODY | {"path": "x", "type": "Pooling"}], "no module has weights"),
    ],
)  # fmt: skip
def test_a_bad_list_is_refused(tmp_path: Path, modules: Any, message: str):
    with pytest.raises(InputError) as caught:
        open_reader(model(tmp_path, modules))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ([], "has no structure and types"), ({"structure": {}, "types": 3}, "has no structure and types"),
        ({"structure": {"a": ["../.."]}, "types": {}}, "leads out of the directory"),
        ({"structure": {"a": ["r"]}, "types": {"r": "x.Router"}}, "router inside a router"),
        ({"structure": {"a": 5}, "types": {}}, ""),
    ],
)  # fmt: skip
def test_a_bad_router_is_refused(tmp_path: Path, router: Any, message: str):
    folder = model(tmp_path, [BODY, DENSE | {"type": "x.Router"}], router)
    if message:
        with pytest.raises(InputError, match=message):
            open_reader(folder)
    else:  # a router that leads nowhere: the body is all
        reader = open_reader(folder)
        assert values(reader).keys() == {"w"}
        reader.close()

"""The small text files beside checkpoints, damaged by byte and by value, and the permitted outcomes of reading them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ckptavg.average import lora_config
from ckptavg.checkpoints.checksums import Manifest
from ckptavg.checkpoints.discover import discover
from ckptavg.errors import CkptavgError
from hostile import mutants, tree_cases
from hostile.case import plain, write

Files = Mapping[str, bytes]
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**63, 2**200, 1e308, -0.0, "", "x", "..", "/", "\0", "\ud800", "x" * 5000, [], {}, [[]],
    [None], {"": None}, {"a": {"b": []}}, [0] * 70, "nan", "step-1.safetensors", "4", 10**400,
)  # fmt: skip


@cache
def seeds() -> dict[str, tuple[Files, str]]:
    """Return kind → the files of a small valid directory, and the name of the file to damage."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "rank_pattern": {"q": 2},
              "alpha_pattern": {}, "use_rslora": False, "base_model_name_or_path": "x"}  # fmt: skip
    beside = {"step-1.safetensors": plain(1), "step-2.safetensors": plain(2)}
    sums = "".join(f"{sha256(data).hexdigest()}  {name}\n" for name, data in beside.items()).encode()
    index = tree_cases.sharded()
    return {
        "adapter": ({"step-1/adapter_model.safetensors": plain(1),
                     "step-1/adapter_config.json": json.dumps(config).encode()}, "step-1/adapter_config.json"),
        "trainer": ({"checkpoint-1/model.safetensors": plain(1),
                     "checkpoint-1/trainer_state.json": b'{"global_step": 5, "epoch": 1.0, "log_history": [{}]}'},
                    "checkpoint-1/trainer_state.json"),
        "index": ({f"step-1/{name}": data for name, data in index.items()}, f"step-1/{tree_cases.INDEX}"),
        "sums": ({**beside, "SHA256SUMS": sums}, "SHA256SUMS"),
    }  # fmt: skip


def read(files: Files, folder: Path) -> Any:
    """Return the candidates that a run would find, or the one-line error.

    Raises:
        AssertionError: if the error is not one printable line that names a path in the directory.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, files)
    manifest = Manifest()
    try:
        with discover([folder], check=lambda checkpoint: manifest.check(checkpoint) or {}) as found:
            for checkpoint in found.checkpoints:
                lora_config.read_config(checkpoint)
            return [(one.name, one.step) for one in found.checkpoints]
    except CkptavgError as error:
        text = str(error)
        if not text.startswith(str(folder)) or not text.isprintable() or len(text) > 1500:
            raise AssertionError(f"not one line about a file: {text!r}") from error
        return error


def damaged(kind: str, rng: random.Random) -> Files:
    """Damage the text file of the directory: some bytes, or a value if it is JSON."""
    files, name = seeds()[kind]
    data = files[name]
    if name.endswith(".json") and rng.random() < 0.5:
        return {**files, name: json.dumps(with_odd_value(json.loads(data), rng)).encode()}
    return {**files, name: rng.choice(mutants.DAMAGES)(data, rng)}


def with_odd_value(value: Any, rng: random.Random) -> Any:
    """Return the same JSON with one value, or one key, replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        kept = {other: inner for other, inner in value.items() if other != key}
        if rng.random() < 0.15:
            return kept
        if rng.random() < 0.15:
            return {**kept, str(rng.choice(ODD)): value[key]}
        return {**kept, key: with_odd_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [with_odd_value(inner, rng) if i == place else inner for i, inner in enumerate(value)]
    return rng.choice(ODD)

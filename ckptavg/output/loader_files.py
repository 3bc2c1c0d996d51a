"""The files that loaders expect in an output directory: their names, and the division of the tensors among several."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.errors import InputError, UsageError
from ckptavg.readers import StoredTensor, sentence_transformers
from ckptavg.readers.sentence_transformers import MODULES

STEMS: Final = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights")
_SHARDED: Final = STEMS[:2]  # adapters are loaded from one file only
_VARIANT: Final = r"(?:\.(bf16|fp\d+|ema|non_ema))?"
_NAME: Final = re.compile(
    rf"(?:pytorch_(?=model)|)({'|'.join(STEMS)}){_VARIANT}(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index{_VARIANT}\.json)?"
)


@dataclass(frozen=True, kw_only=True)
class Division:
    """The files of an output that has several."""

    index: str  # the file renamed last: no loader finds a model without it
    content: bytes  # of the index
    files: Mapping[str, Mapping[str, str]]  # file → name of a tensor in the output → its name in the file


def file_name(checkpoint: Checkpoint) -> str:
    """Return the path of the weights in an output directory: the name read, as a safetensors file in one piece.

    It is ``model.safetensors`` where the name that was read is not one that loaders look for.
    """
    weights = checkpoint.reader.path
    match = _NAME.fullmatch(weights.name)
    stem, *variants = match.groups() if match else ("model",)
    parts = [stem, *filter(None, variants), "safetensors"]
    inside = weights.parent
    outer = inside.relative_to(checkpoint.folder) if inside.is_relative_to(checkpoint.folder) else Path()
    listed = {module.folder for module in sentence_transformers.modules(checkpoint.folder)}
    return str(outer / ".".join(parts)) if outer.as_posix() in listed else ".".join(parts)


def folders(checkpoint: Checkpoint) -> Sequence[str]:
    """Return the directories of the modules in a directory of sentence-transformers, but not the directory itself."""
    found = (module.folder for module in sentence_transformers.modules(checkpoint.folder))
    return list(dict.fromkeys(filter(None, found)))


def division(checkpoint: Checkpoint, specs: Mapping[str, StoredTensor], largest: str | None) -> Division | None:
    """Return the files of the output directory, or None for the one that `file_name` gives.

    Args:
        checkpoint: the candidate whose layout the output has.
        specs: name → dtype and shape of the output's tensors.
        largest: maximum size of a shard, such as ``5GB``; None for no maximum.
    Raises:
        UsageError: if it would have shards that no loader reads; else as `shards`.
    """
    if checkpoint.reader.format == sentence_transformers.NAME:
        return _modules(checkpoint, specs, largest)
    if largest is None:
        return None
    name = file_name(checkpoint)
    result = shards(specs, largest, name)
    if len(result.files) < 2:
        return None
    if not Path(name).name.startswith(_SHARDED):
        raise UsageError(f"--max-shard-size {largest}: {name} is loaded from one file only", hint="leave it out")
    return result


def shards(specs: Mapping[str, StoredTensor], largest: str, name: str = "model.safetensors") -> Division:
    """Divide the file ``name`` into shards and an index as huggingface_hub does.

    Raises:
        UsageError: if ``largest`` is not a size, or huggingface_hub is missing.
    """
    try:
        from huggingface_hub import split_state_dict_into_shards_factory  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("--max-shard-size needs huggingface_hub", hint="pip install 'ckptavg[hf]'") from error
    head = name.removesuffix(".safetensors")
    stem, dot, variant = head.partition(".")
    try:
        split: Any = split_state_dict_into_shards_factory(
            dict(specs), get_storage_size=lambda spec: spec.nbytes, max_shard_size=largest,
            filename_pattern=f"{Path(head).name}{{suffix}}.safetensors",
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"--max-shard-size {largest} is not a size such as 5GB or 500MB") from error
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    outer = Path(name).parent
    return Division(
        index=f"{stem}.safetensors.index{dot}{variant}.json",
        content=json.dumps(index, indent=2, sort_keys=True).encode(),
        files={str(outer / file): {n: n for n in names} for file, names in split.filename_to_tensors.items()},
    )


def _modules(checkpoint: Checkpoint, specs: Mapping[str, StoredTensor], largest: str | None) -> Division:
    """Divide a model of sentence-transformers into its modules."""
    if largest is not None:
        message = "--max-shard-size: a model of sentence-transformers has one file for each module"
        raise UsageError(message, hint="leave it out")
    files: dict[str, dict[str, str]] = {}
    for module in sentence_transformers.modules(checkpoint.folder):
        stem = "adapter_model" if (module.weights or "").startswith("adapter_model") else "model"
        file = str(Path(module.folder) / f"{stem}.safetensors")
        inside = {n: n.removeprefix(module.prefix) for n in specs if module.weights and n.startswith(module.prefix)}
        files |= {file: files.get(file, {}) | inside} if inside else {}
    if missing := specs.keys() - {name for inside in files.values() for name in inside}:
        raise InputError("belongs to no module", path=checkpoint.folder / MODULES, tensor=min(missing))
    return Division(index=MODULES, content=(checkpoint.folder / MODULES).read_bytes(), files=files)

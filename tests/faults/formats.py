"""The checkpoints of `faults.job` in four formats."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = Mapping[str, Tensor]


def written(format: str, ckpts: Path, folder: Path) -> list[Path]:
    """Write all checkpoints of ``ckpts`` into ``folder``.

    Returns:
        For each checkpoint, a file that holds tensor data.
    """
    folder.mkdir()
    states = [torch.load(path) for path in sorted(ckpts.glob("*.pt"))]
    return [FORMATS[format](state, folder, step) for step, state in enumerate(states, 1)]


def _torch(state: State, folder: Path, step: int) -> Path:
    torch.save(dict(state), folder / f"step-{step}.pt")
    return folder / f"step-{step}.pt"


def _safetensors(state: State, folder: Path, step: int) -> Path:
    save_file(dict(state), folder / f"step-{step}.safetensors")
    return folder / f"step-{step}.safetensors"


def _sharded(state: State, folder: Path, step: int) -> Path:
    place = folder / f"step-{step}"
    place.mkdir()
    names = sorted(state)
    shards = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for shard, inside in shards.items():
        save_file({name: state[name] for name in inside}, place / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place / "model-00001-of-00002.safetensors"


def _dcp(state: State, folder: Path, step: int) -> Path:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    place = folder / f"step-{step}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": dict(state)}, storage_writer=FileSystemWriter(place, sync_files=False), no_dist=True)
    return next(path for path in place.iterdir() if path.name.endswith(".distcp"))


FORMATS: Mapping[str, Callable[[State, Path, int], Path]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "sharded": _sharded,
    "dcp": _dcp,
}

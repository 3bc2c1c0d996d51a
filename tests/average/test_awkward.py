"""Valid but unusual inputs are averaged correctly: dtypes, shapes, names, wrappers, containers and layouts.

Values are small multiples of 1/8 and the candidates' number is a power of two, so means are exact in any dtype and
the comparison is bitwise.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]
Write = Callable[[Path, int, State], object]


def grid(*shape: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/8 that differ between steps and elements."""
    count = int(np.prod(shape, dtype=np.int64))
    return ((torch.arange(count) * 7 + step * 8) % 64 / 8 - 4).to(dtype).reshape(shape)


def plain(step: int) -> State:
    return {"weight": grid(3, 4, step=step), "bias": grid(3, step=step + 1)}


def with_tensor(name: str, make: Callable[[int], Tensor]) -> Callable[[int], State]:
    return lambda step: {**plain(step), name: make(step)}


def as_safetensors(folder: Path, step: int, state: State) -> None:
    save_file(state, folder / f"step-{step}.safetensors")


def as_torch(folder: Path, step: int, state: Mapping[str, Any], name: str = "step-{}.pt", **options: Any) -> None:
    torch.save(state, folder / name.format(step), **options)


def under(key: str, **beside: Any) -> Write:
    return lambda folder, step, state: as_torch(folder, step, {"step": step, **beside, key: state})


def prefixed(prefix: str) -> Write:
    return lambda folder, step, state: as_torch(folder, step, {f"{prefix}{name}": t for name, t in state.items()})


def lightning(folder: Path, step: int, state: State) -> None:
    """Save as Lightning does, with hyperparameter objects that torch.load(weights_only=True) rejects."""
    content = {
        "epoch": step, "global_step": 10 * step, "pytorch-lightning_version": "2.5.0", "state_dict": state,
        "hyper_parameters": {
            "args": argparse.Namespace(lr=0.1, root=Path("/data")), "when": datetime.datetime(2026, 1, 1),
            "activation": functools.partial(print, end=""), "scale": np.float32(0.5), "seed": np.int64(3),
            "shape": torch.Size([1, 2]), "dtype": torch.bfloat16, "device": torch.device("cpu"), "ids": {1, 2},
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1}]}],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
    }  # fmt: skip
    as_torch(folder, step, content, "epoch={0}-step={0}0.ckpt")


def shards(folder: Path, step: int, state: State) -> None:
    home = folder / f"step-{step}"
    home.mkdir()
    weight_map: dict[str, str] = {}
    for i, (name, tensor) in enumerate(state.items(), 1):
        weight_map[name] = f"model-{i:05}-of-{len(state):05}.safetensors"
        save_file({name: tensor}, home / weight_map[name])
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))


def bin_shards(folder: Path, step: int, state: State) -> None:
    home = folder / f"step-{step}"
    home.mkdir()
    weight_map = {name: f"pytorch_model-{i:05}-of-{len(state):05}.bin" for i, name in enumerate(state, 1)}
    for name, file in weight_map.items():
        torch.save({name: state[name]}, home / file)
    (home / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def distributed(folder: Path, step: int, state: State) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(action="ignore"):  # about torch.distributed not being initialized
        dcp.save({"model": state}, checkpoint_id=folder / f"step-{step}", no_dist=True)


def cached(folder: Path, step: int, state: State) -> None:
    """Save as in a Hugging Face cache: a link to a blob named by its SHA-256."""
    blobs = folder.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    save_file(state, blobs / "new")
    blob = (blobs / "new").rename(blobs / hashlib.sha256((blobs / "new").read_bytes()).hexdigest())
    home = folder / f"step-{step}"
    home.mkdir()
    (home / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (home / "config.json").write_text("{}")


def trainer(folder: Path, step: int, state: State) -> None:
    home = folder / f"checkpoint-{step}"
    home.mkdir()
    save_file(state, home / "model.safetensors", metadata={"format": "pt"})
    torch.save({"state": {}, "param_groups": []}, home / "optimizer.pt")
    torch.save({"last_epoch": 1, "base_lrs": [0.1]}, home / "scheduler.pt")
    (home / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def linked_last(folder: Path, step: int, state: State) -> None:
    as_torch(folder, step, state)
    (folder / "last.ckpt").unlink(missing_ok=True)
    os.link(folder / f"step-{step}.pt", folder / "last.ckpt")


def copied_best(folder: Path, step: int, state: State) -> None:
    as_safetensors(folder, step, state)
    shutil.copy(folder / f"step-{step}.safetensors", folder / "best.safetensors")


def among_other_files(folder: Path, step: int, state: State) -> None:
    as_safetensors(folder, step, state)
    for name in (
        "train.log",
        "events.out.tfevents.1",
        ".DS_Store",
        "README.md",
        "config.json",
        "vocab.txt",
        "Makefile",
    ):
        (folder / name).write_text("{}")
    (folder / "logs").mkdir(exist_ok=True)


def turns(first: Write, second: Write) -> Write:
    """Alternate between two writers."""
    return lambda folder, step, state: (first if step % 2 else second)(folder, step, state)


def shuffled(folder: Path, step: int, state: State) -> None:
    as_torch(folder, step, dict(reversed(state.items())) if step % 2 else state)


def tied(folder: Path, step: int, state: State) -> None:
    as_torch(folder, step, {**state, "copy": state["weight"]})


def parameters(folder: Path, step: int, state: State) -> None:
    held = OrderedDict((name, nn.Parameter(t)) if t.is_floating_point() else (name, t) for name, t in state.items())
    held._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as set by Module.state_dict()
    as_torch(folder, step, held)


def transposed(folder: Path, step: int, state: State) -> None:
    as_torch(folder, step, {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in state.items()})


def slices(folder: Path, step: int, state: State) -> None:
    """Save views into a much larger storage, which torch.save writes in full."""
    whole = torch.full((1000,), 9.0)
    views: State = {}
    at = 100
    for name, tensor in state.items():
        views[name] = whole[at : at + tensor.numel()].view(tensor.shape)
        views[name].copy_(tensor)
        at += 200
    as_torch(folder, step, views)


def strided(folder: Path, step: int, state: State) -> None:
    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.full_like(tensor, 9.0)], dim=-1)[..., 0]

    as_torch(folder, step, {name: spread(tensor) for name, tensor in state.items()})


def without_checksums(folder: Path, step: int, state: State) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        as_torch(folder, step, state)
    finally:
        torch.serialization.set_crc32_options(True)


def several_runs(folder: Path, step: int, state: State) -> None:
    home = folder / f"run {step}, ü"
    home.mkdir()
    save_file(state, home / "model.safetensors")
    (home / "trainer_state.json").write_text(json.dumps({"global_step": step}))


class Awkward:
    """A case: functions that create and write the state dicts, and their number."""

    def __init__(
        self, write: Write = as_safetensors, state: Callable[[int], State] = plain, count: int = 2, said: str = "",
        also: Callable[[State], State] = lambda expected: expected, options: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.write, self.state, self.count, self.said, self.also, self.options = (
            write,
            state,
            count,
            said,
            also,
            options,
        )


def of_values() -> Iterator[tuple[str, Awkward]]:
    yield "a step counter", Awkward(state=with_tensor("n", lambda s: torch.tensor(100 * s)))
    yield "counters that differ", Awkward(state=with_tensor("n", lambda s: torch.tensor([s, -s, 2**62 + s])))
    yield "a bool mask", Awkward(state=with_tensor("mask", lambda s: torch.tensor([True, s > 1, False])))
    yield "position ids", Awkward(state=with_tensor("ids", lambda s: torch.arange(6).expand(1, 6).clone()))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64):
        yield f"{dtype}", Awkward(state=with_tensor("i", lambda s, d=dtype: torch.tensor([s, 0, 100]).to(d)))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        yield f"{dtype}", Awkward(state=lambda s, d=dtype: {"w": grid(3, 4, step=s, dtype=d)}, count=4)
        yield f"{dtype} in torch files", Awkward(as_torch, lambda s, d=dtype: {"w": grid(9, step=s, dtype=d)})
    yield "three dtypes in one file", Awkward(state=lambda s: {**plain(s), **{
        str(d): grid(3, step=s, dtype=d) for d in (torch.bfloat16, torch.float64)}})  # fmt: skip
    yield "rank 0", Awkward(state=with_tensor("scale", lambda s: torch.tensor(s / 8)))
    yield "rank 12", Awkward(state=with_tensor("deep", lambda s: grid(*([1, 2] * 6), step=s)))
    yield "no elements", Awkward(state=with_tensor("none", lambda s: torch.empty(0, 5)))
    yield "no elements, in torch files", Awkward(as_torch, with_tensor("none", lambda s: torch.empty(3, 0)))
    yield "one element", Awkward(state=lambda s: {"w": torch.tensor([s / 8])})
    yield "more than one chunk", Awkward(state=lambda s: {"w": grid((1 << 18) + 3, step=s)})
    yield "negative zero", Awkward(state=with_tensor("z", lambda s: torch.tensor([-0.0, 0.0])))
    yield "denormals", Awkward(state=with_tensor("d", lambda s: torch.tensor([2.0**-149, 2.0**-140]) * 2 * s))
    yield "sums beyond float32", Awkward(state=with_tensor("l", lambda s: torch.tensor([3e38, -3e38])))
    yield "channels last", Awkward(as_torch, lambda s: {
        "w": grid(2, 3, 4, 5, step=s).to(memory_format=torch.channels_last)})  # fmt: skip


def of_names() -> Iterator[tuple[str, Awkward]]:
    for name in (
        "权重.偏置",
        "größe",
        "a b",
        "a/b",
        "../../x",
        "[/bold]",
        "weight\u0301",
        "x" * 4096,
        "__metadata",
        "0",
    ):
        yield f"a name like {ascii(name)[:20]}", Awkward(state=with_tensor(name, lambda s: grid(2, step=s)))
    yield "tied weights", Awkward(tied, also=lambda e: {**e, "copy": e["weight"]})
    yield "parameters in an OrderedDict", Awkward(parameters)
    yield "transposed", Awkward(transposed)
    yield "slices of a large storage", Awkward(slices)
    yield "every other element", Awkward(strided)
    yield "names in another order", Awkward(shuffled)
    yield "pickle protocol 4", Awkward(functools.partial(as_torch, pickle_protocol=4))
    yield "pickle protocol 5", Awkward(functools.partial(as_torch, pickle_protocol=5))
    yield "without checksums", Awkward(without_checksums, said="saved without checksums")


def of_containers() -> Iterator[tuple[str, Awkward]]:
    yield "Lightning with hyperparameters", Awkward(lightning)
    for key in ("state_dict", "model", "model_state_dict", "module"):
        yield f"under {key}", Awkward(under(key, optimizer={"state": {}, "param_groups": []}, loss=0.5, cfg=None))
    yield "under a key of its own", Awkward(under("net", best=1.0), options=("--key", "net"))
    yield "under a key within a key", Awkward(
        lambda f, s, state: as_torch(f, s, {"step": s, "a": {"b": state}}), options=("--key", "a.b"))  # fmt: skip
    yield "an EMA beside", Awkward(under("state_dict", state_dict_ema=plain(9)), said="took state_dict, not")
    more = {"epoch": 1, "name": "x", "more": None}
    yield "entries that are no tensors", Awkward(
        lambda f, s, state: as_torch(f, s, {**state, **more}), said="no tensor")  # fmt: skip
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        yield f"the prefix {prefix}", Awkward(prefixed(prefix), said="removed the prefix")


def of_layouts() -> Iterator[tuple[str, Awkward]]:
    yield "shards", Awkward(shards)
    yield "shards of .bin", Awkward(bin_shards)
    yield "a distributed checkpoint", Awkward(distributed)
    yield "a Hugging Face cache", Awkward(cached)
    yield "a Trainer's directories", Awkward(trainer)
    yield "a link called last", Awkward(linked_last, said="is a link to")
    yield "a copy called best", Awkward(copied_best, said="holds the same weights as")
    yield "among other files", Awkward(among_other_files)
    yield "two formats", Awkward(turns(as_torch, as_safetensors), count=4)
    yield "files and directories", Awkward(turns(trainer, as_safetensors), count=4)
    yield "several runs", Awkward(several_runs)
    yield "names without suffix", Awkward(functools.partial(as_torch, name="model_at_{}"))
    yield "zero-padded names", Awkward(functools.partial(as_torch, name="ckpt_{:08}.pth"), count=4)
    yield "names with dots", Awkward(functools.partial(as_torch, name="v1.0-ep{}.pth.tar"))
    yield "steps of ten digits", Awkward(lambda f, s, state: as_torch(f, 9_999_999_990 + s, state), count=4)
    yield "sixty-four candidates", Awkward(count=64)


CASES = dict((*of_values(), *of_names(), *of_containers(), *of_layouts()))


def test_there_are_enough_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_the_input_is_averaged_correctly(run: Run, tmp_path: Path, name: str):
    case = CASES[name]
    folder = tmp_path / "ckpts"
    folder.mkdir()
    states = [case.state(step) for step in range(1, case.count + 1)]
    for step, state in enumerate(states, 1):
        case.write(folder, step, state)
    done = run("swa", "ckpts", "-o", "out.safetensors", *case.options)
    assert done.returncode == 0, done.stderr
    assert case.said in done.stderr
    expected = case.also({key: _mean([state[key] for state in states]) for key in states[0]})
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].contiguous().view(-1).tolist() == tensor.contiguous().view(-1).tolist(), key


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Average elementwise; non-floating-point tensors are copied from the last state dict."""
    if not tensors[0].is_floating_point():
        return tensors[-1]
    return torch.stack([tensor.double() for tensor in tensors]).mean(dim=0).to(tensors[0].dtype)

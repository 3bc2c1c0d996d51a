"""Directories written by several processes: torch.distributed.checkpoint's and DeepSpeed's."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from hostile import opcodes as op
from hostile.case import Case, tree, write
from hostile.foreign_cases import PAGE, POINTER
from hostile.torch_cases import archive, state

_DATA = "__0_0.distcp"
_PAYLOADS = {"reduce", "stack-global", "object", "instance", "new-object", "new-object-with-keywords", "set-state",
             "extension-2", "called-on-a-result", "getter", "state-of-a-class"}  # fmt: skip


def cases() -> Iterator[Case]:
    """Return all cases."""
    yield from (*_dcp(), *_zero())


def weights() -> dict[str, torch.Tensor]:
    """Return the weights that every checkpoint beside the hostile one has as well."""
    return {"weight": torch.arange(6.0).view(2, 3) + 0.5, "bias": torch.tensor([0.25, -1.0])}


@cache
def saved() -> dict[str, bytes]:
    """Return a directory as ``dcp.save`` writes it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"model": weights(), "step": 7}, storage_writer=FileSystemWriter(folder, sync_files=False), no_dist=True
        )
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _changed(change: Callable[[Any], object]) -> dict[str, bytes]:
    metadata = pickle.loads(saved()[".metadata"])
    change(metadata)
    return {**saved(), ".metadata": pickle.dumps(metadata)}


def _weight(metadata: Any) -> Any:
    return metadata.state_dict_metadata["model.weight"]


def _place(metadata: Any, **change: Any) -> None:
    """Change the location of the weight."""
    index = next(index for index in metadata.storage_data if index.fqn == "model.weight")
    for name, value in change.items():
        object.__setattr__(metadata.storage_data[index], name, value)


def _case(id: str, files: Callable[[], Mapping[str, bytes]], message: str, **more: Any) -> Case:
    return tree(f"dcp/{id}", files, message, **more)


def _dcp() -> Iterator[Case]:
    yield from (*_listings(), *_parts(), *_edits(), *_data())


def _listings() -> Iterator[Case]:
    def listing(content: bytes) -> Callable[[], Mapping[str, bytes]]:
        return lambda: {**saved(), ".metadata": content}

    yield _case("whole", saved, "wrote .*out", code=0, inspect=0)
    yield _case(
        "without-metadata", lambda: {_DATA: saved()[_DATA]}, "incomplete: it has no .metadata", code=0, inspect=0
    )
    yield _case("without-data", lambda: {".metadata": saved()[".metadata"]}, "is missing, but .metadata names it")
    yield _case("ranks-own", lambda: {"__0_.metadata": b"", _DATA: saved()[_DATA]}, "each rank saved its own")
    for part in (0, 1, 2, 10, 100, 500):
        yield _case(f"metadata-cut-{part}", lambda part=part: {**saved(), ".metadata": saved()[".metadata"][:part]},
                   "is damaged", at=".metadata")  # fmt: skip
    for name, content, message in (
        ("page", PAGE, "does not start like a pickle"), ("lfs", POINTER, "does not start like a pickle"),
        ("none", op.program(b"N"), "is not the metadata"), ("a-dict", op.program(b"}"), "is not the metadata"),
        ("a-tensor", state(), "does not start like a pickle"),
        ("bomb", op.program(b")" + b"\x85" * 3_000_000, 4), "memory|is not the metadata"),
        ("bomb-memo", op.program(b"N" + b"\x94" * 8_000_000, 4), "memory|not the metadata"),
        ("deep-key", op.program(b"}" + b")" + b"\x85" * 131_000 + b"Ns", 4), "is not the metadata"),
        ("persistent", op.program(b"K\x01Q"), "it has a persistent id"),
    ):  # fmt: skip
        yield _case(f"metadata-{name}", listing(content), message, at=".metadata", quick=name.startswith("bomb"))
    for name in sorted(_PAYLOADS):
        yield _case(f"payload-{name}", listing(op.program(op.SHAPES[name], 4)), "is not the metadata", at=".metadata",
                   payload=True)  # fmt: skip
    for name in ("os.system", "builtins.exec", "subprocess.Popen", "runpy.run_path", "builtins.eval"):
        content = op.program(op.call(name, *op.CALLS[name]), 4)
        yield _case(f"payload-call-{name}", listing(content), "is not the metadata", at=".metadata", payload=True)


def _parts() -> Iterator[Case]:
    def part(content: bytes) -> Callable[[], Mapping[str, bytes]]:
        """Make ``content`` the weight's part, as the only part in its file."""

        def files() -> dict[str, bytes]:
            found = _changed(lambda m: _place(m, relative_path="__1_0.distcp", offset=0, length=len(content)))
            others = _without_weight(found)
            return {**others, "__1_0.distcp": content}

        return files

    more = {"at": "__1_0.distcp"}
    for name in sorted(_PAYLOADS):
        yield _case(f"part-payload-{name}", part(archive(op.program(op.SHAPES[name], 4))), "weight: holds|weight: \\S+",
                   payload=True, **more)  # fmt: skip
    bare = op.program(op.SHAPES["reduce"]) + bytes(64)
    yield _case("part-bare-pickle", part(bare), "weight: ", payload=True, **more)
    yield _case("part-page", part(PAGE), "weight: ", **more)
    yield _case("part-dict", part(state()), "weight: holds something other", **more)
    other = archive(op.program(op.tensor((3, 2), (2, 1), op.storage("0", 6))))
    yield _case("part-other-shape", part(other), r"weight: holds F32 \[3, 2\], but .metadata has", **more)


def _edits() -> Iterator[Case]:
    for name, change, message in (
        ("path-parent", {"relative_path": "../outside.bin"}, "is not a bare file name"),
        ("path-absolute", {"relative_path": "/etc/passwd"}, "is not a bare file name"),
        ("path-device", {"relative_path": "/dev/zero"}, "is not a bare file name"),
        ("path-dots", {"relative_path": ".."}, "is not a bare file name"),
        ("path-empty", {"relative_path": ""}, "is not a bare file name"),
        ("path-control", {"relative_path": "a\x1b[1m"}, "is not a bare file name"),
        ("path-number", {"relative_path": 7}, "has no storage location"),
        ("path-long", {"relative_path": "权" * 255}, "has a gap|is missing"),
        ("offset-negative", {"offset": -1}, "has no storage location"),
        ("offset-2^63", {"offset": 2**63}, "has no storage location"),
        ("offset-1", {"offset": 1}, "stores two things|has a gap"),
        ("offset-2^62", {"offset": 2**62}, "has a gap"),
        ("length-zero", {"length": 0}, "is not stored by torch.save|stores two|has a gap"),
        ("length-2^62", {"length": 2**62}, "stores two things|truncated"),
        ("length-float", {"length": 7.0}, "has no storage location"),
    ):
        yield _case(f"place-{name}", lambda change=change: _changed(lambda m: _place(m, **change)), message)
    for name, edit, message in (
        ("shape-negative", lambda m: setattr(_weight(m), "size", (-2, 3)), "shape must be"),
        ("shape-overflow", lambda m: setattr(_weight(m), "size", (2**40, 2**40)), "shape must be"),
        ("shape-float", lambda m: setattr(_weight(m), "size", (2.0, 3)), "shape must be"),
        ("shape-larger", lambda m: setattr(_weight(m), "size", (20, 3)), "elements, but its shape"),
        ("shape-list", lambda m: setattr(_weight(m), "size", [2, 3]), "shape must be"),
        ("no-parts", lambda m: setattr(_weight(m), "chunks", []), "elements, but its shape"),
        ("parts-none", lambda m: setattr(_weight(m), "chunks", None), "its parts must be a list"),
        ("parts-twice", lambda m: _weight(m).chunks.append(_weight(m).chunks[0]), "elements|overlap"),
        ("part-outside", lambda m: setattr(_weight(m).chunks[0], "offsets", (1, 0)), "exceeds its shape"),
        ("part-rank", lambda m: setattr(_weight(m).chunks[0], "sizes", (6,)), "offsets and sizes"),
        ("undescribed", lambda m: m.state_dict_metadata.pop("model.weight"), "but not described"),
        ("no-place", lambda m: m.storage_data.clear(), "parts"),
        ("no-paths", lambda m: setattr(m, "planner_data", 7), "has planner data that are not a mapping"),
        ("path-deep", lambda m: m.planner_data.update({"model.weight": ("a",) * 99}), "must be a path of 1 to"),
        ("path-taken", lambda m: m.planner_data.update({"model.weight": ("model", "bias")}), "has the same place"),
        ("path-inside", lambda m: m.planner_data.update({"model.weight": ("model", "bias", "x")}), "is inside|same"),
    ):
        yield _case(f"metadata-{name}", lambda edit=edit: _changed(edit), message, at=".metadata")


def _data() -> Iterator[Case]:
    for name, change, message in (
        ("cut", lambda data: data[:-1], "file is truncated"),
        ("half", lambda data: data[: len(data) // 2], "truncated"),
        ("empty", lambda _: b"", "file is truncated"), ("longer", lambda data: data + b"\0", "but .metadata requires"),
    ):  # fmt: skip
        yield _case(f"data-{name}", lambda change=change: {**saved(), _DATA: change(saved()[_DATA])}, message, at=_DATA)

    def flipped() -> dict[str, bytes]:
        raw = struct.pack("<6f", *weights()["weight"].flatten().tolist())
        return {**saved(), _DATA: saved()[_DATA].replace(raw, raw[:-1] + bytes([raw[-1] ^ 1]))}

    yield _case("data-flipped", flipped, "weight: checksum of record", at=_DATA)

    def older(folder: Path) -> None:
        write(folder / "step-3", saved())
        os.utime(folder / "step-3" / ".metadata", ns=(0, 0))

    yield Case(id="dcp/older-metadata", build=older, at="step-3/.metadata", message="is older than", tree=True)
    for name, put in (("fifo", os.mkfifo), ("loop", lambda path: path.symlink_to(path.name)),
                      ("device", lambda path: path.symlink_to("/dev/zero")), ("folder", os.mkdir)):  # fmt: skip
        for which in (".metadata", _DATA):

            def special(folder: Path, put: Any = put, which: str = which) -> None:
                write(folder / "step-3", {name: data for name, data in saved().items() if name != which})
                put(folder / "step-3" / which)
                os.utime(folder / "step-3" / ".metadata") if which == _DATA else None

            yield Case(id=f"dcp/{which}-{name}", build=special, at=f"step-3/{which}", tree=True,
                       message="is a FIFO|leads back|is a device|is a directory|is older than")  # fmt: skip


def _without_weight(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Write the other parts end to end, since the weight now has its own file."""
    metadata = pickle.loads(files[".metadata"])
    data, end = b"", 0
    for info in sorted(metadata.storage_data.values(), key=lambda info: info.offset):
        if info.relative_path == _DATA:
            data += files[_DATA][info.offset : info.offset + info.length]
            object.__setattr__(info, "offset", end)
            end = len(data)
    return {_DATA: data, ".metadata": pickle.dumps(metadata)}


MODEL = "mp_rank_00_model_states.pt"
OPTIMIZERS = tuple(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))


def _dump(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@cache
def zero() -> dict[str, Any]:
    """Return the objects that two ranks of ZeRO-2 save, before pickling."""
    named = weights()
    run = torch.cat([tensor.flatten() for tensor in named.values()])
    shapes = [{name: tensor.shape for name, tensor in named.items()}]
    model = {"module": named, "param_shapes": shapes, "buffer_names": [], "shared_params": {}, "global_steps": 7}
    model |= {"frozen_param_shapes": {}, "mp_world_size": 1}
    own = [{"zero_stage": 2, "partition_count": [2], "single_partition_of_fp32_groups": [half.clone()]}
           for half in run.chunk(2)]  # fmt: skip
    states = {name: {"optimizer_state_dict": state} for name, state in zip(OPTIMIZERS, own, strict=True)}
    return {MODEL: model, **states}


def zeros(
    model: Mapping[str, Any] | None = None, optimizer: Mapping[str, Any] | None = None, **files: bytes | None
) -> dict[str, bytes]:
    """Return the directory, with entries of the model states and of the first optimizer states replaced."""
    found = zero()
    first = {**found[OPTIMIZERS[0]]["optimizer_state_dict"], **(optimizer or {})}
    states = {MODEL: {**found[MODEL], **(model or {})}, OPTIMIZERS[0]: {"optimizer_state_dict": first}}
    written: dict[str, bytes | None] = {name: _dump(value) for name, value in {**found, **states}.items()}
    return {name: data for name, data in {**written, **files}.items() if data is not None}


def _replaced(name: str, content: bytes) -> dict[str, bytes]:
    return zeros(**{name: content})


def _zero() -> Iterator[Case]:
    def case(id: str, files: Callable[[], Mapping[str, bytes]], message: str, **more: Any) -> Case:
        return tree(f"zero/{id}", files, message, **more)

    yield case("whole", zeros, "wrote .*out", code=0, inspect=0)
    for name in (MODEL, *OPTIMIZERS):
        yield case(f"without-{name}", lambda name=name: zeros(**{name: None}), "missing|without weights|wrote",
                   code=0 if name == MODEL else 3, inspect=0 if name == MODEL else 3)  # fmt: skip
        yield case(f"empty-{name}", lambda name=name: zeros(**{name: b""}), "file is empty", at=name)
        yield case(f"cut-{name}", lambda name=name: zeros(**{name: zeros()[name][:-30]}), "truncated", at=name)
        yield case(f"page-{name}", lambda name=name: zeros(**{name: PAGE}), "is a web page", at=name)
        for shape in ("reduce", "stack-global", "instance", "set-state"):
            content = archive(op.program(op.SHAPES[shape], 4))
            made = partial(_replaced, name, content)
            yield case(f"payload-{shape}-{name}", made, "holds|weights are not visible",
                       at=name, payload=True)  # fmt: skip
        content = archive(
            op.program(op.mapping({"module": op.SHAPES["reduce"], "optimizer_state_dict": op.SHAPES["reduce"]}))
        )
        yield case(f"payload-inside-{name}", lambda name=name, content=content: zeros(**{name: content}), "has no",
                   at=name, payload=True)  # fmt: skip
        bare = partial(_replaced, name, op.program(op.SHAPES["reduce"]))
        yield case(f"bare-{name}", bare, "file is truncated|is a pickle",
                   at=name, payload=True)  # fmt: skip
    shapes: dict[str, Any] = {
        "negative": [{"weight": [-2, 3], "bias": [2]}], "float": [{"weight": [2.0, 3], "bias": [2]}],
        "huge": [{"weight": [2**40, 2**40], "bias": [2]}], "larger": [{"weight": [200, 3], "bias": [2]}],
        "smaller": [{"weight": [1], "bias": [1]}], "a-number": 7, "texts": [{"weight": "2,3"}], "no-groups": [],
        "control-name": [{"a\x1b[1m": [2, 3], "bias": [2]}], "groups": [{"weight": [2, 3]}, {"bias": [2]}],
        "a-dict": {"weight": [2, 3]}, "rank-65": [{"weight": [1] * 65}], "bool": [{"weight": [True, 6], "bias": [2]}],
    }  # fmt: skip
    for name, value in shapes.items():
        yield case(f"shapes-{name}", lambda value=value: zeros({"param_shapes": value}), "step-3/?.*: ")
    for name, value in {"zero": [0], "one": [1], "three": [3], "million": [10**6], "negative": [-1], "text": "2",
                        "two-ways": [1, 2], "nothing": None, "2^62": 2**62}.items():  # fmt: skip
        yield case(f"ranks-{name}", lambda value=value: zeros(None, {"partition_count": value}), "step-3/?.*: ")
    for name, value in {"nothing": None, "empty": [], "short": [torch.ones(3)], "long": [torch.ones(99)], "text": ["x"],
                        "two": [torch.ones(4), torch.ones(4)],
                        "ints": [torch.ones(4, dtype=torch.int64)]}.items():  # fmt: skip
        key = "single_partition_of_fp32_groups"
        yield case(f"part-{name}", lambda value=value, key=key: zeros(None, {key: value}), "step-3/?.*: ")
    for name, value in {"experts": {"ds_autoep_layers": [1]}, "parallel": {"mp_world_size": 2},
                        "module": {"module": None},
                        "buffers": {"buffer_names": 7}, "shared": {"shared_params": 7},
                        "frozen": {"frozen_param_shapes": {"x": [2]}}}.items():  # fmt: skip
        yield case(f"model-{name}", lambda value=value: zeros(value), "step-3/?.*: ")
    yield case("universal", lambda: zeros(**{"zero": b""}), "is a universal checkpoint")
    yield case("other-layout", lambda: zeros(**{"layer_01-model_00-model_states.pt": b""}), "is of model or pipeline")
    flip = struct.pack("<2f", 0.5, 1.5)

    def flipped() -> dict[str, bytes]:
        raw = zeros()
        return {**raw, OPTIMIZERS[0]: raw[OPTIMIZERS[0]].replace(flip, flip[:-1] + bytes([flip[-1] ^ 1]))}

    yield case("flipped", flipped, "checksum of record", at=OPTIMIZERS[0])

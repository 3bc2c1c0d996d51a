"""Directories written by torch.distributed.checkpoint, by one process and by four, read without that library."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from properties import examples, kept
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch_archives import TORCH_DTYPE, expected, values

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import FilePart, RegularFile
from ckptavg.readers import Node, Reader, StoredTensor
from ckptavg.readers import dcp as dcp_reader
from ckptavg.readers.dcp import FOLDER
from ckptavg.readers.dcp import metadata as dcp_metadata
from ckptavg.readers.dcp.box import Box, untiled
from ckptavg.readers.pickle import object_tree
from ckptavg.readers.torch_zip import open_torch

RANKS = 4


def save(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    """Save ``state`` from one process."""
    return _save(folder, state, DefaultSavePlanner(), **options)


def save_flat(folder: Path, state: dict[str, Any]) -> Path:
    """Save ``state`` without the planner's record of its nesting."""
    return _save(folder, state, DefaultSavePlanner(flatten_state_dict=False))


def _save(folder: Path, state: dict[str, Any], planner: DefaultSavePlanner, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        writer = FileSystemWriter(folder, sync_files=False, **options)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return folder


def shard(rank: int, folder: Path) -> None:
    """Save, as rank ``rank`` of four, DTensors of every placement, and two trained models."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    line, square = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    generator = torch.Generator().manual_seed(0)
    placed: dict[str, tuple[Any, list[Any], tuple[int, ...]]] = {
        "rows": (line, [Shard(0)], (10, 3)), "columns": (line, [Shard(1)], (3, 10)),
        "last": (line, [Shard(2)], (2, 3, 5)),
        "few rows": (line, [Shard(0)], (2, 3)), "one": (line, [Shard(0)], (1,)), "none": (line, [Shard(0)], (0, 3)),
        "large": (line, [Shard(1)], (70, 5000)), "blocks": (square, [Shard(0), Shard(1)], (5, 7, 2)),
        "inner blocks": (square, [Shard(1), Shard(2)], (3, 5, 7)), "crossed": (square, [Shard(1), Shard(0)], (5, 3)),
        "rows twice": (square, [Shard(0), Shard(0)], (7, 3)), "replicated": (square, [Replicate(), Shard(1)], (4, 5)),
        "thin": (line, [Shard(1)], (50, 4)),
    }  # fmt: skip
    full = {name: torch.randn(shape, generator=generator) for name, (_, _, shape) in placed.items()}
    state: dict[str, Any] = {
        name: distribute_tensor(full[name].clone(), mesh, where) for name, (mesh, where, _) in placed.items()
    }
    full["half"] = torch.randn(6, 4, generator=generator).to(torch.bfloat16)
    state["half"] = distribute_tensor(full["half"], line, [Shard(0)])
    full["plain"] = state["plain"] = torch.arange(6)
    dcp.save({"model": state, "step": 7}, storage_writer=FileSystemWriter(folder / "placements", sync_files=False))
    everything = {"placements": full}

    def trained(name: str, model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        writer = FileSystemWriter(folder / name, sync_files=False, thread_count=2)
        dcp.save(saved, storage_writer=writer)
        everything[name] = {
            key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in saved["model"].items()
        }

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    fully_shard(model[0], mesh=line)
    trained("fsdp", fully_shard(model, mesh=line))
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    parallelize_module(model, square["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    trained("fsdp+tp", fully_shard(model, mesh=square["dp"]))
    if rank == 0:
        torch.save(everything, folder / "expected.pt")
    destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what four processes saved: a directory of directories, and ``expected.pt``."""
    folder = kept("ranks", tmp_path_factory)
    if any(folder.iterdir()):
        return folder
    # in a separate process, which imports torch once and forks before any thread is started
    subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    return folder


SAVES = ("placements", "fsdp", "fsdp+tp")


@pytest.fixture(scope="module")
def truth(sharded: Path) -> Mapping[str, Mapping[str, Tensor]]:
    return torch.load(sharded / "expected.pt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a small checkpoint with a model, an optimizer and a step."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, 0.25)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return save(tmp_path / "step-5", {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 5})


def read(folder: Path) -> Any:
    reader = FOLDER.open(folder)
    try:
        return values(reader)
    finally:
        reader.close()


def refused(folder: Path, pattern: str, *, at: str = "", act: Callable[[Path], object] = read) -> None:
    """Check that reading ``folder`` fails with one line that names ``at`` in it and matches ``pattern``."""
    with pytest.raises(InputError, match=pattern) as caught:
        act(folder)
    assert str(caught.value).startswith(f"{folder / at}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def leaf(reader: Reader, *path: str) -> StoredTensor:
    node: Node = reader.tree
    for part in path:
        assert isinstance(node, Mapping)
        node = node[part]
    assert isinstance(node, StoredTensor)
    return node


def rewrite(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Change the metadata of a checkpoint."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def overwrite(path: Path, content: bytes) -> None:
    """Overwrite a file's content, but keep its modification time."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def data_of(folder: Path, name: str) -> range:
    """Return which bytes of the only file hold the elements of an unsharded tensor."""
    reader = FOLDER.open(folder)
    saved = dcp_metadata.parse((folder / ".metadata").read_bytes()).values[name]
    assert isinstance(saved, dcp_metadata.SavedTensor)
    ((_, stored),) = saved.parts
    file = (folder / stored.file).read_bytes()[stored.start :][: stored.size]
    whole = values(reader, StoredTensor(saved.dtype, saved.shape, name, 0))
    assert isinstance(whole, tuple)
    assert file.count(whole[2]) == 1
    start = stored.start + file.index(whole[2])
    reader.close()
    return range(start, start + len(whole[2]))


# ---- what was saved


def test_every_dtype_and_shape_is_what_was_saved(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    for name, dtype in TORCH_DTYPE.items():
        bits = torch.arange(48, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
        state[name] = {"w": bits.view(dtype).clone(), "p": torch.zeros(3, 2, dtype=dtype)}
        state[name] |= {"s": torch.ones((), dtype=dtype), "e": torch.empty(0, dtype=dtype)}
        state[name] |= {"e2": torch.empty(2, 0, 3, dtype=dtype)}
    assert read(save(tmp_path / "all", state)) == expected(state)


def test_views_equal_the_saved_ones(tmp_path: Path) -> None:
    whole = torch.arange(60.0).view(10, 6)
    image = torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last)
    state = {"t": whole.t(), "c": whole[:, 1:3], "r": whole[2:4], "x": whole[::3, ::2], "i": image, "w": whole}
    assert read(save(tmp_path / "views", state)) == expected(state)


def test_the_nesting_is_what_was_saved_and_what_is_no_tensor_is_none(tmp_path: Path) -> None:
    w = torch.arange(3.0)
    state = {"model": {"layers.0.weight": w, "a": {"b": w + 1}}, "list": [w, {"x": w}], "step": 3, "text": "t"}
    found = read(save(tmp_path / "nested", state))
    assert found["model"] == expected(state["model"])
    assert found["list"] == expected({"0": w, "1": {"x": w}})
    assert found["step"] is None and found["text"] is None


@pytest.mark.parametrize("other", ["head.weight", "model.head.weight"])
def test_a_state_dict_without_nesting_keeps_its_names(tmp_path: Path, other: str) -> None:
    state = {"model.a.weight": torch.ones(2), other: torch.zeros(3)}
    assert read(save_flat(tmp_path / "flat", state)) == expected(state)


def test_flat_names_of_a_model_and_its_optimizer_are_separated(tmp_path: Path) -> None:
    w = torch.ones(2)
    state = {"model.a.weight": w, "model.b": w, "optim.state.a": w, "optimizer.b": w}
    parts = {"model": {"a.weight": w, "b": w}, "optim": {"state.a": w}, "optimizer": {"b": w}}
    assert read(save_flat(tmp_path / "both", state)) == expected(parts)


@pytest.mark.parametrize(("model", "average"), [("", "ema"), ("model.", "ema_params"), ("module.", "model_ema")])
def test_a_flat_average_is_separated_from_the_weights_it_is_of(tmp_path: Path, model: str, average: str) -> None:
    weights, means = {"a.weight": torch.ones(2), "b": torch.ones(3)}, {"a.weight": torch.zeros(2), "b": torch.zeros(3)}
    state = {**{f"{model}{name}": tensor for name, tensor in weights.items()}, "emanate.weight": torch.ones(1)}
    state |= {f"{average}.{name}": tensor for name, tensor in means.items()}
    parts = {model[:-1]: weights} if model else weights
    for save_state in (save, save_flat):
        found = read(save_state(tmp_path / save_state.__name__, state))
        assert found == expected({**parts, average: means, "emanate.weight": torch.ones(1)})


def test_a_flat_model_with_a_module_called_ema_is_not_split(tmp_path: Path) -> None:
    state = {"net.weight": torch.ones(2), "ema.net.weight": torch.ones(2), "ema.count": torch.ones(1)}
    state |= {"net_ema.weight": torch.ones(2)}
    assert read(save_flat(tmp_path / "model", state)) == expected(state)


def test_a_flat_model_is_not_split_because_of_an_optimizer(tmp_path: Path) -> None:
    w = torch.ones(2)
    state = {"model.a": w, "lm_head": w, "optim.a": w}
    parts = {"model.a": w, "lm_head": w, "optim": {"a": w}}
    assert read(save_flat(tmp_path / "both", state)) == expected(parts)


@pytest.mark.parametrize("options", [{"single_file_per_rank": False}, {"thread_count": 3}], ids=str)
def test_several_files_of_one_process(tmp_path: Path, options: dict[str, Any]) -> None:
    state = {"model": {str(i): torch.full((i,), float(i)) for i in range(7)}}
    folder = save(tmp_path / "files", state, **options)
    assert read(folder) == expected(state)
    assert len(list(folder.glob("*.distcp"))) > 2


def test_attributes_of_a_reader(folder: Path) -> None:
    reader = FOLDER.open(folder)
    assert (reader.path, reader.format, reader.metadata, reader.notes) == (folder, "dcp", {}, ())
    assert [file.path.name for file in reader.files] == [".metadata", "__0_0.distcp"]
    for file in reader.files:
        file.check_unchanged()
    assert len({tensor.record for tensor in (leaf(reader, "model", "weight"), leaf(reader, "model", "bias"))}) == 2
    reader.close()
    reader.close()


def test_which_directories_are_claimed() -> None:
    assert FOLDER.claims(frozenset({".metadata"})) and FOLDER.claims(frozenset({"__3_0.distcp", "x"}))
    assert not FOLDER.claims(frozenset({"model.safetensors", "metadata", "distcp"}))


# ---- what several ranks saved


@pytest.mark.thorough
@pytest.mark.parametrize("name", SAVES)
def test_sharded_tensors_are_what_was_saved(sharded: Path, truth: Mapping[str, Any], name: str) -> None:
    assert read(sharded / name)["model"] == expected(truth[name])
    assert len(list((sharded / name).glob("*.distcp"))) >= RANKS


@pytest.mark.thorough
@pytest.mark.parametrize("large", [1, 1 << 16])
@examples(120)
@given(data=st.data())
def test_any_window_is_that_part_of_the_whole(
    sharded: Path, truth: Mapping[str, Any], large: int, data: st.DataObject
) -> None:
    save = data.draw(st.sampled_from(SAVES))
    reader = FOLDER.open(sharded / save)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_reader, "_LARGE", large)
        for _ in range(4):
            name = data.draw(st.sampled_from(sorted(truth[save])))
            tensor = leaf(reader, "model", name)
            start = data.draw(st.integers(0, tensor.numel))
            stop = data.draw(st.integers(start, tensor.numel))
            out = bytearray((stop - start) * (tensor.nbytes // max(1, tensor.numel)))
            reader.read_into(tensor, start, memoryview(out))
            whole = truth[save][name].contiguous().flatten()[start:stop].clone()
            assert bytes(out) == bytes(whole.view(torch.uint8).tolist() if whole.numel() else b"")
    reader.close()


def test_reading_front_to_back_reads_every_byte_once(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FOLDER.open(sharded / "placements")
    tensor = leaf(reader, "model", "large")
    reads: list[int] = []
    read_into = RegularFile.read_into
    monkeypatch.setattr(
        RegularFile, "read_into", lambda file, at, out: (reads.append(len(out)), read_into(file, at, out))
    )
    window = 20_000
    for start in range(0, tensor.numel, window):
        reader.read_into(tensor, start, memoryview(bytearray(4 * min(window, tensor.numel - start))))
    headers = 40 * RANKS  # each part's zip directory, local headers and pickle
    assert sum(reads) < tensor.nbytes + headers * 256
    assert len(reads) <= headers + RANKS * math.ceil(tensor.numel / window)
    assert max(reads) <= 4 * window
    reader.close()


def test_threads_read_one_reader_at_once(sharded: Path, truth: Mapping[str, Any]) -> None:
    reader = FOLDER.open(sharded / "placements")
    whole = expected(truth["placements"])
    found: list[object] = []
    work = [threading.Thread(target=lambda: found.append(values(reader, reader.tree["model"]))) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found == [whole] * 4
    reader.close()


@examples(200)
@given(data=st.data())
def test_a_box_counts_and_runs_as_an_enumeration_does(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(data.draw(st.integers(1, n - at)) for n, at in zip(shape, offsets, strict=True))
    box, numel = Box(shape, offsets, sizes), math.prod(shape)
    inside = [
        number
        for number, position in enumerate(itertools.product(*map(range, shape)))
        if all(at <= p < at + size for p, at, size in zip(position, offsets, sizes, strict=True))
    ]
    assert (box.first, box.last, box.numel) == (inside[0], inside[-1], len(inside))
    assert [box.before(index) for index in range(numel + 1)] == [sum(i < n for i in inside) for n in range(numel + 1)]
    for start, stop in itertools.combinations(range(len(inside) + 1), 2):
        runs = list(box.runs(start, stop))
        assert [whole + i for whole, _, count in runs for i in range(count)] == inside[start:stop]
        assert [own + i for _, own, count in runs for i in range(count)] == list(range(start, stop))
        assert all(count <= box.run for _, _, count in runs)


@examples(300)
@given(data=st.data())
def test_boxes_tile_a_tensor_exactly_if_each_element_is_in_one(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    grid = itertools.product(*([*itertools.pairwise(cut)] or [(0, 0)] for cut in cuts))
    boxes = [Box(shape, tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in grid]
    moved = data.draw(st.integers(0, len(boxes) - 1))
    shift = tuple(data.draw(st.integers(0, 1)) for _ in shape)
    boxes[moved] = Box(shape, tuple(map(sum, zip(boxes[moved].offsets, shift, strict=True))), boxes[moved].sizes)
    covered = [
        position
        for box in boxes
        for position in itertools.product(*(range(at, at + n) for at, n in zip(box.offsets, box.sizes, strict=True)))
    ]
    exact = sorted(covered) == list(itertools.product(*map(range, shape)))
    inside = all(at + n <= m for b in boxes for at, n, m in zip(b.offsets, b.sizes, shape, strict=True))
    assert (untiled(boxes, shape) is None) == (exact and inside)


# ---- damage


def test_the_optimizer_is_never_read(folder: Path) -> None:
    model = read(folder)["model"]
    path = folder / "__0_0.distcp"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    content = bytearray(path.read_bytes())
    others = [info for index, info in metadata.storage_data.items() if not index.fqn.startswith("model.")]
    assert len(others) > 10
    for info in others:
        content[info.offset : info.offset + info.length] = b"\xff" * info.length
    overwrite(path, content)
    reader = FOLDER.open(folder)
    assert values(reader, reader.tree["model"]) == model
    with pytest.raises(InputError, match=r"__0_0\.distcp: optim\.state\.0\.exp_avg: "):
        values(reader, leaf(reader, "optim", "state", "0", "exp_avg"))
    reader.close()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_every_flipped_bit_of_a_tensor_is_refused(folder: Path, name: str) -> None:
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    data = data_of(folder, f"model.{name}")
    for at, bit in itertools.product(data, range(8)):
        content = bytearray(whole)
        content[at] ^= 1 << bit
        overwrite(path, content)
        refused(folder, rf"model\.{name}: checksum of record data/0 does not match", at="__0_0.distcp")


def test_a_flipped_bit_anywhere_in_a_part_is_refused_or_changes_nothing(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    whole, model = path.read_bytes(), read(folder)["model"]
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "model.bias"]
    refusals = 0
    for number in range(8 * info.offset, 8 * (info.offset + info.length), 37):
        content = bytearray(whole)
        content[number // 8] ^= 1 << number % 8
        overwrite(path, content)
        reader = FOLDER.open(folder)
        try:
            assert values(reader, reader.tree["model"]) == model
        except InputError as error:
            refusals += 1
            assert str(error).startswith(f"{path}: model.bias: ")
        reader.close()
    assert refusals > 100


def test_every_truncation_is_refused(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 501), len(whole) - 1]:
        overwrite(path, whole[:length])
        refused(folder, f"file is truncated: {length} bytes present, but .metadata requires {len(whole)}", at=path.name)
    overwrite(path, whole + b"\0")
    refused(folder, f"has {len(whole) + 1} bytes, but .metadata requires {len(whole)}", at=path.name)


def test_a_missing_file_is_refused(sharded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sharded / "fsdp", tmp_path / "copy")
    (copy / "__2_0.distcp").unlink()
    refused(copy, "is missing, but .metadata names it", at="__2_0.distcp")


def test_a_save_without_metadata_is_refused(folder: Path) -> None:
    (folder / ".metadata").rename(folder / "__0.metadata")
    refused(folder, r"each rank saved its own \.metadata")
    (folder / "__0.metadata").unlink()
    refused(folder, "has no .metadata, which is written last: the save was interrupted or is still running$")


def test_metadata_older_than_a_file_is_refused_until_it_is_touched(folder: Path) -> None:
    status = (folder / "__0_0.distcp").stat()
    os.utime(folder / ".metadata", ns=(status.st_mtime_ns, status.st_mtime_ns))
    read(folder)
    os.utime(folder / ".metadata", ns=(status.st_mtime_ns - 1, status.st_mtime_ns - 1))
    with pytest.raises(InputError, match=r"\.metadata: is older than __0_0\.distcp: a later save") as caught:
        read(folder)
    assert caught.value.hint is not None and caught.value.hint.endswith(f"run: touch {folder / '.metadata'}")
    (folder / ".metadata").touch()
    read(folder)


@pytest.mark.parametrize("cut", [0, 1, 10, 500, -1])
def test_metadata_that_is_cut_is_refused(folder: Path, cut: int) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    refused(folder, "is damaged", at=".metadata")


def test_metadata_of_another_kind_or_size_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_reader, "MAX_METADATA", 100)
    refused(folder, "bytes, more than 100", at=".metadata")
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    refused(folder, "is not the metadata of torch.distributed.checkpoint", at=".metadata")


def test_flipped_bits_of_the_metadata_give_no_traceback(folder: Path) -> None:
    path = folder / ".metadata"
    whole = path.read_bytes()
    refusals = 0
    for number in range(0, 8 * len(whole), 61):
        content = bytearray(whole)
        content[number // 8] ^= 1 << number % 8
        path.write_bytes(content)
        try:
            FOLDER.open(folder).close()
        except InputError as error:
            refusals += 1
            assert str(error).startswith(f"{folder}/") and "\n" not in str(error)
    assert refusals > 100


# ---- malice


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["all", "value", "key", "planner", "meta", "file", "chunks"])
def test_metadata_runs_nothing(folder: Path, where: str) -> None:
    trace = folder.parent / "ran"
    path = folder / ".metadata"
    metadata: Any = pickle.loads(path.read_bytes())
    payload: Any = Payload(f"touch {trace}")
    match where:
        case "all":
            metadata = payload
        case "value":
            metadata.state_dict_metadata["model.bias"] = payload
        case "key":
            metadata.storage_data = [(payload, metadata.storage_data)]
        case "planner":
            metadata.planner_data["model.bias"] = payload
        case "meta":
            metadata.storage_meta = payload
        case "file":
            metadata.storage_data[MetadataIndex("step")].relative_path = payload
        case _:
            metadata.state_dict_metadata["model.bias"].chunks = payload
    content = pickle.dumps(metadata)
    assert b"system" in content
    path.write_bytes(content)
    if where == "meta":
        read(folder)
    else:
        refused(folder, ".", at=".metadata")
    assert not trace.exists()


def bias(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata["model.bias"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def chunk(metadata: Metadata) -> Any:
    return bias(metadata).chunks[0]


def info(metadata: Metadata, name: str = "model.bias") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def setting(find: Callable[[Metadata], Any], name: str, value: object) -> Callable[[Metadata], object]:
    return lambda metadata: object.__setattr__(find(metadata), name, value)


FORGERIES: Mapping[str, tuple[str, Callable[[Metadata], object]]] = {
    "outside": (r"'\.\./outside', which is not a bare file name", setting(info, "relative_path", "../outside")),
    "absolute": ("which is not a bare file name", setting(info, "relative_path", "/etc/passwd")),
    "no name": ("which is not a bare file name", setting(info, "relative_path", "")),
    "parent": ("which is not a bare file name", setting(info, "relative_path", "..")),
    "NUL": ("which is not a bare file name", setting(info, "relative_path", "a\0b")),
    "a number": ("model.bias: has no storage location", setting(info, "relative_path", 3)),
    "negative start": ("model.bias: has no storage location", setting(info, "offset", -1)),
    "boolean size": ("model.bias: has no storage location", setting(info, "length", True)),
    "small part": ("is not stored by torch.save", setting(info, "length", 8)),
    "negative shape": ("model.bias: shape must be", setting(bias, "size", torch.Size([-2]))),
    "no shape": ("model.bias: shape must be", setting(bias, "size", None)),
    "list for shape": ("model.bias: shape must be", setting(bias, "size", [2])),
    "huge shape": ("model.bias: shape must be", setting(bias, "size", torch.Size([2**40, 2**40]))),
    "larger shape": (r"its parts have 2 elements, but its shape \[3\] has 3", setting(bias, "size", torch.Size([3]))),
    "no parts": ("its parts have 0 elements", setting(bias, "chunks", [])),
    "parts of nothing": ("must be 1 integers", setting(bias, "chunks", [None])),
    "parts no list": ("its parts must be a list", setting(bias, "chunks", ())),
    "part outside": (r"part \[2\] at \[1\] exceeds its shape", setting(chunk, "offsets", torch.Size([1]))),
    "other rank": ("must be 1 integers", setting(chunk, "sizes", torch.Size([1, 2]))),
    "part twice": ("its parts have 4 elements", lambda m: bias(m).chunks.append(bias(m).chunks[0])),
    "parts not stored": (
        "its parts differ from those that are stored",
        setting(lambda m: next(index for index in m.storage_data if index.fqn == "model.bias"), "offset", (1,)),
    ),
    "nothing stored": (
        "its parts differ from those that are stored",
        lambda m: m.storage_data.pop(next(index for index in m.storage_data if index.fqn == "model.bias")),
    ),
    "stored, not described": (
        "model.bias: is stored, but not described",
        lambda m: m.state_dict_metadata.pop("model.bias"),
    ),
    "object without bytes": ("step: is one object, but 0 parts", lambda m: m.storage_data.pop(MetadataIndex("step"))),
    "described as nothing": ("model.bias: shape must be", lambda m: m.state_dict_metadata.update({"model.bias": None})),
    "no storage": ("is not the metadata of", setting(lambda m: m, "storage_data", None)),
    "paths no dict": ("has planner data that are not a mapping", setting(lambda m: m, "planner_data", [1])),
    "path no tuple": ("model.bias: its place in", lambda m: m.planner_data.update({"model.bias": "model.bias"})),
    "path empty": ("model.bias: its place in", lambda m: m.planner_data.update({"model.bias": ()})),
    "path of bytes": ("model.bias: its place in", lambda m: m.planner_data.update({"model.bias": (b"model",)})),
    "deep path": ("model.bias: its place in", lambda m: m.planner_data.update({"model.bias": ("a",) * 65})),
    "one path for two": (
        "has the same place in the state dict as another",
        lambda m: m.planner_data.update({"model.bias": ("model", "weight")}),
    ),
    "path through a tensor": (
        "is inside something that is not a mapping",
        lambda m: m.planner_data.update({"model.bias": ("model", "weight", "bias")}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_metadata_is_refused(folder: Path, name: str) -> None:
    pattern, change = FORGERIES[name]
    shutil.copy(folder / "__0_0.distcp", folder.parent / "outside")
    rewrite(folder, change)
    refused(folder, pattern, at=".metadata")


@pytest.mark.parametrize(
    ("pattern", "change"),
    [
        ("has a gap at byte", lambda m: setattr(info(m), "offset", info(m).offset + 1)),
        ("stores two things at byte", lambda m: setattr(info(m), "offset", info(m).offset - 1)),
        ("stores two things at byte 0", lambda m: setattr(info(m), "offset", 0)),
        ("file is truncated", lambda m: setattr(info(m, "optim.state.1.exp_avg_sq"), "length", 2**40)),
    ],
)
def test_files_are_covered_without_gap_and_overlap(
    folder: Path, pattern: str, change: Callable[[Metadata], object]
) -> None:
    rewrite(folder, change)
    refused(folder, pattern, at="__0_0.distcp")


def test_parts_that_overlap_are_refused(sharded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sharded / "placements", tmp_path / "copy")

    def move(metadata: Metadata) -> None:
        tensor: Any = metadata.state_dict_metadata["model.blocks"]
        first, second = (chunk for chunk in tensor.chunks if chunk.sizes[0] == 3)
        second.offsets, second.sizes = torch.Size([0, 3, 0]), torch.Size([3, 3, 2])  # from [0, 4, 0]
        assert tuple(first.sizes) == (3, 4, 2)

    rewrite(copy, move)
    refused(copy, r"model\.blocks: its parts at \[0, 0, 0\] and \[0, 3, 0\] overlap", at=".metadata")


def test_a_part_that_is_another_tensor_is_refused(folder: Path) -> None:
    def swap(metadata: Metadata) -> None:
        a, b = info(metadata), info(metadata, "model.weight")
        assert a.length == b.length
        a.offset, b.offset = b.offset, a.offset

    rewrite(folder, swap)
    refused(folder, r"model\.\w+: holds F32 \[2(, 3)?\], but \.metadata has F32", at="__0_0.distcp")


def test_a_part_of_another_dtype_is_refused(folder: Path) -> None:
    rewrite(folder, lambda m: setattr(bias(m).properties, "dtype", torch.int32))
    refused(folder, r"model\.bias: holds F32 \[2\], but \.metadata has I32 \[2\]", at="__0_0.distcp")


def test_a_part_that_is_an_object_is_refused(folder: Path) -> None:
    def swap(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex("model.bias", (0,))] = info(metadata, "step")
        metadata.storage_data[MetadataIndex("step")] = stored

    stored = info(pickle.loads((folder / ".metadata").read_bytes()))
    rewrite(folder, swap)
    refused(folder, "model.bias: holds something other than a tensor", at="__0_0.distcp")


# ---- what is refused only where it is wanted


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (
            r"is stored with a transformation \(zstd\), which is not supported",
            lambda m: setattr(info(m), "transform_descriptors", ["zstd"]),
        ),
        ("dtype torch.quint8 is not supported", lambda m: setattr(bias(m).properties, "dtype", torch.quint8)),
        ("is not a plain dense tensor", lambda m: setattr(bias(m).properties, "layout", torch.sparse_coo)),
        ("has no dtype", lambda m: setattr(bias(m), "properties", None)),
    ],
)
def test_a_tensor_that_cannot_be_read_leaves_the_others(
    folder: Path, reason: str, change: Callable[[Metadata], object]
) -> None:
    whole = read(folder)["model"]
    rewrite(folder, change)
    found = read(folder)["model"]
    assert found["weight"] == whole["weight"]
    assert re.search(f"refused: {reason}", found["bias"])


def test_the_safetensors_serialization_is_refused(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(3)}, "step": 1}
    folder = save(tmp_path / "st", state, serialization_format=SerializationFormat.SAFETENSORS)
    refused(folder, "model.w: is not stored by torch.save", at=".metadata")


def test_a_lone_tensor_is_not_a_torch_file_for_others(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.ones(2), path)
    with RegularFile(path) as file, pytest.raises(InputError, match="holds a tensor, not a state dict"):
        open_torch(file)


def test_a_part_of_a_file_ends_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    with RegularFile(path) as file:
        part = FilePart(file, 2, 5)
        assert (part.size, part.read(0, 5), part.read(3, 2)) == (5, b"23456", b"56")
        for at, size in ((0, 6), (4, 2), (-1, 1)):
            with pytest.raises(InputError, match="x: is damaged: a part of 5 bytes should have"):
                part.read(at, size)
        part.close()
        assert part.read(0, 1) == b"2"


def test_a_part_that_is_no_plain_tensor_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", {"w": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.eye(2).to_sparse(), tmp_path / "sparse")
    content = (tmp_path / "sparse").read_bytes()
    rewrite(folder, lambda metadata: setattr(info(metadata, "w"), "length", len(content)))
    overwrite(folder / "__0_0.distcp", content)
    os.utime(folder / ".metadata")
    refused(folder, "w: .*sparse", at="__0_0.distcp")


def test_more_containers_than_any_model_has_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_tree, "MAX_CONTAINERS", 1)
    refused(folder, "has more than 1 containers", at=".metadata")


def test_ordered_dictionaries_are_read(folder: Path) -> None:
    before = read(folder)
    for kind in (OrderedDict, lambda paths: defaultdict(list, paths)):
        rewrite(folder, lambda metadata, kind=kind: setattr(metadata, "planner_data", kind(metadata.planner_data)))
        assert read(folder) == before


@pytest.mark.parametrize("content", [b"[]", b'{"ckptavg": 3}', b"{", b"\xff"])
def test_a_record_that_ckptavg_did_not_write_is_refused(folder: Path, content: bytes) -> None:
    (folder / dcp_reader.RECORD).write_bytes(content)
    refused(folder, "is not what ckptavg wrote|is not valid JSON", at=dcp_reader.RECORD)


def test_more_parts_than_any_cluster_saves_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_metadata, "MAX_PARTS", 0)
    refused(folder, "its parts must be a list of up to 0", at=".metadata")


if __name__ == "__main__":
    ranks = [
        multiprocessing.get_context("fork").Process(target=shard, args=(i, Path(sys.argv[1]))) for i in range(RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))

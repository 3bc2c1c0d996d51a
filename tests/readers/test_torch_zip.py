from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import itertools
import os
import pathlib
import pickle
import struct
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch_archives import TORCH_DTYPE, Entry, archive, expected, read, values, zip_bytes

from ckptavg.errors import InputError
from ckptavg.filesystem.regular_file import RegularFile
from ckptavg.readers import Reader, Refused, StoredTensor, open_reader, torch_zip
from ckptavg.readers.torch_zip import READER, strided


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def refused(path: Path, pattern: str) -> None:
    """Check that opening ``path`` fails with one line that names it and matches ``pattern``."""
    with pytest.raises(InputError, match=pattern) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def tensor(reader: Reader, name: str) -> StoredTensor:
    found = reader.tree[name]
    assert isinstance(found, StoredTensor)
    return found


# ---- what torch.save wrote


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", TORCH_DTYPE.values(), ids=TORCH_DTYPE)
def test_every_dtype_is_what_torch_load_reads(path: Path, dtype: torch.dtype, protocol: int) -> None:
    bits = torch.arange(48, dtype=torch.uint8) % 2 if dtype == torch.bool else torch.arange(48, dtype=torch.uint8)
    state = {"w": bits.view(dtype).clone(), "p": torch.zeros(3, 2, dtype=dtype), "s": torch.ones((), dtype=dtype)}
    state |= {"e": torch.empty(0, dtype=dtype), "e2": torch.empty(2, 0, 3, dtype=dtype)}
    saved(path, state, pickle_protocol=protocol)
    assert read(path) == expected(torch.load(path, weights_only=False))


VIEWS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda t: t[2:5],
    "columns": lambda t: t[:, 1:3],
    "transposed": lambda t: t.t(),
    "every second": lambda t: t[::2, ::3],
    "one column": lambda t: t[:, 4],
    "one element": lambda t: t[3, 2],
    "with a dimension of one": lambda t: t[:, None, ::2],
    "diagonal": lambda t: t.diagonal(),
    "permuted": lambda t: t.view(2, 5, 3, 2).permute(3, 1, 0, 2),
    "channels last": lambda t: t.view(1, 2, 5, 6).contiguous(memory_format=torch.channels_last),
    "expanded to one": lambda t: t[0].expand(1, -1),
    "empty slice": lambda t: t[4:4],
    "end": lambda t: t[10:],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.uint8])
def test_views_are_what_torch_load_reads(path: Path, view: str, dtype: torch.dtype) -> None:
    saved(path, {"v": VIEWS[view](torch.arange(60).view(10, 6).to(dtype))})
    assert read(path) == expected(torch.load(path))


@pytest.mark.parametrize("view", VIEWS)
def test_every_slice_of_a_view_is_that_part_of_the_whole(path: Path, view: str) -> None:
    saved(path, {"v": VIEWS[view](torch.arange(60.0).view(10, 6))})
    reader = open_reader(path)
    whole = values(reader, reader.tree["v"])
    assert isinstance(whole, tuple)
    numel = tensor(reader, "v").numel
    for start, stop in itertools.combinations(range(numel + 1), 2):
        out = bytearray((stop - start) * 4)
        reader.read_into(tensor(reader, "v"), start, memoryview(out))
        assert out == whole[2][start * 4 : stop * 4]


def test_a_small_view_is_read_at_once() -> None:
    reads: list[int] = []
    column = StoredTensor("F32", (1000, 1), "r", 4, (10, 1))
    strided.gather(column, 0, memoryview(bytearray(4000)), lambda at, out: reads.append(len(out)))
    assert reads == [4 * (999 * 10 + 1)]


def test_a_large_view_of_little_is_read_in_pieces() -> None:
    reads: list[int] = []
    column = StoredTensor("F32", (2**20, 4), "r", 0, (1, 2**20))
    strided.gather(column, 40, memoryview(bytearray(4 * 4 * 256)), lambda at, out: reads.append(len(out)))
    assert reads == [4 * 256] * 4


@examples(60)
@given(st.data())
def test_slices_of_large_strided_views_are_what_torch_reads(data: st.DataObject) -> None:
    # larger than one read, so that pieces are joined
    shape = tuple(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)))
    order = data.draw(st.permutations(range(len(shape))))
    full = torch.arange(2 * int(np.prod(shape)), dtype=torch.int32)
    view = full[::2].view(shape).permute(order)
    numel = view.numel()
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    described = StoredTensor("I32", tuple(view.shape), "r", 0, view.stride())
    content = full.numpy().tobytes()
    counted = [0]

    def read_into(at: int, out: memoryview) -> None:
        out[:] = content[at : at + len(out)]
        counted[0] += len(out)

    out = bytearray(4 * (stop - start))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "_LARGE", 512)
        patch.setattr(strided, "_SMALL", 64)
        strided.gather(described, start, memoryview(out), read_into)
    assert bytes(out) == view.flatten()[start:stop].numpy().tobytes()
    assert counted[0] <= 16 * len(out) + 4 * 64  # never the whole storage for a small part of it


def test_contiguous_tensors_have_no_stride_and_others_keep_theirs(path: Path) -> None:
    base = torch.arange(60.0).view(10, 6)
    state = {"a": base, "b": base[2:4], "c": base.t(), "d": base[3:4, :2], "e": base[:, :1]}
    reader = open_reader(saved(path, state))
    assert [tensor(reader, name).stride for name in state] == [None, None, (1, 6), None, (6, 1)]
    assert [tensor(reader, name).offset for name in state] == [0, 48, 0, 72, 0]


def test_tied_tensors_are_equal_and_others_are_not(path: Path) -> None:
    weight, twin = torch.arange(6.0), torch.arange(6.0)
    state = {"a": weight, "b": weight, "c": weight.view(2, 3), "d": weight[1:], "e": twin, "f": nn.Parameter(weight)}
    reader = open_reader(saved(path, state))
    leaves = {name: tensor(reader, name) for name in state}
    assert leaves["a"] == leaves["b"] == leaves["f"]
    assert len(set(leaves.values())) == 4
    assert read(path) == expected(state)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.tied = self.head


def test_a_modules_state_dict_is_what_torch_load_reads(path: Path) -> None:
    saved(path, Plain().to(memory_format=torch.channels_last).state_dict())  # type: ignore[call-overload]
    assert read(path) == expected(torch.load(path))


class Mode(enum.Enum):
    TRAIN = 1


def lightning() -> dict[str, Any]:
    model = Plain()
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return {
        "epoch": np.int64(7),
        "global_step": np.float64(1200.5),
        "flag": np.bool_(True),
        "half": np.float16(0.5),
        "small": np.uint8(250),
        "array": np.arange(3),
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "loops": {"fit_loop": {"state_dict": {}, "done": False}, "best": float("-inf"), "nothing": None},
        "hyper_parameters": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "counts": collections.Counter("aab"),
        "by_name": collections.defaultdict(list, a=[1]),
        "callbacks": {
            "ModelCheckpoint{'mode': 'min'}": {"dirpath": pathlib.PurePosixPath("/x"), "best": torch.tensor(3)}
        },
        "activation": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        "when": datetime.datetime(2026, 7, 1, 12, 30),
        "mode": Mode.TRAIN,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "tags": {"one"},
        "raw": b"bytes",
        "bits": bytearray(b"bits"),
        "complex": 1 + 2j,
        "huge": 2**200,
        "rng": {"torch": torch.get_rng_state(), "python": (3, (1, 2, 3), None)},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_lightning_checkpoint_is_what_torch_load_reads(path: Path, protocol: int) -> None:
    saved(path, lightning(), pickle_protocol=protocol)
    everything = torch.load(path, weights_only=False)
    numbers = ("epoch", "global_step", "flag", "half", "small")
    assert read(path) == expected(everything | {name: everything[name].item() for name in numbers})


def test_omitted_objects_are_noted_by_class(path: Path) -> None:
    state = {"w": torch.ones(2), "a": argparse.Namespace(x=1), "b": [argparse.Namespace(y=1), Mode.TRAIN]}
    [note] = open_reader(saved(path, state)).notes
    assert "the classes argparse.Namespace, " in note
    assert open_reader(saved(path, {"w": torch.ones(2), "n": None})).notes == ()


def test_keys_that_are_not_strings_are_spelled_and_their_tensors_refused(path: Path) -> None:
    saved(path, {"state": {0: {"step": torch.ones(1)}, 1: torch.ones(1), (2, 3): torch.ones(1), (4,): 5, None: 1}})
    state = open_reader(path).tree["state"]
    assert isinstance(state, Mapping)
    assert list(state) == ["0", "1", "<tuple>", "None"]
    assert isinstance(state["0"], Mapping)
    assert isinstance(state["1"], Refused)
    assert "its key is a int" in state["1"].reason


def test_a_key_and_its_spelling_do_not_hide_each_other(path: Path) -> None:
    assert isinstance(open_reader(saved(path, {1: torch.ones(1), "1": torch.zeros(1)})).tree["1"], Refused)


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\x1b[31m", "a\x7f", "x" * 4097, "\ud800"])
def test_a_tensor_of_an_improper_name_is_refused(path: Path, name: str) -> None:
    [node] = open_reader(saved(path, {name: torch.ones(1)})).tree.values()
    assert isinstance(node, Refused)
    assert "name" in node.reason


@pytest.mark.parametrize("name", ["../../x", "层.权重", "a b", "x" * 4096, "é \u200f"])
def test_a_tensor_of_an_unusual_name_is_read(path: Path, name: str) -> None:
    assert read(saved(path, {name: torch.ones(1)})) == expected({name: torch.ones(1)})


class Subclass(torch.Tensor):
    pass


class OddParameter(nn.Parameter):
    pass


def test_tensors_with_attributes_and_plain_parameters_are_read(path: Path) -> None:
    plain, parameter, stateful = torch.ones(2), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(1))
    plain.note = "hello"  # type: ignore[attr-defined]
    stateful.note = "hello"  # type: ignore[attr-defined]
    saved(
        path,
        {"a": plain, "b": parameter, "c": stateful, "d": nn.Buffer(torch.ones(2)), "e": OddParameter(torch.ones(3))},
    )
    assert read(path) == expected(torch.load(path, weights_only=False))


def unreadable() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "sparse": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 2, torch.qint8),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "meta": torch.empty(3, device="meta"),
            "conj": torch.ones(3, dtype=torch.complex64).conj(),
            "neg": torch.ones(3, dtype=torch.complex64).conj().imag,
            "stride 0": torch.ones(1, 4).expand(3, 4),
            "overlapping": torch.arange(6.0).as_strided((3, 3), (1, 1)),
            "subclass": torch.ones(3).as_subclass(Subclass),
            "complex half": torch.ones(3, dtype=torch.complex32),
        }


@pytest.mark.parametrize("name", unreadable())
def test_a_tensor_that_is_not_plain_and_dense_is_refused_and_the_others_are_read(path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved(path, {"good": torch.arange(3.0), "bad": unreadable()[name]})
    reader = open_reader(path)
    assert isinstance(reader.tree["bad"], Refused)
    assert values(reader, reader.tree["good"]) == expected(torch.arange(3.0))


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """A group of one rank, or the first of two, of which the other is not needed."""
    distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    distributed.destroy_process_group()


def test_a_distributed_tensor_is_read_if_its_rank_has_the_whole_of_it(path: Path, ranks: int) -> None:
    mesh, whole = init_device_mesh("cpu", (ranks,)), torch.arange(12.0).view(6, 2)
    parts = {name: DTensor.from_local(whole, mesh, [placed]) for name, placed in PLACEMENTS.items()}
    parts["parameter"] = nn.Parameter(parts["sharded"])
    tree = values(open_reader(saved(path, parts)))
    assert isinstance(tree, dict)
    read_whole = {"replicated"} if ranks > 1 else {"replicated", "sharded", "parameter"}
    assert {name for name, value in tree.items() if value == expected(whole)} == read_whole
    assert all("merge the ranks first (verl" in value for name, value in tree.items() if name not in read_whole)


def test_a_sharded_tensor_says_how_the_ranks_are_merged(path: Path) -> None:
    pickled = b"\x80\x02}X\1\0\0\0wctorch.distributed._shard.sharded_tensor.api\nShardedTensor\n)\x81K\1bs."
    reason = open_reader(archive(path, pickled)).tree["w"]
    assert isinstance(reason, Refused) and "merge the ranks first (verl" in reason.reason


PLACEMENTS = {"replicated": Replicate(), "sharded": Shard(0), "sum": Partial()}


# ---- what is no state dict


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (torch.ones(3), "holds a tensor, not a state dict"),
        ([torch.ones(3)], "holds a list, not a state dict"),
        ((torch.ones(3),), "holds a tuple, not a state dict"),
        (None, "holds None, not a state dict"),
        ("text", "holds a str, not a state dict"),
        (3, "holds an int, not a state dict"),
        (
            argparse.Namespace(a=1),
            "is a argparse.Namespace whose weights are not visible",
        ),
        (datetime.date(2026, 1, 1), "the result of calling datetime.date, which is never called"),
    ],
    ids=str,
)
def test_a_file_without_a_state_dict_is_refused(path: Path, value: object, pattern: str) -> None:
    refused(saved(path, value), pattern)


@pytest.mark.parametrize("sign", ["code/__torch__.py", "constants.pkl"])
def test_a_torchscript_file_is_refused(path: Path, sign: str) -> None:
    entries = [Entry(f"m/{name}") for name in ("data.pkl", sign, "version")]
    path.write_bytes(zip_bytes(entries))
    refused(path, "is a TorchScript file; save its state_dict")


def test_a_zip_that_torch_did_not_write_is_refused(path: Path) -> None:
    for write in (lambda: np.savez(path.with_suffix(".npz"), a=np.ones(2)), lambda: _docx(path.with_suffix(".npz"))):
        write()
        refused(path.with_suffix(".npz"), "is a zip archive, but not of torch.save")


def _docx(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as document:
        document.writestr("[Content_Types].xml", "<Types/>" * 100)
        document.writestr("word/document.xml", "<document/>" * 100)


# ---- the archive


EMPTY = pickle.dumps({}, 2)
PICKLE = Entry("archive/data.pkl", EMPTY)
NINES = Entry("archive/data/0", b"9" * 16)


SIZE = struct.pack("<Q", len(EMPTY))
ACCEPTED: Mapping[str, Entry] = {
    "plain": PICKLE,
    "UTF-8": Entry("archive/data.pkl", EMPTY, {"flags": 1 << 11}),
    "descriptor": Entry("archive/data.pkl", EMPTY, {"flags": 8}, {"crc": 0, "size": 0, "stored": 0}),
    "zip64": Entry("archive/data.pkl", EMPTY, {"size": 2**32 - 1}, {}, b"\1\0\x08\0" + SIZE),
    "zip64 behind another field": Entry(
        "archive/data.pkl", EMPTY, {"size": 2**32 - 1, "stored": 2**32 - 1}, {}, b"UT\1\0x\1\0\x10\0" + 2 * SIZE
    ),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_a_plain_archive_is_read(path: Path, kind: str) -> None:
    path.write_bytes(zip_bytes([ACCEPTED[kind], NINES]))
    assert read(path) == {}


ARCHIVES: Mapping[str, tuple[bytes, str]] = {
    "compressed": (zip_bytes([PICKLE, Entry("archive/data/0", b"x", {"method": 8}, {"method": 8})]),
                   "data/0 is compressed"),
    "encrypted": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"flags": 1})]), "is encrypted"),
    "strongly encrypted": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"flags": 0x41})]), "is encrypted"),
    "hidden local header": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"flags": 1 << 13})]), "is encrypted"),
    "patched": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"flags": 1 << 5})]), "contradicts itself"),
    "the same name twice": (zip_bytes([PICKLE, NINES, NINES]), "lists archive/data/0 twice"),
    "the pickle twice": (zip_bytes([PICKLE, PICKLE]), "lists archive/data.pkl twice"),
    "no signature": (zip_bytes([PICKLE, Entry("archive/x", b"", {"signature": 0x02014B51})]), "bad entry"),
    "on another disk": (zip_bytes([PICKLE, Entry("archive/x", b"", {"disk": 1})]), "bad entry"),
    "name longer than the directory": (zip_bytes([PICKLE, Entry("archive/x", b"", {"name_length": 10})]), "bad entry"),
    "name shorter than it is": (zip_bytes([PICKLE, Entry("archive/x", b"", {"name_length": 8})]), "after its 2"),
    "empty name": (zip_bytes([PICKLE, Entry("")]), "is outside"),
    "outside of the directory": (zip_bytes([PICKLE, Entry("other/data/0")]), "other/data/0, which is outside"),
    "no directory": (zip_bytes([Entry("data.pkl", EMPTY)]), "not of torch.save"),
    "no name": (zip_bytes([Entry("/data.pkl", EMPTY)]), "not of torch.save"),
    "no pickle": (zip_bytes([NINES]), "not of torch.save"),
    "no records": (b"PK\3\4" + zip_bytes([])[4:], "truncated"),
    "name with a NUL": (zip_bytes([PICKLE, Entry("archive/data/0\0x")]), "NUL"),
    "name that is not UTF-8": (zip_bytes([PICKLE, Entry("archive/\ud800")]), "not UTF-8"),
    "bytes behind": (zip_bytes([PICKLE], after=b"12345"), "5 bytes follow the end"),
    "another zip behind": (zip_bytes([PICKLE], after=zip_bytes([PICKLE])), "should end at"),
    "bytes before": (zip_bytes([PICKLE], before=b"PK\3\4evil"), "bytes before its first record"),
    "zip before, unaccounted": (b"PK\3\4" + zip_bytes([PICKLE]), "should end at"),
    "comment": (zip_bytes([PICKLE], comment=3, after=b"abc"), "3 bytes follow the end"),
    "comment that is missing": (zip_bytes([PICKLE], comment=3), "follow the end"),
    "several disks": (zip_bytes([PICKLE], disk=1), "in several"),
    "fewer here": (zip_bytes([PICKLE, NINES], here=1), "in several"),
    "fewer entries": (zip_bytes([PICKLE, NINES], here=1, count=1), "after its 1 entries"),
    "more entries": (zip_bytes([PICKLE, NINES], here=3, count=3), "is cut off"),
    "directory elsewhere": (zip_bytes([PICKLE], offset=3), "should end at"),
    "directory too large": (zip_bytes([PICKLE], size=0xFFFFFFFE), "is too large|should end at"),
    "record beyond the end": (zip_bytes([PICKLE, Entry("archive/data/0", b"", *[{"size": 99, "stored": 99}] * 2)]),
                              "beyond the end"),
    "record far beyond the end": (zip_bytes([PICKLE, Entry("archive/data/0", b"", {"offset": 0xFFFFFFF0})]),
                                  "beyond the end"),
    "records over each other": (zip_bytes([Entry("archive/data.pkl", EMPTY, *[{"size": 60, "stored": 60}] * 2), NINES]),
                                "over another record"),
    "two records in one place": (zip_bytes([PICKLE, Entry("archive/data/0", EMPTY, {"offset": 0})]),
                                 "over another record|do not agree"),
    "sizes that differ": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"stored": 3})]), "contradicts itself"),
    "another name inside": (zip_bytes([Entry("archive/data.pkl", EMPTY, {}, {"name": b"archive/data.pk2"})]),
                            "do not agree"),
    "another size inside": (zip_bytes([Entry("archive/data.pkl", EMPTY, {}, {"size": 3})]), "do not agree"),
    "no size inside": (zip_bytes([Entry("archive/data.pkl", EMPTY, {}, {"size": 0})]), "do not agree"),
    "no checksum inside": (zip_bytes([Entry("archive/data.pkl", EMPTY, {}, {"crc": 0})]), "do not agree"),
    "another flag inside": (zip_bytes([Entry("archive/data.pkl", EMPTY, {}, {"flags": 1 << 11})]), "do not agree"),
    "another checksum behind a descriptor's flag": (
        zip_bytes([Entry("archive/data.pkl", EMPTY, {"flags": 8}, {"crc": 3})]), "do not agree"),
    "another checksum inside": (zip_bytes([Entry("archive/data.pkl", EMPTY, {}, {"crc": 3})]), "do not agree"),
    "another method inside": (zip_bytes([Entry("archive/data.pkl", EMPTY, {}, {"method": 8})]), "do not agree"),
    "no signature inside": (zip_bytes([PICKLE, Entry("archive/x", b"", {}, {"signature": b"PK\3\5"})]), "do not agree"),
    "4 GiB that are nowhere": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"size": 0xFFFFFFFF})]), "lacks a size"),
    "half a large size": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"size": 0xFFFFFFFF}, {}, b"\1\0\4\0abcd")]),
                          "lacks a size"),
    "one of two large sizes": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"size": 0xFFFFFFFF, "stored": 0xFFFFFFFF},
                                                {}, b"\1\0\x0c\0" + bytes(12))]), "lacks a size"),
    "a large size of another kind": (zip_bytes([Entry("archive/data.pkl", EMPTY, {"size": 0xFFFFFFFF}, {},
                                                      b"\2\0\x08\0abcdefgh")]), "lacks a size"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_bad_archive_is_refused(path: Path, name: str) -> None:
    data, pattern = ARCHIVES[name]
    path.write_bytes(data)
    refused(path, pattern)


def test_too_many_entries_are_refused_before_they_are_read(path: Path) -> None:
    count = 1_000_001
    data = zip_bytes([PICKLE])
    body, tail = data[:-22], data[-22:]
    size, offset = struct.unpack_from("<2L", tail, 12)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1)
    path.write_bytes(body + end64 + locator + tail[:8] + b"\xff\xff\xff\xff" + tail[12:])
    refused(path, "1000001 entries in .* is too large")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({}, ""),
        ({"signature": b"PK\6\5"}, "bad zip64 end"),
        ({"length": 45}, "bad zip64 end"),
        ({"disk": 1}, "bad zip64 end"),
        ({"count": 2}, "end records that disagree"),
        ({"at": 1}, "zip64 locator"),
        ({"disks": 2}, "bad zip64 end"),
    ],
    ids=str,
)
def test_the_zip64_end_must_agree(path: Path, change: Mapping[str, Any], pattern: str) -> None:
    data = zip_bytes([PICKLE])
    body, tail = data[:-22], data[-22:]
    size, offset = struct.unpack_from("<2L", tail, 12)
    f: dict[str, Any] = {"signature": b"PK\6\6", "length": 44, "disk": 0, "count": 1, "at": 0, "disks": 1} | dict(
        change
    )
    end64 = struct.pack(
        "<4sQ2H2L4Q", f["signature"], f["length"], 0, 0, f["disk"], 0, f["count"], f["count"], size, offset
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(body) + f["at"], f["disks"])
    path.write_bytes(body + end64 + locator + tail)
    if pattern:
        refused(path, pattern)
    else:
        assert read(path) == {}


def test_records_beyond_4_gib_are_found(path: Path) -> None:
    # a sparse file: the record before the small one is a hole of 5 GiB
    start, large = 5 << 30, (5 << 30) - 200
    reduced = _pickled({"w": ("1", 2, (2,)), "large": ("0", large // 4, (large // 4,))})
    names = [b"a/data.pkl", b"a/data/0", b"a/data/1"]
    local = "<4s5H3L2H"
    first = struct.pack(local, b"PK\3\4", 0, 0, 0, 0, 0, zlib.crc32(reduced), len(reduced), len(reduced), 10, 0)
    offsets, sizes = [0, 30 + 10 + len(reduced), start], [len(reduced), large, 8]
    payload = struct.pack("<2f", 1.5, -2.5)
    crcs = [zlib.crc32(reduced), 7, zlib.crc32(payload)]
    with path.open("wb") as out:
        out.write(first + names[0] + reduced)
        offsets[1] = out.tell()
        extra = struct.pack("<2H2Q", 1, 16, large, large)
        out.write(struct.pack(local, b"PK\3\4", 0, 0, 0, 0, 0, 7, *[0xFFFFFFFF] * 2, 8, len(extra)) + names[1] + extra)
        out.seek(out.tell() + large)
        offsets[2] = out.tell()
        out.write(struct.pack(local, b"PK\3\4", 0, 0, 0, 0, 0, crcs[2], 8, 8, 8, 0) + names[2] + payload)
        directory = out.tell()
        for name, offset, size, crc in zip(names, offsets, sizes, crcs, strict=True):
            numbers = [n for n in (size, size, offset) if n >= 0xFFFFFFFF]
            extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
            short = [min(n, 0xFFFFFFFF) for n in (size, size, offset)]
            out.write(struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, crc, *short[:2], len(name), len(extra),
                                  0, 0, 0, 0, short[2]) + name + extra)  # fmt: skip
        end = out.tell()
        out.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, 3, 3, end - directory, directory))
        out.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        out.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, *[0xFFFFFFFF] * 2, 0))
    reader = open_reader(path)
    assert tensor(reader, "large").nbytes == large
    assert values(reader, reader.tree["w"]) == ("F32", (2,), payload)


def _pickled(
    tensors: Mapping[str, tuple[str, int, tuple[int, ...]]], stride: tuple[int, ...] = (1,), offset: int = 0
) -> bytes:
    """Build data.pkl of float tensors by hand: name → storage key, its number of elements, shape."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        raw = value.to_bytes(12, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    body = b""
    for name, (key, numel, shape) in tensors.items():
        body += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n"
        body += text(key) + text("cpu") + number(numel) + b"tQ" + number(offset)
        body += b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t\x89}tR"
    return b"\x80\x02}(" + body + b"u."


GEOMETRY: Mapping[str, tuple[str, int, tuple[int, ...], tuple[int, ...], int, str]] = {
    "fine": ("0", 4, (4,), (1,), 0, ""),
    "shape beyond the storage": ("0", 4, (5,), (1,), 0, "needs 20 bytes, but record data/0 has 16"),
    "offset beyond the storage": ("0", 4, (4,), (1,), 1, "needs 20 bytes"),
    "huge offset": ("0", 4, (1,), (1,), 2**62, "needs"),
    "negative offset": ("0", 4, (1,), (1,), -1, "integers from 0"),
    "stride beyond the storage": ("0", 4, (2,), (4,), 0, "needs 20 bytes"),
    "huge stride": ("0", 4, (2,), (2**62,), 0, "needs"),
    "negative stride": ("0", 4, (2,), (-1,), 3, "integers from 0"),
    "stride 0 of 2^40 elements": ("0", 4, (2**40,), (0,), 0, "more than once"),
    "windows": ("0", 4, (2, 2), (1, 1), 0, "more than once"),
    "negative shape": ("0", 4, (-1,), (1,), 0, "integers from 0"),
    "shape of 2^63": ("0", 4, (0, 2**63), (1, 1), 0, "integers from 0"),
    "shapes whose product overflows": ("0", 4, (2**32, 2**32), (2**32, 1), 0, "needs"),
    "more strides than dimensions": ("0", 4, (4,), (1, 1), 0, "integers from 0"),
    "rank 65": ("0", 4, (1,) * 65, (1,) * 65, 0, "up to 64"),
    "rank 64": ("0", 4, (1,) * 64, (1,) * 64, 0, ""),
    "declared too small": ("0", 3, (3,), (1,), 0, "needs 3 elements of F32, but record data/0 has 16 bytes"),
    "declared too large": ("0", 5, (4,), (1,), 0, "needs 5 elements of F32"),
    "declared negative": ("0", -4, (4,), (1,), 0, "needs -4 elements"),
    "missing record": ("7", 4, (4,), (1,), 0, "record data/7 is missing"),
    "traversal": ("../data.pkl", 4, (4,), (1,), 0, "is missing"),
    "long key": ("x" * 5000, 4, (4,), (1,), 0, "is missing"),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_a_view_must_fit_its_storage(path: Path, name: str) -> None:
    key, numel, shape, stride, offset, pattern = GEOMETRY[name]
    archive(path, _pickled({"w": (key, numel, shape)}, stride, offset), {"0": bytes(16)})
    node = open_reader(path).tree["w"]
    if pattern:
        assert isinstance(node, Refused)
        assert pattern in node.reason
    else:
        assert isinstance(node, StoredTensor)


@pytest.mark.parametrize(
    ("order", "pattern"),
    [(b"little", ""), (b"big", "byte order"), (b"middle", "byte order"), (b"x" * 99, "far too many")],
)
def test_only_little_endian_files_are_read(path: Path, order: bytes, pattern: str) -> None:
    archive(path, EMPTY, byteorder=order)
    if pattern:
        refused(path, pattern)
    else:
        assert read(path) == {}


@pytest.mark.parametrize(
    ("version", "good"), [(b"3\n", True), (b"1", True), (b"10", True), (b"11", False), (b"x", False), (b"0", False)]
)
def test_only_known_archive_versions_are_read(path: Path, version: bytes, good: bool) -> None:
    archive(path, EMPTY, version=version)
    if good:
        assert read(path) == {}
    else:
        refused(path, "archive version")


def test_a_pickle_that_is_too_large_is_refused_unread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "MAX_PICKLE", 10)
    refused(archive(path, pickle.dumps({"a": "long enough"})), "data.pkl has .* bytes, more than 10")


def test_a_pickle_that_is_damaged_is_named(path: Path) -> None:
    refused(archive(path, b"\x80\x02}"), "data.pkl is damaged: it is cut off")


def test_archives_that_were_packed_again_are_read(path: Path, tmp_path: Path) -> None:
    saved(path, {"w": torch.arange(5.0)})
    again = tmp_path / "again.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert read(again) == read(path)


def test_the_format_claims_zip_archives_only() -> None:
    assert READER.claims(b"PK\3\4more")
    assert not any(READER.claims(head) for head in (b"", b"PK", b"PK\5\6", b"\x80\x02}.", b"\0" * 8 + b"{}"))


@examples(300)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_random_bytes_for_a_zip_are_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pt"
    good = zip_bytes([PICKLE, NINES])
    at = len(data) % len(good)
    path.write_bytes([b"PK\3\4" + data, good[:-22] + data, good[:at] + data + good[at:], data + good][kind])
    try:
        reader = READER.open(RegularFile(path))
    except InputError:
        return
    assert reader.tree == {}


# ---- truncation and damage


def small(path: Path, **options: Any) -> Path:
    state = {"w": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    return saved(path, {"epoch": 3, "state_dict": state | {"t": state["w"].t(), "n": torch.tensor(7)}}, **options)


def test_every_truncation_is_refused(path: Path) -> None:
    data = small(path).read_bytes()
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=f"truncated: {size} bytes present|known format"):
            open_reader(path)


def test_no_flip_of_one_bit_is_read_as_other_values(path: Path) -> None:
    """torch.load reads 541 of these 17,456 files as other values or names."""
    data = small(path).read_bytes()
    good = read(path)
    accepted = 0
    with path.open("r+b", buffering=0) as file:
        for position, bit in itertools.product(range(len(data)), range(8)):
            os.pwrite(file.fileno(), bytes([data[position] ^ 1 << bit]), position)
            try:
                found = read(path)
            except InputError as error:
                assert str(error).startswith(f"{path}: ")
            else:
                assert found == good, f"bit {bit} of byte {position}"
                accepted += 1
            os.pwrite(file.fileno(), data[position : position + 1], position)
    assert 0 < accepted < 8 * len(data) // 2  # padding and unused fields


def test_a_changed_tensor_is_refused_by_its_record(path: Path) -> None:
    data = bytearray(small(path).read_bytes())
    at = data.index(struct.pack("<3f", 3, 4, 5))
    data[at] ^= 1
    path.write_bytes(data)
    reader = open_reader(path)
    for _ in range(2):
        with pytest.raises(InputError, match="checksum of record data/0 does not match: the file is damaged"):
            values(reader)


def test_a_changed_pickle_is_refused_on_opening(path: Path) -> None:
    data = small(path).read_bytes()
    path.write_bytes(data.replace(b"epoch", b"epocg"))
    with pytest.raises(InputError, match=r"checksum of record data\.pkl does not match"):
        open_reader(path)


@pytest.fixture
def without_checksums() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def test_a_file_without_checksums_is_read_with_a_note(path: Path, without_checksums: None) -> None:
    small(path)
    assert read(path) == expected(torch.load(path))
    assert "without checksums" in open_reader(path).notes[0]
    assert not any("checksums" in note for note in open_reader(archive(path, EMPTY)).notes)


# ---- how much is read, and when the checksum is


class Counting(RegularFile):
    """Counts the bytes read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.count = 0

    def read_into(self, offset: int, out: memoryview) -> None:
        self.count += len(out)
        super().read_into(offset, out)


KIB = 1024


@pytest.fixture
def counting(path: Path) -> Counting:
    saved(path, {"a": torch.arange(256 * KIB, dtype=torch.int32), "b": torch.arange(512 * KIB, dtype=torch.int32)[::2]})
    return Counting(path)


@pytest.fixture
def opened(counting: Counting) -> Reader:
    reader = READER.open(counting)
    counting.count = 0
    return reader


def elements(reader: Reader, name: str, start: int, count: int) -> list[int]:
    out = bytearray(4 * count)
    reader.read_into(tensor(reader, name), start, memoryview(out))
    return list(struct.unpack(f"<{count}i", out))


def test_opening_reads_headers_only(counting: Counting) -> None:
    READER.open(counting)
    assert counting.count < 4 * KIB


def test_a_tensor_read_front_to_back_is_read_once(counting: Counting, opened: Reader) -> None:
    for start in range(0, 256 * KIB, 16 * KIB):
        assert elements(opened, "a", start, 16 * KIB) == list(range(start, start + 16 * KIB))
    assert counting.count == KIB * KIB


def test_a_slice_of_an_unread_tensor_reads_it_once_for_the_checksum_and_never_again(
    counting: Counting, opened: Reader
) -> None:
    assert elements(opened, "a", 1000, 4) == [1000, 1001, 1002, 1003]
    assert counting.count == KIB * KIB + 16
    assert elements(opened, "a", 5, 1) == [5]
    assert elements(opened, "a", 0, 2) == [0, 1]
    assert counting.count == KIB * KIB + 16 + 12


def test_a_slice_after_a_beginning_reads_only_the_rest_for_the_checksum(counting: Counting, opened: Reader) -> None:
    elements(opened, "a", 0, 128 * KIB)
    elements(opened, "a", 200 * KIB, 1)
    assert counting.count == KIB * KIB + 4


def test_a_pass_that_starts_again_at_the_front_reads_no_more_than_that(counting: Counting, opened: Reader) -> None:
    elements(opened, "a", 0, KIB)
    for start in range(0, 256 * KIB, 64 * KIB):
        elements(opened, "a", start, 64 * KIB)
    assert counting.count == KIB * KIB + 4 * KIB


def test_a_slice_of_a_strided_tensor_reads_what_it_spans(counting: Counting, opened: Reader) -> None:
    elements(opened, "b", 7, 1)
    counting.count = 0
    assert elements(opened, "b", 100, 50) == list(range(200, 300, 2))
    assert counting.count == 99 * 4


def damaged_end(path: Path, size: int) -> Reader:
    """Write a view of the first ``size`` elements of a storage of 1000, then change the storage's last element."""
    storage = torch.arange(1000, dtype=torch.int32)
    data = saved(path, {"whole": storage, "view": storage[:size]}).read_bytes()
    last = data.index(struct.pack("<2i", 998, 999)) + 4
    path.write_bytes(data[:last] + b"\xff" + data[last + 1 :])
    return open_reader(path)


def test_damage_at_the_end_is_found_with_the_last_chunk(path: Path) -> None:
    reader = damaged_end(path, 10)
    for start in range(0, 900, 100):
        elements(reader, "whole", start, 100)
    with pytest.raises(InputError, match="checksum of record data/0"):
        elements(reader, "whole", 900, 100)


def test_damage_behind_a_view_is_found_with_its_last_chunk(path: Path) -> None:
    reader = damaged_end(path, 10)
    elements(reader, "view", 0, 5)
    with pytest.raises(InputError, match="checksum of record data/0"):
        elements(reader, "view", 5, 5)


@pytest.mark.parametrize("start", [1, 500])
def test_damage_is_found_before_a_slice_is_handed_out(path: Path, start: int) -> None:
    reader = damaged_end(path, 10)
    for _ in range(2):
        with pytest.raises(InputError, match="checksum of record data/0"):
            elements(reader, "whole", start, 3)


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 400)), max_size=12))
def test_slices_in_any_order_are_the_right_ones(
    tmp_path_factory: pytest.TempPathFactory, slices: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "thousand.pt"
    if not path.exists():
        saved(path, {"whole": torch.arange(1000, dtype=torch.int32)})
    reader = open_reader(path)
    for start, count in slices:
        stop = min(1000, start + count)
        assert elements(reader, "whole", start, stop - start) == list(range(start, stop))
    reader.close()


def test_threads_that_read_at_once_read_the_right_values(path: Path) -> None:
    shared = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).int()
    state = {f"t{i}": torch.arange(3000, dtype=torch.int32) + i for i in range(6)} | {"s": shared, "r": shared[1000:]}
    reader = open_reader(saved(path, state))
    wrong: list[object] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(150):
            name = f"t{random.integers(6)}" if random.random() < 0.5 else random.choice(["s", "r"])
            start = int(random.integers(2000)) if random.random() < 0.5 else 0
            try:
                if elements(reader, name, start, 1000) != state[name][start : start + 1000].tolist():
                    wrong.append(name)
            except InputError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_shrinks_after_opening_is_an_input_error(path: Path) -> None:
    reader = open_reader(saved(path, {"w": torch.arange(10_000)}))
    os.truncate(path, 3000)
    with pytest.raises(InputError, match="truncated"):
        values(reader)


def test_a_read_beyond_the_tensor_is_a_bug_of_ours(path: Path) -> None:
    reader = open_reader(saved(path, {"w": torch.arange(10, dtype=torch.int32)[:5]}))
    with pytest.raises(AssertionError):
        elements(reader, "w", 3, 3)


def test_closing_twice_is_harmless(path: Path) -> None:
    reader = open_reader(small(path))
    reader.close()
    reader.close()


def test_many_tensors_open_in_seconds(path: Path) -> None:
    storage = torch.zeros(1)
    saved(path, {f"layer.{i}.weight": storage for i in range(20_000)} | {f"{i}": torch.zeros(1) for i in range(5_000)})
    start = time.process_time()
    assert len(open_reader(path).tree) == 25_000
    assert time.process_time() - start < 5

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import pickletools
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch_archives import archive, read

from ckptavg.errors import InputError
from ckptavg.readers import Refused
from ckptavg.readers.pickle import object_tree, unpickler
from ckptavg.readers.pickle.torch_objects import MAKERS, storage
from ckptavg.readers.pickle.unpickler import Global, Inert, PickleError, load

SIZES = {"data/0": 16, "data/1": 24}
EXTENSION = 0xC4


def interpret(data: bytes) -> object:
    return load(data, MAKERS, lambda key: storage(key, SIZES))


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def storage_id(cls: str, location: str = "cpu") -> bytes:
    """Return the persistent id of a storage of four floats."""
    return b"(" + text("storage") + f"ctorch\n{cls}\n".encode() + text("0") + text(location) + b"K\4tQ"


STORAGE_0 = storage_id("FloatStorage")
FLAT = b"K\0K\4\x85K\1\x85"  # offset, shape and stride of the whole storage


# ---- what ordinary pickles mean


def plain(value: Any) -> Any:
    """Return the value in the interpreter's representation: sets and tuples of it compare as lists."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    return sorted(value) if isinstance(value, set | frozenset) else value


SCALARS = (
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300)
    | st.integers(min_value=-(2**300), max_value=2**300)
)  # fmt: skip
KEYS = st.text() | st.integers(-(2**59), 2**59) | st.booleans() | st.none() | st.floats(allow_nan=False)
TREES = st.recursive(
    SCALARS, lambda child: st.lists(child) | st.lists(child).map(tuple) | st.dictionaries(KEYS, child), max_leaves=30
)


@examples(400)
@given(TREES, st.integers(3, 5))
def test_plain_data_is_what_the_pickle_module_wrote(value: object, protocol: int) -> None:
    assert plain(interpret(pickle.dumps(value, protocol))) == plain(value)


@examples(200)
@given(st.recursive(st.text() | st.integers(-(2**300), 2**300) | st.floats(allow_nan=False), st.lists, max_leaves=20))
def test_protocol_2_is_what_the_pickle_module_wrote(value: object) -> None:
    assert interpret(pickle.dumps(value, 2)) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [set, frozenset])
def test_sets_are_lists(kind: type, protocol: int) -> None:
    value = interpret(pickle.dumps({"s": kind([3, 1, 2]), "e": kind()}, protocol))
    assert isinstance(value, dict)
    assert sorted(value["s"]) == [1, 2, 3]
    assert value["e"] == []


def test_every_opcode_of_protocols_2_to_5_is_known_and_no_other() -> None:
    text_only = set(b"FGIJKLMNPSTUV") - set(b"GJKMN")
    known = {ord(op.code) for op in pickletools.opcodes} - text_only - set(b"gp.") - {0x97, 0x98}
    assert set(unpickler._OPCODES) == known  # pyright: ignore[reportPrivateUsage]


def test_the_same_object_twice_stays_one_object() -> None:
    shared = [1]
    value = interpret(pickle.dumps([shared, shared], 4))
    assert isinstance(value, list)
    assert value[0] is value[1]


# ---- payloads: unpickled by the pickle module, every one of these makes the marker file


def call(function: str, *arguments: str) -> bytes:
    module, _, name = function.rpartition(".")
    return f"c{module}\n{name}\n(".encode() + b"".join(map(text, arguments)) + b"tR"


def made(function: str, arguments: bytes) -> bytes:
    return call(function)[:-2] + arguments + b"tR"


def payloads(marker: Path) -> dict[str, bytes]:
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    arguments = b"(" + text(command) + b"t"
    system, partial = b"cos\nsystem\n", b"cfunctools\npartial\n"
    archive_arguments = text(str(marker)) + text("w")
    run = call("os.system", command)
    return {
        "global": run,
        "posix": call("posix.system", command),
        "eval": call("builtins.eval", f"__import__('os').system({command!r})"),
        "exec": call("builtins.exec", code),
        "python 2's name": call("__builtin__.exec", code),
        "profiler": call("cProfile.run", code),
        "shutil": call("shutil.copy", "/etc/hostname", str(marker)),
        "stack global": text("os") + text("system") + b"\x93" + arguments + b"R",
        "dotted name": text("shutil") + text("os.system") + b"\x93" + arguments + b"R",
        "getattr": b"cbuiltins\ngetattr\n(" + call("builtins.__import__", "os") + text("system") + b"tR"
        + arguments + b"R",
        "class": b"czipfile\nZipFile\n(" + archive_arguments + b"tR",
        "inst": b"(" + text(command) + b"ios\nsystem\n",
        "inst of a class": b"(" + archive_arguments + b"izipfile\nZipFile\n",
        "obj": b"(" + system + text(command) + b"o",
        "newobj": partial + b"(" + system + text(command) + b"t\x81)R",
        "newobj_ex": partial + b"(" + system + text(command) + b"t}\x92)R",
        "build": partial + b"(cos\ngetcwd\nt\x81(" + system + arguments + b"}NtbN\x85" + b"0)R",
        "extension 1": b"\x82" + bytes([EXTENSION]) + arguments + b"R",
        "extension 2": b"\x83" + bytes([EXTENSION, 0]) + arguments + b"R",
        "extension 4": b"\x84" + bytes([EXTENSION, 0, 0, 0]) + arguments + b"R",
        "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(" + system + b"(" + text(command) + b"ltRtR",
        "in a dict": b"}" + text("w") + run + b"s",
        "as a key": b"}" + run + b"Ns",
        "in a list": b"]" + run + b"a",
        "in a tuple": run + b"\x85",
        "in a set": b"\x8f(" + run + b"\x90",
        "as the state of a dict": b"ccollections\nOrderedDict\n)R}" + text("x") + run + b"sb",
        "dropped": run + b"0N",
        "dropped with a mark": b"(" + run + b"1N",
        "put and got": system + b"q\x000N0h\x00" + arguments + b"R",
        "memoized": text("os") + text("system") + b"\x93\x94" + arguments + b"\x94R",
        "in a frame": b"\x95" + struct.pack("<Q", len(run) + 1) + run,
        "persistent id": run + b"Q",
        "storage of a tensor": b"ctorch._utils\n_rebuild_tensor_v2\n(" + run + b"K\0K\1\x85K\1\x85\x89NtR",
        "from type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"ctorch\nTensor\n" + arguments + b"}tR",
        "default factory": b"ccollections\ndefaultdict\n" + system + b"\x85R0" + run,
    }  # fmt: skip


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension("os", "system", EXTENSION)
    yield
    copyreg.remove_extension("os", "system", EXTENSION)


NAMES = sorted(payloads(Path("x")))


class Loading(pickle.Unpickler):
    def persistent_load(self, pid: object) -> object:
        return pid


@pytest.mark.parametrize("name", NAMES)
def test_the_payload_would_run_in_the_pickle_module(name: str, tmp_path: Path, extension: None) -> None:
    marker = tmp_path / "marker"
    with contextlib.suppress(AttributeError, TypeError, pickle.UnpicklingError):  # opcodes after the payload may fail
        protocol = b"\x80\2" if name.startswith("python 2") else b"\x80\4"
        Loading(io.BytesIO(protocol + payloads(marker)[name] + b".")).load()
    assert marker.exists()


@pytest.mark.parametrize("where", ["top", "dict"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_no_payload_runs(name: str, protocol: int, where: str, tmp_path: Path, extension: None) -> None:
    marker = tmp_path / "marker"
    payload = payloads(marker)[name]
    if where == "dict":
        payload = b"}" + text("model") + payload + b"s"
    path = archive(tmp_path / "evil.pt", bytes([0x80, protocol]) + payload + b".")
    try:
        read(path)
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    assert list(tmp_path.iterdir()) == [path]


# ---- what stands in for objects


def test_an_unknown_object_is_only_its_name() -> None:
    value = interpret(b"\x80\x04" + call("argparse.Namespace") + b"}" + text("lr") + b"K\1sb.")
    assert isinstance(value, Inert)
    assert (value.name, value.called) == ("argparse.Namespace", True)


def test_a_global_is_only_its_name() -> None:
    value = interpret(b"\x80\x02cos\nsystem\n.")
    assert isinstance(value, Global)
    assert value.name == "os.system"


def test_items_and_state_of_an_unknown_object_are_forgotten() -> None:
    value = interpret(b"\x80\x02" + call("box.Box") + b"(" + text("a") + b"K\1u(K\1eK\1a" + text("a") + b"K\1s}b.")
    assert isinstance(value, Inert)


@pytest.mark.parametrize("name", ["_rebuild_nested_tensor", "_rebuild_qtensor", "DTensor", "FloatTensor"])
def test_a_possible_tensor_is_refused_and_not_dropped(name: str) -> None:
    value = interpret(b"\x80\x02" + call(f"torch._utils.{name}") + b".")
    assert isinstance(value, Refused)
    assert name in value.reason


def test_a_call_allocates_nothing_it_names() -> None:
    tracemalloc.start()
    interpret(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


# ---- damage


DAMAGED = {
    "empty": b"",
    "no protocol": b"}.",
    "protocol 0": b"\x80\x00}.",
    "protocol 1": b"\x80\x01}.",
    "protocol 6": b"\x80\x06}.",
    "protocol 6 later": b"\x80\x02\x80\x06}.",
    "only a protocol": b"\x80\x02",
    "nothing to return": b"\x80\x02.",
    "no stop": b"\x80\x02}",
    "two values": b"\x80\x02}}.",
    "an open mark": b"\x80\x02(}.",
    "bytes after stop": b"\x80\x02}.}.",
    "unknown opcode": b"\x80\x02\xff.",
    "text opcode": b"\x80\x02I1\n.",
    "text persistent id": b"\x80\x02Pabc\n.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "pop from nothing": b"\x80\x020.",
    "duplicate of nothing": b"\x80\x022.",
    "tuple of too few": b"\x80\x02N\x86.",
    "no mark": b"\x80\x02Nt.",
    "items without a mark": b"\x80\x02}u.",
    "set item of nothing": b"\x80\x02NNs.",
    "set item of a list": b"\x80\x02]NNs.",
    "set item of a tuple": b"\x80\x02)NNs.",
    "set item of a number": b"\x80\x02K\x01NNs.",
    "append to a dict": b"\x80\x02}Na.",
    "append to a tuple": b"\x80\x02)Na.",
    "append to text": b"\x80\x02X\1\0\0\0aNa.",
    "key without a value": b"\x80\x02}(Nu.",
    "dict of an odd number": b"\x80\x02(Nd.",
    "memo that is missing": b"\x80\x02h\x05.",
    "far memo that is missing": b"\x80\x02j\xff\xff\xff\xff.",
    "memo with a gap": b"\x80\x02Nq\x07.",
    "far memo with a gap": b"\x80\x02Nr\xff\xff\xff\xff.",
    "memo of nothing": b"\x80\x02q\x00N.",
    "cut operand": b"\x80\x02J\1.",
    "cut text": b"\x80\x02X\5\0\0\0ab.",
    "text of 4 GiB": b"\x80\x02X\xff\xff\xff\xffab.",
    "text of 2^63": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.",
    "bytes of 2^64 - 1": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffab.",
    "bytearray of 2^64 - 1": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\xffab.",
    "frame too long": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "integer of 2 GiB": b"\x80\x02\x8b\xff\xff\xff\x7f\1.",
    "integer of negative size": b"\x80\x02\x8b\xff\xff\xff\xff\1.",
    "text that is not UTF-8": b"\x80\x02X\2\0\0\0\xff\xfe.",
    "global that is not UTF-8": b"\x80\x02c\xff\xfe\nx\n.",
    "global without an end": b"\x80\x02cos\nsystem.",
    "global of a long name": b"\x80\x02c" + b"a" * 2000 + b"\nx\n.",
    "stack global of numbers": b"\x80\x04K\1K\2\x93.",
    "stack global of long names": b"\x80\x04" + text("a" * 2000) + text("b") + b"\x93.",
    "call of a number": b"\x80\x02K\1)R.",
    "call of a dict": b"\x80\x02})R.",
    "call without a tuple": b"\x80\x02cos\nsystem\n]R.",
    "object without a class": b"\x80\x02(o.",
    "new object of text": b"\x80\x02X\1\0\0\0a)\x81.",
    "state of a list": b"\x80\x02]}b.",
    "state of a number": b"\x80\x02K\1}b.",
    "persistent id that is text": b"\x80\x02X\1\0\0\0aQ.",
    "persistent id of the wrong kind": b"\x80\x02(NNNNNtQ.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_kind_of_error(name: str) -> None:
    with pytest.raises(PickleError, match=r"^(is damaged: |has an integer of)"):
        interpret(DAMAGED[name])


@pytest.mark.parametrize("setter", [b"}b", b"(NNNNtb"])
def test_a_tensor_takes_no_state(setter: bytes) -> None:
    tensor = made("torch._utils._rebuild_tensor_v2", STORAGE_0 + FLAT + b"\x89}")
    interpret(b"\x80\x02" + tensor + b".")
    with pytest.raises(PickleError, match="sets the state of a StoredTensor"):
        interpret(b"\x80\x02" + tensor + setter + b".")


def test_every_truncation_of_a_pickle_is_refused() -> None:
    data = pickle.dumps({"a": [1, 2.5, "x", None, {"b": (1, 2, 3, 4)}], "c": b"12", "d": 2**70}, 4)
    for size in range(len(data)):
        with pytest.raises(PickleError):
            interpret(data[:size])


def test_a_missing_memo_is_named() -> None:
    interpret(b"\x80\x02Nq\x00h\x00\x86.")
    with pytest.raises(PickleError, match="memo 1 is missing"):
        interpret(b"\x80\x02Nq\x00h\x01\x86.")


def test_integers_of_255_bytes_are_read_and_of_256_are_not() -> None:
    assert interpret(b"\x80\x02\x8b\xff\0\0\0" + b"\x7f" * 255 + b".") == int.from_bytes(b"\x7f" * 255, "little")
    with pytest.raises(PickleError, match="an integer of 256 bytes"):
        interpret(b"\x80\x02\x8b\0\1\0\0" + b"\x7f" * 256 + b".")


def test_a_frame_ends_with_the_pickle_at_the_latest() -> None:
    assert interpret(b"\x80\x04\x95" + struct.pack("<Q", 2) + b"N.") is None
    with pytest.raises(PickleError, match="is cut off"):
        interpret(b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N.")


# ---- what is called like a tensor's maker, but is none


V1, V2, V3 = (f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
MALFORMED = {
    "v2 of too few": (V2, STORAGE_0 + FLAT, "is described by 4 values"),
    "v2 of too many": (V2, STORAGE_0 + FLAT + b"NNNN", "is described by 8 values"),
    "v2 of no storage": (V2, b"N" + FLAT + b"NN", "not a storage"),
    "v1 of too few": (V1, STORAGE_0 + b"K\0", "not a storage"),
    "v3 of no dtype": (V3, STORAGE_0 + FLAT + b"NNN", "dtype no dtype"),
    "v3 of an odd dtype": (V3, STORAGE_0 + FLAT + b"NNctorch\nqint8\n", "dtype torch.qint8"),
    "v3 of no storage": (V3, b"N" + FLAT + b"NNctorch\nint8\n", "not a storage"),
    "bits that are no dict": (V2, STORAGE_0 + FLAT + b"NNK\1", "has the bits int set"),
    "parameter of nothing": ("torch._utils._rebuild_parameter", b"", "around something that is not a tensor"),
    "parameter of a list": ("torch._utils._rebuild_parameter", b"]NN", "around something that is not a tensor"),
    "shape that is a list": (V1, STORAGE_0 + b"K\0]]", "shape and stride"),
    "shape of text": (V1, STORAGE_0 + b"K\0" + b"C\1a\x85K\1\x85", "shape and stride"),
    "shape of truths": (V1, STORAGE_0 + b"K\0\x88\x85K\1\x85", "shape and stride"),
    "from type of too few": (FROM_TYPE, b"N", "is described by 1 values"),
    "from no type": (FROM_TYPE, b"NNNN", "tensor of no class"),
    "from type by os.system": (FROM_TYPE, b"cos\nsystem\nctorch\nTensor\n)N", "like a plain"),
    "from type by itself": (FROM_TYPE, b"ctorch._tensor\n_rebuild_from_type_v2\n"
                            b"ctorch\nTensor\n)N", "like a plain"),
    "from type without arguments": (FROM_TYPE, b"ctorch._utils\n_rebuild_tensor_v2\n"
                                    b"ctorch\nTensor\nNN", "like a plain"),
    "quantized storage": (V1, storage_id("QInt8Storage") + FLAT, "torch.QInt8Storage"),
    "meta storage": (V1, storage_id("FloatStorage", "meta") + FLAT, "is a meta tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_tensor_is_refused(name: str) -> None:
    function, arguments, pattern = MALFORMED[name]
    value = interpret(b"\x80\x02" + made(function, arguments) + b".")
    assert isinstance(value, Refused)
    assert pattern in value.reason


@pytest.mark.parametrize(
    "program",
    [
        made("numpy.dtype", b""),
        made("numpy.core.multiarray.scalar", b""),
        made("numpy.core.multiarray.scalar", made("numpy.dtype", text("f8")) + b"C\x0812345678"),
        made("numpy.core.multiarray.scalar", made("numpy.dtype", text("f8")) + b"(K\3" + text("<") + b"tbC\x011"),
        made(
            "numpy.core.multiarray.scalar", made("numpy.dtype", text("M8")) + b"(K\3" + text("<") + b"tbC\x0812345678"
        ),
        made("numpy.core.multiarray.scalar", made("numpy.dtype", text("f8")) + b"NbC\x0812345678"),
        made("_codecs.encode", b""),
        made("_codecs.encode", text("\u0100")),
        made("_codecs.encode", text("x" * 17)),
    ],
)
def test_numpy_scalars_of_other_kinds_are_left_out(program: bytes) -> None:
    assert tree(b"\x80\x02}" + text("epoch") + program + b"s.") == {"epoch": None}


def test_a_big_endian_number_of_numpys_is_read_as_such() -> None:
    dtype = made("numpy.dtype", text("i4")) + b"(K\3" + text(">") + b"tb"
    program = made("numpy.core.multiarray.scalar", dtype + b"C\4\0\0\1\2")
    assert tree(b"\x80\x02}" + text("epoch") + program + b"s.") == {"epoch": 258}


@pytest.mark.parametrize("storage", [b"(" + text("storage") + b"NNNNt", b"(" + text("storage") + b"ca\nb\nK\1NK\1t"])
def test_a_malformed_storage_is_damage(storage: bytes) -> None:
    with pytest.raises(PickleError, match="is not a storage's"):
        interpret(b"\x80\x02" + storage + b"Q.")


# ---- bounds


def tree(data: bytes) -> object:
    return object_tree.object_tree(interpret(data))[0]


def test_a_tuple_131_thousand_deep_as_a_key_is_never_hashed() -> None:
    # hash() of it overflows the C stack (cpython#154318)
    assert list(tree(b"\x80\x02})" + b"\x85" * 131_000 + b"K\1s.")) == ["<tuple>"]  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", [b"]", b"}", b"(t"])
def test_a_key_that_cannot_be_one_keeps_a_tensors_place(kind: bytes) -> None:
    value = tree(b"\x80\x02}" + kind + call("torch._utils._rebuild_qtensor") + b"s.")
    assert isinstance(value, dict)
    assert [type(child) for child in value.values()] == [Refused]


def test_integers_that_share_one_hash_do_not_make_a_dict_slow() -> None:
    keys = b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 100_000))
    value = interpret(b"\x80\x02}(" + keys + b"u.")  # would take minutes if quadratic
    assert isinstance(value, dict)
    assert len(value) == 99_999


@pytest.mark.parametrize(
    "data",
    [b"]" * 1_000_000 + b"a" * 999_999, b")" + b"\x85" * 1_000_000, b"}" + b"X\1\0\0\0a}" * 300_000 + b"s" * 300_000],
    ids=["lists", "tuples", "dicts"],
)
def test_containers_a_million_deep_are_refused(data: bytes) -> None:
    with pytest.raises(PickleError, match="more than 64 deep"):
        tree(b"\x80\x02}" + text("a") + data + b"s.")


def test_containers_64_deep_are_read_and_65_deep_are_not() -> None:
    deep: object = []
    for _ in range(62):
        deep = [deep]
    tree(pickle.dumps({"a": deep}))  # 63 lists in a dict
    with pytest.raises(PickleError, match="more than 64 deep"):
        tree(pickle.dumps({"a": [deep]}))


def test_a_shared_container_counts_at_its_deepest() -> None:
    shared: object = []
    for _ in range(40):
        shared = [shared]
    deeper = shared
    for _ in range(40):
        deeper = [deeper]
    tree(pickle.dumps({"a": shared, "b": [shared]}))
    with pytest.raises(PickleError, match="more than 64 deep"):
        tree(pickle.dumps({"a": shared, "b": deeper}))


@pytest.mark.parametrize("data", [b"]q\0h\0a", b"}q\0" + text("a") + b"h\0s", b"]q\0h\0\x85a"])
def test_a_container_that_holds_itself_is_refused(data: bytes) -> None:
    with pytest.raises(PickleError, match="contains itself"):
        tree(b"\x80\x02}" + text("a") + data + b"s.")


def test_2_to_the_60_laughs_are_refused() -> None:
    laughs = b"]" + b"".join(b"q" + bytes([i]) + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))
    with pytest.raises(PickleError, match="counted at each use"):
        tree(b"\x80\x02}" + text("a") + laughs + b"s.")


def test_a_container_shared_a_few_times_is_read() -> None:
    shared = {"lr": 0.1}
    assert tree(pickle.dumps({"a": shared, "b": [shared, shared]})) == {"a": shared, "b": [shared, shared]}


GREEDY = {
    "dicts": b"}", "lists": b"]", "tuples": b"N\x85", "numbers": b"M\xff\xff", "marks": b"(", "copies": b"2",
    "calls": b"h\0)R", "names": b"ca\nb\n", "memo": b"\x94", "nothing": b"N0",
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_any_repetition_runs_out_of_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickler, "BUDGET", 1 << 22)
    data = b"\x80\x02cos\nsystem\nq\0" + GREEDY[name] * (1 << 17) + b"."
    tracemalloc.start()
    with pytest.raises(PickleError, match="takes more memory"):
        interpret(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 22  # the estimates are upper bounds


def test_more_containers_than_a_checkpoint_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_tree, "MAX_CONTAINERS", 1000)
    tree(pickle.dumps({"a": [[i] for i in range(998)]}))
    with pytest.raises(PickleError, match="more than 1000 containers"):
        tree(pickle.dumps({"a": [[i] for i in range(999)]}))


# ---- random programs


VALUES = [b"N", b"\x88", b"K\1", b"M\1\2", b"J\xff\xff\xff\xff", b"\x8a\2\1\2", b"G@\x08\0\0\0\0\0\0", b")", b"]", b"}"]
VALUES += [text(name) for name in ("a", "storage", "cpu", "0", "1", "", "\ud800", "f8")] + [b"\x8f", b"C\2ab", b"h\0"]
NAMED = (
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_sparse_tensor", "torch._tensor._rebuild_from_type_v2",
    "torch.FloatStorage", "torch.QInt8Storage", "torch.storage.UntypedStorage", "torch.float32", "torch.Tensor",
    "torch.Size", "collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.set",
    "numpy.dtype", "numpy.core.multiarray.scalar", "_codecs.encode", "os.system", "argparse.Namespace",
)  # fmt: skip
GLOBALS = [f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode() for name in NAMED]
PARTS = st.sampled_from([*VALUES, *GLOBALS, STORAGE_0, b"(" + STORAGE_0 + FLAT + b"\x89Nt"])


def joined(*parts: st.SearchStrategy[bytes] | bytes) -> st.SearchStrategy[bytes]:
    return st.tuples(*(st.just(part) if isinstance(part, bytes) else part for part in parts)).map(b"".join)


def compound(one: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Compose programs that push one value from smaller ones; their types make sense only by chance."""
    some = st.lists(one, max_size=7).map(b"".join)
    made = st.sampled_from(GLOBALS)
    return st.one_of(
        *(joined(b"(", some, end) for end in (b"t", b"l", b"d", b"\x91", b"ios\nsystem\n")),
        *(joined(made, b"(", some, b"t", end) for end in (b"R", b"\x81", b"}\x92")),
        *(joined(one, b"(", some, end) for end in (b"u", b"e", b"\x90")),
        *(joined(one, one, end) for end in (b"a", b"b", b"\x86", b"R", b"\x93", b"0")),
        *(joined(one, end) for end in (b"Q", b"\x94", b"\x85", b"20", b"q\0")),
        joined(one, one, one, b"s"),
        joined(STORAGE_0, st.sampled_from([b"K\0", b"K\4", b"N"]), b"(", some, b"t(", some, b"t\x89}t\x85"),
    )


@examples(800)
@given(st.recursive(PARTS, compound, max_leaves=12), st.sampled_from([2, 4]))
def test_a_random_well_formed_program_is_a_mapping_or_a_pickle_error(program: bytes, protocol: int) -> None:
    try:
        value = tree(bytes([0x80, protocol]) + b"}q\0" + text("a") + program + b"s.")
    except PickleError:
        return
    assert isinstance(value, dict)


ACTIONS = [bytes([code]) for code in b"()012tlesaudRobQ\x81\x85\x86\x87\x90\x91\x92\x93\x94"] + [b"q\0", b"r\1\0\0\0"]


@examples(400)
@given(st.lists(PARTS | st.sampled_from(ACTIONS) | st.binary(max_size=2), max_size=40).map(b"".join))
def test_random_opcodes_are_a_mapping_or_a_pickle_error(program: bytes) -> None:
    try:
        value = tree(b"\x80\x02}" + text("a") + program + b"s.")
    except PickleError:
        return
    assert isinstance(value, dict)


@examples(400)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_mapping_or_a_pickle_error(data: bytes) -> None:
    try:
        value = tree(b"\x80\x02" + data + b".")
    except PickleError:
        return
    assert isinstance(value, dict)


def test_an_enumeration_member_is_also_read_by_name():
    """As pickled by Python 3.11.0 to 3.11.3: by getattr, which is never called."""
    from ckptavg.readers.pickle.torch_objects import MAKERS

    def member(owner: str, name: str) -> bytes:
        module, _, cls = owner.rpartition(".")
        return (
            f"\x80\x02c__builtin__\ngetattr\nc{module}\n{cls}\nX".encode("latin1")
            + len(name).to_bytes(4, "little")
            + (name.encode() + b"\x86R.")
        )

    stage = "deepspeed.runtime.zero.config.ZeroStageEnum"
    assert load(member(stage, "weights"), MAKERS, lambda key: key) == 3
    found = load(member("os.path", "system"), MAKERS, lambda key: key)
    assert isinstance(found, Inert) and found.name == "os.path"

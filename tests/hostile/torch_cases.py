"""Torch files: archives that are truncated, inconsistent or bombs, and pickles of objects other than models."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch_archives import Entry, zip_bytes

from hostile import opcodes as op
from hostile.case import Case, file, values

RECORDS = {"0": values(6), "1": values(2, 6)}


def archive(pickle: bytes, records: Mapping[str, bytes] = RECORDS, **extra: bytes) -> bytes:
    """Return a torch file."""
    return zip_bytes([Entry(f"archive/{name}", data) for name, data in _parts(pickle, records, extra).items()])


def state(items: Mapping[str, bytes] | None = None) -> bytes:
    """Return a torch file of a dict; by default of the good tensors."""
    return archive(op.program(op.mapping(op.good() if items is None else items), 4))


def cases() -> Iterator[Case]:
    """Return all cases."""
    yield from (
        *_cut(),
        *_archives(),
        *_bombs(),
        *_pickles(),
        *_modules(),
        *_tensors(),
        *_payloads(),
        *_legacy(),
        *_inside(),
    )


def _parts(pickle: bytes, records: Mapping[str, bytes], extra: Mapping[str, bytes]) -> dict[str, bytes]:
    return {"data.pkl": pickle, **{f"data/{key}": data for key, data in records.items()}, "version": b"3\n", **extra}


def _case(id: str, content: bytes | Callable[[], bytes], message: str, **more: Any) -> Case:
    return file(f"torch/{id}", content, message, **more)


def _cut() -> Iterator[Case]:
    whole = state()
    end = len(whole)
    places = {0, 1, 4, 8, 9, 30, len(whole) - 1, len(whole) - 21, len(whole) - 22, len(whole) - 23}
    for signature in (b"PK\3\4", b"PK\1\2", b"PK\5\6"):
        at = whole.find(signature)
        while at >= 0:
            places |= {at, at + 4, at + 29}
            at = whole.find(signature, at + 1)
    for length in sorted(place for place in places if 0 < place < end):
        yield _case(f"cut-{length}", whole[:length], "file is truncated|not a checkpoint")
    yield _case("empty", b"", r"file is empty \(0 bytes\)")
    yield _case("longer", whole + b"\0" * 9, "9 bytes follow the end of the zip archive")
    yield _case("before", b"#!/bin/sh\n" + whole, "not a checkpoint|bytes before")
    yield _case("two-archives", whole + whole, "zip directory|bytes before")


def _archives() -> Iterator[Case]:
    pickle = op.program(op.mapping(op.good()))
    parts = [Entry(f"archive/{name}", data) for name, data in _parts(pickle, RECORDS, {}).items()]

    def changed(which: int, **change: Any) -> bytes:
        entries = [Entry(entry.name, entry.data) for entry in parts]
        entries[which] = Entry(entries[which].name, change.pop("data", entries[which].data), **change)
        return zip_bytes(entries)

    weight = len(RECORDS["0"])
    flipped = bytes([RECORDS["0"][0] ^ 1]) + RECORDS["0"][1:]
    crc = {"crc": zlib.crc32(RECORDS["0"])}
    for name, content, message in (
        ("two-pickles", zip_bytes([parts[0], *parts]), "lists archive/data.pkl twice"),
        ("two-records", zip_bytes([*parts, parts[1]]), "lists archive/data/0 twice"),
        ("no-pickle", zip_bytes(parts[1:]), "is a zip archive, but not of torch.save"),
        ("no-records", archive(pickle, {}), "weight: its record data/0 is missing"),
        ("outside", zip_bytes([*parts, Entry("../../etc/cron.d/x", b"x")]), "is outside of archive/"),
        ("absolute", zip_bytes([*parts, Entry("/etc/passwd", b"x")]), "is outside of archive/"),
        ("script", archive(pickle, **{"code/__torch__.py": b"x", "constants.pkl": b"x"}), "is a TorchScript file"),
        ("numpy", zip_bytes([Entry("arr_0.npy", b"\x93NUMPY")]), "is a zip archive, but not of torch.save"),
        ("docx", zip_bytes([Entry("[Content_Types].xml", b"<x/>")]), "is a zip archive, but not of torch.save"),
        ("nothing-in-it", b"PK\3\4" + zip_bytes([]), "zip directory|is a zip, but not"),
        ("big-endian", archive(pickle, byteorder=b"big"), "byte order b'big' is not supported"),
        ("byte-order-middle", archive(pickle, byteorder=b"middle"), "byte order b'middle' is not supported"),
        ("byte-order-long", archive(pickle, byteorder=b"x" * 10_000), "far too many"),
        ("version-99", archive(pickle, version=b"99\n"), "archive version b'99' is not supported"),
        ("version-text", archive(pickle, version=b"three"), "archive version b'three' is not supported"),
        ("compressed-flag", changed(1, central={"method": 8}, local={"method": 8}), "is compressed"),
        ("encrypted", changed(1, central={"flags": 1}, local={"flags": 1}), "is encrypted"),
        ("method-only-inside", changed(1, local={"method": 8}), "do not agree"),
        ("name-only-inside", changed(1, local={"name": b"archive/data/9"}), "do not agree"),
        ("size-only-inside", changed(1, local={"size": 5}), "do not agree"),
        ("crc-only-inside", changed(1, local={"crc": 5}), "do not agree"),
        ("signature-inside", changed(1, local={"signature": b"PK\3\5"}), "do not agree"),
        ("stored-size-differs", changed(1, central={"stored": 5}), "contradicts itself"),
        (
            "size-too-large",
            changed(1, central={"size": 10**6, "stored": 10**6}, local={"size": 10**6, "stored": 10**6}),
            "places .* (over another record|beyond the end)",
        ),
        ("offset-too-large", changed(1, central={"offset": 2**31}), "beyond the end of the records"),
        ("offset-of-another", changed(2, central={"offset": 0}), "places .* over another record|do not agree"),
        ("size-of-4-gib", changed(1, central={"size": 0xFFFFFFFF}), "lacks a size of more than 4 GiB"),
        ("disk", changed(1, central={"disk": 1}), "has a bad entry"),
        ("not-utf8", zip_bytes([*parts, Entry("archive/\udcff", b"x")]), "UTF-8|do not agree"),
        ("nul-in-a-name", zip_bytes([*parts, Entry("archive/a\0b", b"x")]), "has a name with a NUL"),
        ("control-in-a-name", zip_bytes([*parts, Entry("out\x1b[1m\n", b"x")]), r"lists out\\x1b\[1m\\n, which is"),
        ("count-too-small", zip_bytes(parts, here=3, count=3), "bytes after its 3 entries"),
        ("count-too-large", zip_bytes(parts, here=9, count=9), "is cut off"),
        ("count-two-ways", zip_bytes(parts, here=3), "one part of a zip archive in several"),
        ("directory-size", zip_bytes(parts, size=7), "but should end at"),
        ("directory-offset", zip_bytes(parts, offset=7), "but should end at"),
        ("directory-offset-4-gib", zip_bytes(parts, offset=0xFFFFFFFF), "but should end at"),
        ("comment", zip_bytes(parts, comment=9), "truncated|follow"),
        ("disks", zip_bytes(parts, disk=1), "one part of a zip archive in several"),
        ("bytes-before", zip_bytes(parts, before=b"PK\3\4"), "bytes before its first record"),
    ):
        yield _case(f"zip-{name}", content, message)
    more = {"data": flipped, "central": crc, "local": crc}
    message = "weight: .*checksum of record data/0 does not match"
    yield _case("zip-flipped-weights", changed(1, **more), message)
    bad = pickle.replace(b"weight", b"weigth")
    crc = {"crc": zlib.crc32(pickle)}
    yield _case("zip-flipped-pickle", changed(0, data=bad, central=crc, local=crc), "checksum of record data.pkl")
    assert weight == 24


def _bombs() -> Iterator[Case]:
    pickle = op.program(op.mapping(op.good()))

    def deflated(parts: Mapping[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
            for name, data in parts.items():
                target.writestr(f"archive/{name}", data)
        return buffer.getvalue()

    yield _case(
        "bomb-deflated", lambda: deflated(_parts(pickle, RECORDS, {})), "is compressed, unlike those of torch.save"
    )
    yield _case("bomb-pickle", lambda: deflated({"data.pkl": bytes(64 << 20)}), "is compressed")
    yield _case("bomb-storage", lambda: deflated({"data.pkl": pickle, "data/0": bytes(64 << 20)}), "is compressed")
    yield _case("bomb-large-pickle", lambda: archive(bytes(65 << 20), {}), r"data.pkl has \d+ bytes, more than")
    yield _case("bomb-a-million-entries", lambda: _many_entries(1_000_000), "1000000 entries .* is too large")
    yield _case("bomb-2^64-entries", lambda: _many_entries(9, 2**64 - 1), "entries .* is too large")
    for name, body in (
        ("lists", b"]" * 10_000_000), ("deep-lists", b"]" * 300_000 + b"a" * 299_999),
        ("deep-tuples", b")" + b"\x85" * 900_000), ("doubling", b")" + b"\x86" * 9),
        ("marks", b"(" * 900_000), ("memo", b"N" + b"\x94" * 30_000_000),
        ("deep-key", b"}" + b")" + b"\x85" * 131_000 + b"Ns"),
        ("dicts", b"}" * 4_000_000), ("globals", b"cx\ny\n" * 2_000_000),
        ("calls", b"cx\ny\n" + b")R" * 5_000_000),
        ("laughs", _laughs()),
        ("self", b"}q\x00" + op.text("a") + b"h\x00s"), ("self-list", b"}" + op.text("a") + b"]q\x00h\x00as"),
        ("large-integer", b"\x8b" + struct.pack("<I", 2**31 - 1)), ("large-text", b"X" + struct.pack("<I", 2**32 - 1)),
        ("huge-text", b"\x8d" + struct.pack("<Q", 2**63)), ("huge-bytes", b"\x8e" + struct.pack("<Q", 2**64 - 1)),
        ("huge-bytearray", b"\x96" + struct.pack("<Q", 2**40)), ("huge-memo", b"Nr" + struct.pack("<I", 2**32 - 1)),
        ("huge-frame", b"\x95" + struct.pack("<Q", 2**63)),
        ("hash-collisions", b"}(" + b"".join(op.number(i * (2**61 - 1)) + b"N" for i in range(50_000)) + b"u"),
    ):  # fmt: skip
        message = (
            "(memory|deep|cut off|contains itself|counted at each use|integer|memo|not a state dict|complete|no model"
        )
        message += "|stack|two keys)"
        yield _case(f"bomb-{name}", partial(_whole, body), message, quick=len(body) > 10**6)


def _whole(body: bytes) -> bytes:
    return archive(op.program(body, 4))


def _laughs() -> bytes:
    """A list that holds one list nine times, recursively: 9^20 values."""
    body = b"]q\x00"
    for i in range(20):
        body += b"0](" + b"h%c" % i * 9 + b"eq%c" % (i + 1)
    return b"}" + op.text("a") + body + b"s"


def _many_entries(count: int, told: int = 0) -> bytes:
    """A zip64 archive of empty records, built quickly."""
    first = Entry("archive/data.pkl")
    head = zip_bytes([first])
    body = bytearray(head[: 30 + len(first.name)])
    directory = bytearray(head[len(body) : -22])
    local = struct.Struct("<4s5H3L2H15s")
    central = struct.Struct("<4s6H3L5H2L15s")
    for i in range(count - 1):
        name = b"archive/%07d" % i
        directory += central.pack(b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, 15, 0, 0, 0, 0, 0, len(body), name)
        body += local.pack(b"PK\3\4", 0, 0, 0, 0, 0, 0, 0, 0, 15, 0, name)
    told = told or count
    offset, size = len(body), len(directory)
    tail = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, told, told, size, offset)
    tail += struct.pack("<4sLQL", b"PK\6\7", 0, offset + size, 1)
    tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return bytes(body + directory + tail)


def _pickles() -> Iterator[Case]:
    for name, body, message in (
        ("empty", b"", "does not start like a pickle"),
        ("protocol-0", b"(dp0\n.", "does not start like a pickle"),
        ("protocol-9", b"\x80\x09}.", "does not start like a pickle|above 5"),
        ("no-stop", b"\x80\x02}", "cut off"),
        ("nothing", b"\x80\x02.", "pops from an empty stack"),
        ("two-values", b"\x80\x02}}.", "ends before it is complete"),
        ("open-mark", b"\x80\x02(}.", "ends before it is complete"),
        ("unknown-opcode", b"\x80\x02\xff.", "is not an opcode"),
        ("text-opcode", b"\x80\x02I1\n.", "is not an opcode"),
        ("string-opcode", b"\x80\x02S'a'\n.", "is not an opcode"),
        ("pop-nothing", b"\x80\x020.", "pops from an empty stack"),
        ("memo-missing", b"\x80\x02h\x05.", "memo 5 is missing"),
        ("not-utf8", b"\x80\x02X\x01\x00\x00\x00\xff.", "is not UTF-8"),
        ("global-without-end", b"\x80\x02c" + b"x" * 5000 + b".", "does not end"),
        ("appends-to-a-number", b"\x80\x02K\x01Na.", "appends to a int"),
        ("sets-in-a-list", b"\x80\x02]NNs.", "sets an item of a list"),
        ("odd-items", b"\x80\x02}(Nu.", "a key without a value"),
        ("calls-a-number", b"\x80\x02K\x01)R.", "calls something that is not callable"),
        ("state-of-a-number", b"\x80\x02K\x01}b.", "sets the state of a int"),
        ("a-list", b"\x80\x02].", "holds a list, not a state dict"),
        ("none", b"\x80\x02N.", "holds None, not a state dict"),
        ("a-number", b"\x80\x02K\x07.", "holds an int, not a state dict"),
        ("an-empty-dict", b"\x80\x02}.", "no model found"),
        ("a-tensor", op.program(op.good()["weight"]), "holds a tensor, not a state dict"),
        ("numbers", op.program(op.mapping({"a": b"K\x01", "b": b"N"})), "no model found"),
        ("an-optimizer", op.program(op.mapping({"state": b"}", "param_groups": b"]"})), None),
        ("int-keys", op.program(b"}K\x01" + op.good()["weight"] + b"s"), "its key is a int, not a name"),
        ("bytes-keys", op.program(b"}C\x01a" + op.good()["weight"] + b"s", 4), "its key is a bytes, not a name"),
        ("tuple-keys", op.program(b"})" + op.good()["weight"] + b"s"), "its key is a tuple, not a name"),
        ("tensor-keys", op.program(b"}" + op.good()["weight"] + op.good()["weight"] + b"s"), "its key is a"),
        ("control-key", op.program(op.mapping({"a\x1b[1m\n": op.good()["weight"]})), "name must have"),
        ("surrogate-key", op.program(op.mapping({"a\ud800": op.good()["weight"]})), "name must have"),
        ("empty-key", op.program(op.mapping({"": op.good()["weight"]})), "name must have"),
        ("long-key", op.program(op.mapping({"x" * 5000: op.good()["weight"]})), "name must have"),
        ("a-persistent-number", op.program(b"K\x01Q"), "a persistent id is not a storage's"),
        ("persistent-text", op.program(b"Px\n"), "is not an opcode"),
    ):
        if message is None:
            yield _case(f"pickle-{name}", archive(body), "wrote", code=0, inspect=0)
        else:
            yield _case(f"pickle-{name}", archive(body), message)


def _modules() -> Iterator[Case]:
    weight = op.mapping(op.good())
    shared = op.module(parameters=weight)
    for index in range(60, 0, -1):  # each module holds the next one twice
        shared = op.module(b"}(" + op.text("a") + shared + op.text("b") + b"h%cu" % index)
    deep = op.module(parameters=weight)
    for _ in range(70):
        deep = op.module(op.mapping({"a": deep}))
    long = op.module(
        op.mapping({"x" * 4000: op.module(parameters=op.mapping({f"{i}": b"h\x00" for i in range(50_000)}))})
    )
    for name, body, message in (
        ("inside-itself", op.module(op.mapping({"a": b"h\x00"}), weight), "a: is a net.Net that contains itself"),
        ("inside-its-child", op.module(op.mapping({"a": op.module(op.mapping({"b": b"h\x00"}))})), "a.b: .*itself"),
        ("shared", shared, "counted at each use"),
        ("nested", deep, "nested more than 64 deep"),
        ("many", op.mapping({"a": b"](" + op.module() * 100_000 + b"e"}), "no model found"),
        ("long-names", op.good()["weight"] + b"\x94" + b"0" + long, "counted at each use|name must have"),
        ("name-a-number", op.module(b"}K\x01" + op.module() + b"s"), "1: .*name"),
        ("weight-a-number", op.module(parameters=op.mapping({"a": b"K\x01"})), "a: is a int, not a plain tensor"),
        ("weight-named-by-a-number", op.module(parameters=b"}K\x01" + op.good()["weight"] + b"s"), "1: its key"),
        ("two-of-a-name", op.module(op.mapping({"a": op.module(parameters=weight)}),
                                    op.mapping({"a.weight": op.good()["bias"]})), "a.weight: two keys have this name"),
        ("control-name", op.module(op.mapping({"\x1b[1m": op.module(parameters=weight)})), "name must have"),
        ("child-a-number", op.module(op.mapping({"a": b"K\x01"})), "a: is a int whose weights are not visible"),
        ("child-a-script", op.module(op.mapping({"a": op.name("torch.jit.ScriptModule") + b")\x81"})),
         "a: is a torch.jit.ScriptModule whose weights are not visible"),
        ("tables-a-list", op.module(b"]"), "is a net.Net whose weights are not visible"),
        ("state-a-list", op.module(state=b"]"), "is a net.Net whose weights are not visible"),
        ("transient-nested", op.module(state=op.mapping({
            "_parameters": weight, "_modules": b"}", "_buffers": b"}", "_non_persistent_buffers_set": b"]]a"})), None),
    ):  # fmt: skip
        more = {"code": 0, "inspect": 0} if message is None else {}
        yield _case(f"module-{name}", archive(op.program(body, 4)), message or "wrote", **more)
    yield _case(
        "module-payload",
        archive(op.program(op.module(parameters=op.mapping({"weight": op.SHAPES["reduce"]})), 4)),
        r"weight: is a os\.system",
        payload=True,
    )


def _tensors() -> Iterator[Case]:
    of = op.storage("0", 6)
    views = {
        "shape-negative": op.tensor((-2, 3), (3, 1), of),
        "stride-negative": op.tensor((2, 3), (-3, 1), of),
        "offset-negative": op.tensor((2, 3), (3, 1), of, offset=-1),
        "shape-2^63": op.tensor((2**63,), (1,), of),
        "shape-overflow": op.tensor((2**32, 2**32), (2**32, 1), of),
        "too-large": op.tensor((2, 300), (300, 1), of),
        "offset-too-large": op.tensor((2, 3), (3, 1), of, offset=1),
        "offset-2^62": op.tensor((2, 3), (3, 1), of, offset=2**62),
        "stride-too-large": op.tensor((2, 3), (4, 1), of),
        "stride-2^62": op.tensor((2, 3), (2**62, 1), of),
        "stride-zero": op.tensor((2**40,), (0,), of),
        "overlapping": op.tensor((3, 3), (1, 1), of),
        "rank-65": op.tensor((1,) * 65, (1,) * 65, of),
        "ranks-differ": op.tensor((2, 3), (1,), of),
        "record-missing": op.tensor((2, 3), (3, 1), op.storage("7", 6)),
        "record-outside": op.tensor((2, 3), (3, 1), op.storage("../../../etc/passwd", 6)),
        "numel-too-large": op.tensor((2, 3), (3, 1), op.storage("0", 7)),
        "numel-negative": op.tensor((2, 3), (3, 1), op.storage("0", -6)),
        "numel-2^62": op.tensor((2, 3), (3, 1), op.storage("0", 2**62)),
        "storage-unknown": op.tensor((2, 3), (3, 1), op.storage("0", 6, cls="torch.QInt8Storage")),
        "meta": op.tensor((2, 3), (3, 1), op.storage("0", 6, location="meta")),
        "conjugate": op.tensor((2, 3), (3, 1), of, more=op.mapping({"conj": b"\x88"})),
        "sparse": op.call("torch._utils._rebuild_sparse_tensor", b"N", op.several()),
        "quantized": op.call("torch._utils._rebuild_qtensor", of, op.number(0)),
        "no-arguments": op.call("torch._utils._rebuild_tensor_v2"),
        "of-no-storage": op.tensor((2, 3), (3, 1), op.number(7)),
        "parameter-of-nothing": op.call("torch._utils._rebuild_parameter", b"N", b"\x88", b"N"),
        "subclass": op.call("torch._tensor._rebuild_from_type_v2", op.name("torch._utils._rebuild_tensor_v2"),
                            op.name("torchao.AffineQuantizedTensor"), op.several(), b"}"),
        "uninitialised": op.call("torch.Tensor", op.number(1000)),
        "type-v3-unknown": op.call("torch._utils._rebuild_tensor_v3", of, op.number(0), op.numbers((2, 3)),
                                   op.numbers((3, 1)), b"\x89", b"}", op.name("torch.float4_e2m1fn_x2")),
    }  # fmt: skip
    for name, view in views.items():
        yield _case(f"tensor-{name}", state({"weight": view, "bias": op.good()["bias"]}), r"step-3\.pt: weight: \S+")
    half = op.tensor((2, 3), (3, 1), op.storage("0", 12, cls="torch.HalfStorage"))
    disagree = state({"weight": half, "bias": op.good()["bias"]})
    yield _case("disagree-dtype", disagree, "weight: dtype F16, but 2 other", code=4, inspect=0)
    nested = state({"state_dict": op.mapping({"weight": op.good()["weight"]})})
    yield _case("disagree-missing", nested, "bias: missing", code=4, inspect=0)
    for name, bits in (("nan", 0x7FC00000), ("inf", 0x7F800000)):
        records = {"0": struct.pack("<I", bits) + RECORDS["0"][4:], "1": RECORDS["1"]}
        content = archive(op.program(op.mapping(op.good())), records)
        yield _case(f"value-{name}", content, "weight: 1 value is NaN or infinite, the first at element 0", inspect=0)
    mask = state({"mask": op.tensor((24,), (1,), op.storage("0", 24, cls="torch.BoolStorage"))})
    yield _case("bool-values", mask, "mask: .* neither 0 nor 1", alone=True)
    for dtype in ("float8_e4m3fn", "complex64"):
        view = op.call("torch._utils._rebuild_tensor_v3", op.storage("0", 24, cls="torch.UntypedStorage"),
                       op.number(0), op.numbers((3,)), op.numbers((1,)), b"\x89", b"}",
                       op.name(f"torch.{dtype}"))  # fmt: skip
        yield _case(f"alone-{dtype}", state({"w": view}), "w: dtype .* cannot be averaged", alone=True, inspect=0)


def _payloads() -> Iterator[Case]:
    programs = {f"call-{name}": op.call(name, *arguments) for name, arguments in op.CALLS.items()}
    programs |= {f"by-{name}": body for name, body in op.SHAPES.items()}
    odd = {"in-a-list", "in-a-set", "in-a-frozen-set", "default-factory", "state-of-an-ordered-dict", "encoded",
           "bytes-with-a-pickle"}  # fmt: skip
    tensor_like = {"torch._utils", "torch.Tensor", "torch.UntypedStorage"}
    for name, body in programs.items():
        alone = name.removeprefix("by-") not in odd
        if alone:
            yield _case(f"payload-{name}", archive(op.program(body, 4)), r"step-3\.pt: \S+", payload=True)
        beside = {"state_dict": op.mapping(op.good()), "callback": body, "epoch": b"K\x07"}
        if not any(part in name for part in tensor_like):
            yield _case(f"payload-beside-{name}", state(beside), "wrote .*out.safetensors", code=0, inspect=0,
                        payload=True)  # fmt: skip
    for name, body in op.TENSORS.items():
        if name == "hooks":  # fields that are not read
            continue
        message = r"step-3\.pt: (weight: |data.pkl is damaged: a persistent id)"
        yield _case(f"payload-tensor-{name}", state({"weight": body, "bias": op.good()["bias"]}), message, payload=True)
    yield _case("payload-tensor-hooks", state({**op.good(), "weight": op.TENSORS["hooks"]}), "wrote .*out", code=0,
                inspect=0, payload=True)  # fmt: skip
    key = b"}" + op.SHAPES["reduce"] + op.good()["weight"] + b"s"
    yield _case("payload-as-a-key", archive(op.program(key)), "its key is a os.system, not a name", payload=True)


def _legacy() -> Iterator[Case]:
    run = op.SHAPES["reduce"]
    bare = "is a pickle with no zip around it"
    yield _case("bare-pickle", op.program(run), bare, payload=True)
    yield _case("bare-protocol-4", op.program(run, 4), bare, payload=True)
    yield _case("bare-protocol-0", b"cos\nsystem\n(S'touch ran'\ntR.", "not a checkpoint", payload=True)
    magic = op.program(op.number(0x1950A86A20F9469CFC6C)) + op.program(op.number(1001)) + op.program(b"}")
    yield _case("legacy", magic + op.program(run), bare, payload=True)
    yield _case("legacy-cut", magic[:20], bare)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as target:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(op.program(run))
            target.addfile(info, io.BytesIO(op.program(run)))
    tar = buffer.getvalue()
    yield _case("legacy-tar", tar, "is a tar archive", payload=True)
    yield _case("legacy-tar-cut", tar[:700], "file is truncated: 700 bytes", payload=True)
    yield _case("legacy-tar-gz", gzip.compress(tar), "is a gzip archive", payload=True, name=".pth")
    yield _case("tar-of-torch-0.3", tar, "is a tar archive without model_weights", payload=True, name=".ckpt")


def _inside() -> Iterator[Case]:
    """Torch files inside zip and tar archives."""
    run, good = archive(op.program(op.SHAPES["reduce"])), state()

    def tar(*members: tuple[str, bytes], size: int | None = None, kind: bytes = b"0") -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as target:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size, info.type = len(content) if size is None else size, kind
                target.addfile(info, io.BytesIO(content) if size is None else None)
        return buffer.getvalue()

    def zipped(content: bytes = good, *more: Entry, name: str = "policy.pth", **change: Any) -> bytes:
        return zip_bytes([Entry("data", b"{}"), Entry(name, content, change, change), *more])

    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("policy.pth", bytes(64 << 20))
    weights = "model_weights.ckpt"
    for name, content, message in (
        ("zip-payload", zipped(run), r"os\.system"),
        ("zip-cut", zipped(good[:-1]), "file is truncated"),
        ("zip-in-a-zip", zipped(zipped()), "is a zip archive, but not of torch.save"),
        ("zip-of-two", zipped(good, Entry("x/policy.pth", good)), "is a zip archive of 2 checkpoints"),
        ("zip-deflated", deflated.getvalue(), "policy.pth in it is compressed"),
        ("zip-encrypted", zipped(flags=1), "policy.pth is encrypted"),
        ("zip-sizes-differ", zipped(size=9), "contradicts itself"),
        ("zip-too-large", zipped(size=10**9, stored=10**9), "beyond the end of the records"),
        ("zip-of-another", zip_bytes([Entry("data", b"{}"), Entry("policy.pth", good, {"offset": 0})]), "do not agree"),
        ("zip-named-by-controls", zipped(good[:-1], name="\x1b[1m\n.pth"), "file is truncated"),
        ("tar-payload", tar((weights, run)), r"os\.system"),
        ("tar-twice", tar((weights, good), (f"./{weights}", good)), "has 2 entries of model_weights.ckpt"),
        ("tar-too-large", tar((weights, b""), size=10**9), "beyond its end"),
        ("tar-a-link", tar((weights, b""), kind=tarfile.SYMTYPE), "not one file"),
        ("tar-large-attributes", tar(("a", bytes(70_000)), kind=tarfile.XHDTYPE), "has attributes of 70000 bytes"),
        ("tar-of-10001", tar(*[("a", b"")] * 10_001), "has more than 10000 entries"),
        ("tar-in-a-tar", tar((weights, tar((weights, good)))), "not a checkpoint|zip|truncated"),
    ):
        yield _case(f"inside-{name}", content, message, payload="payload" in name)

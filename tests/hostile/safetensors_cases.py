"""Safetensors files with invalid headers, offsets, shapes, dtypes, names and values."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from hostile.case import Case, container, entries, file, plain, values

_F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
_BIAS = {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}
_DATA = values(8)


def cases() -> Iterator[Case]:
    """Return all cases."""
    for number, case in enumerate((*_cut(), *_lengths(), *_headers(), *_tensors(), *_names(), *_values())):
        assert number < 1000
        yield case


def _case(id: str, header: object, message: str, data: bytes = _DATA, **more: Any) -> Case:
    return file(f"safetensors/{id}", container(header, data), message, **more)


def _with(weight: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"weight": {**_F32, **weight}, "bias": _BIAS, **more}


def _cut() -> Iterator[Case]:
    whole = plain()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (1, 7, 8, 9, 10, 40, header - 1, header, header + 1, header + 23, header + 24, header + 25,
                   len(whole) - 1):  # fmt: skip
        yield file(f"safetensors/cut-{length}", whole[:length], "file is truncated|not a checkpoint")
    yield file("safetensors/empty", b"", "file is empty")
    yield file("safetensors/longer", whole + b"\0", "1 bytes follow the last tensor")
    yield file("safetensors/twice", whole + whole, "bytes follow the last tensor")
    yield file("safetensors/zeros", bytes(4096), "not a checkpoint in a known format")


def _lengths() -> Iterator[Case]:
    for bit in range(0, 64, 3):
        raw = bytearray(plain())
        raw[bit // 8] ^= 1 << bit % 8
        yield file(f"safetensors/length-bit-{bit}", bytes(raw), "header|not a checkpoint|truncated|overlaps|follow")
    for name, length in (("2^63", 2**63), ("2^63-1", 2**63 - 1), ("2^64-1", 2**64 - 1), ("100000001", 100_000_001),
                         ("0", 0), ("1", 1), ("the-limit", 16 << 20)):  # fmt: skip
        content = container(entries()[0], _DATA, length=length)
        yield file(f"safetensors/length-{name}", content, f"header length {length} is larger|truncated|not valid JSON")


def _headers() -> Iterator[Case]:
    good = json.dumps(entries()[0]).encode()
    texts = {
        "not-json": (b"{'weight': 1}", "not valid JSON"),
        "cut-json": (good[:-3] + b"   ", "not valid JSON"),
        "not-utf8": (b'{"\xff\xfe": 1}', "not valid JSON"),
        "utf16": ("{}".encode("utf-16-le"), "not valid JSON"),
        "byte-order-mark": (b"\xef\xbb\xbf" + good, "not a checkpoint"),
        "leading-space": (b" " + good, "not a checkpoint"),
        "a-list": (b"[" + good + b"]", "not a checkpoint"),
        "a-second-value": (good + b"{}", "not valid JSON"),
        "deep": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not valid JSON"),
        "deep-objects": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "not valid JSON"),
        "nan": (b'{"weight": NaN}', "NaN is not allowed"),
        "infinity": (b'{"weight": -Infinity}', "Infinity is not allowed"),
        "5000-digits": (b'{"weight": ' + b"9" * 5000 + b"}", "not valid JSON"),
        "1e999": (b'{"weight": 1e999}', "must have exactly"),
        "empty": (b"{}", "no model found"),
        "only-metadata": (b'{"__metadata__":{}}', "no model found"),
        "metadata-number": (b'{"__metadata__":{"a":1}}', "__metadata__ must map"),
        "metadata-nested": (b'{"__metadata__":{"a":{}}}', "__metadata__ must map"),
        "metadata-list": (b'{"__metadata__":[]}', "__metadata__ must map"),
        "metadata-null": (b'{"__metadata__":null}', "__metadata__ must map"),
        "metadata-tensor": (json.dumps({"__metadata__": _F32}).encode(), "__metadata__ must map"),
        "metadata-twice": (b'{"__metadata__":{},"__metadata__":{}}', "occurs twice"),
        "metadata-key-twice": (b'{"__metadata__":{"a":"1","a":"2"}}', "occurs twice"),
        "duplicate-same": (good[:-1] + b", " + good[1:], "'weight' occurs twice"),
        "duplicate-other": (good[:-1] + b', "weight": {"dtype":"F32","shape":[1],"data_offsets":[32,36]}}', "occurs"),
        "duplicate-by-escape": (good[:-1] + b', "\\u0077eight": ' + json.dumps(_F32).encode() + b"}", "occurs twice"),
        "duplicate-field": (b'{"weight":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]}}', "occurs"),
        "entry-null": (b'{"weight": null}', "must have exactly"),
        "entry-list": (b'{"weight": [1]}', "must have exactly"),
        "entry-text": (b'{"weight": "F32"}', "must have exactly"),
    }
    for name, (text, message) in texts.items():
        yield _case(f"header-{name}", text, message, b"" if message == "no model found" else _DATA)
    yield file("safetensors/metadata-huge", lambda: container({"__metadata__": {"a": "x" * (17 << 20)}}), "header len")


def _tensors() -> Iterator[Case]:
    shape = "shape must be a list"
    offsets = "data_offsets must be two"
    for name, change, message in (
        ("field-missing", {"x": 1}, "must have exactly"),
        ("shape-negative", {"shape": [-2, -3]}, shape),
        ("shape-minus-one", {"shape": [2, -1]}, shape),
        ("shape-float", {"shape": [2.0, 3.0]}, shape),
        ("shape-text", {"shape": "6"}, shape),
        ("shape-texts", {"shape": ["2", "3"]}, shape),
        ("shape-null", {"shape": None}, shape),
        ("shape-bool", {"shape": [True, 6]}, shape),
        ("shape-nested", {"shape": [[2, 3]]}, shape),
        ("shape-object", {"shape": {"0": 6}}, shape),
        ("shape-2^63", {"shape": [2**63]}, shape),
        ("shape-2^64-1", {"shape": [0, 2**64 - 1]}, shape),
        ("shape-2^64", {"shape": [2**64]}, shape),
        ("shape-overflow", {"shape": [2**32, 2**32]}, "takes 73786976294838206464 bytes"),
        ("shape-overflow-to-24", {"shape": [2**62 + 6, 4]}, "bytes, but data_offsets span 24"),
        ("shape-rank-65", {"shape": [1] * 65}, shape),
        ("shape-rank-100000", {"shape": [1] * 100_000}, shape),
        ("shape-small", {"shape": [2, 2]}, "takes 16 bytes, but data_offsets span 24"),
        ("shape-large", {"shape": [2, 300]}, "takes 2400 bytes"),
        ("offsets-reversed", {"data_offsets": [24, 0]}, offsets),
        ("offsets-negative", {"data_offsets": [-8, 16]}, offsets),
        ("offsets-one", {"data_offsets": [24]}, offsets),
        ("offsets-three", {"data_offsets": [0, 24, 24]}, offsets),
        ("offsets-float", {"data_offsets": [0, 24.0]}, offsets),
        ("offsets-text", {"data_offsets": ["0", "24"]}, offsets),
        ("offsets-null", {"data_offsets": None}, offsets),
        ("offsets-2^63", {"data_offsets": [2**63, 2**63 + 24]}, offsets),
        ("offsets-almost-2^63", {"data_offsets": [2**63 - 25, 2**63 - 1]}, "leaves a gap|overlaps"),
        ("offsets-beyond-the-end", {"data_offsets": [32, 56]}, "leaves a gap after byte 0|truncated"),
        ("offsets-overlap", {"data_offsets": [8, 32]}, "overlaps|gap"),
        ("offsets-hole", {"data_offsets": [40, 64]}, "gap"),
        ("offsets-same", {"shape": [2], "data_offsets": [24, 32]}, "overlaps|gap"),
        ("dtype-unknown", {"dtype": "F33"}, "dtype 'F33' is not supported; supported are"),
        ("dtype-lower", {"dtype": "f32"}, "is not supported"),
        ("dtype-number", {"dtype": 32}, "is not supported"),
        ("dtype-null", {"dtype": None}, "is not supported"),
        ("dtype-list", {"dtype": ["F32"]}, "is not supported"),
        ("dtype-f6", {"dtype": "F6_E2M3"}, "is not supported"),
        ("dtype-f4", {"dtype": "F4"}, "is not supported"),
        ("dtype-long", {"dtype": "F" * 100_000}, "is not supported"),
        ("dtype-f64", {"dtype": "F64"}, "takes 48 bytes"),
    ):
        yield _case(
            name, _with(change), f"(weight|bias): .*({message})" if "gap" in message else f"weight: .*({message})"
        )
    for dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        header = {"weight": {"dtype": dtype, "shape": [24], "data_offsets": [0, 24]}, "bias": _BIAS}
        yield _case(f"alone-{dtype}", header, f"weight: dtype {dtype} cannot be averaged", alone=True, inspect=0)
    header = {"weight": {"dtype": "C64", "shape": [3], "data_offsets": [0, 24]}, "bias": _BIAS}
    yield _case("complex-among-floats", header, r"weight: shape \[3\], but 2 other", code=4, inspect=0)
    half = {"weight": {"dtype": "F16", "shape": [2, 6], "data_offsets": [0, 24]}, "bias": _BIAS}
    disagree: dict[str, Any] = {"code": 4, "inspect": 0}
    yield _case("disagree-shape", _with({"shape": [3, 2]}), r"weight: shape \[3, 2\], but 2 other", **disagree)
    yield _case("disagree-dtype", half, r"weight: shape \[2, 6\], but 2 other", **disagree)
    yield _case("disagree-dtype-only", _with({"dtype": "I32"}), "weight: dtype I32, but 2 other", **disagree)
    yield _case("disagree-c64", header, "weight: shape", **disagree)
    yield _case("disagree-missing", {"weight": _F32}, "bias: missing", _DATA[:24], **disagree)
    more = _with({}, extra={"dtype": "F32", "shape": [0], "data_offsets": [32, 32]})
    yield _case("disagree-more", more, "extra: 2 other candidates have no such", **disagree)
    renamed = {"wEight": _F32, "bias": _BIAS}
    yield _case("disagree-renamed", renamed, "wEight: .* no such tensor", **disagree)
    empty = {"dtype": "F32", "shape": [0, 2**63 - 1], "data_offsets": [0, 0]}
    yield _case("zero-elements", {"weight": empty}, "bias: missing", b"", **disagree)


def _names() -> Iterator[Case]:
    bad = "a tensor's name must have 1 to 4096 characters"
    for name, key, message in (
        ("empty", "", bad), ("nul", "a\0b", bad), ("newline", "a\nb", bad), ("escape", "\x1b[31mred", bad),
        ("delete", "a\x7f", bad), ("long", "x" * 4097, bad), ("megabyte", "x" * (1 << 20), bad),
        ("surrogate", "a\ud800b", "surrogate|a tensor's name"),
        ("c1-control", "a\x9b31m", bad),
    ):  # fmt: skip
        yield _case(f"name-{name}", {key: _F32, "bias": _BIAS}, message)
    for name, key in (
        ("path", "../../etc/passwd"), ("absolute", "/etc/passwd"), ("backslash", "a\\b"), ("markup", "[/red]"),
        ("chinese", "权重"), ("hebrew", "משקל"), ("right-to-left", "a\u202eb"), ("emoji", "🔥"), ("space", " "),
        ("nfc-and-nfd", "\u00e9"), ("wide", "\u3000"), ("option", "--force"), ("format", "%s{}{0}"), ("dot", "."),
    ):  # fmt: skip
        header = {key: _F32, "e\u0301": _BIAS}
        yield _case(f"name-{name}", header, "wrote .*out.safetensors", alone=True, code=0, inspect=0)
    yield file("safetensors/100000-tensors", _many(100_000), "100000", alone=True, code=0, inspect=0, quick=True)
    yield file("safetensors/10000-tensors", _many(10_000), "wrote", alone=True, code=0, inspect=0)
    yield file("safetensors/a-million-tensors", _many(1_000_000), "header length .* is larger")


def _many(count: int) -> Any:
    def make() -> bytes:
        every = ",".join(
            f'"layer.{i}.w":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}' for i in range(count)
        )
        return container(f"{{{every}}}".encode(), b"\0\0\x80\x3f" * count)

    return make


def _values() -> Iterator[Case]:
    for name, bits in (("nan", 0x7FC00000), ("signalling-nan", 0x7F800001), ("inf", 0x7F800000), ("-inf", 0xFF800000)):
        for at in (0, 5, 7):
            data = _DATA[: 4 * at] + struct.pack("<I", bits) + _DATA[4 * at + 4 :]
            tensor, i = ("weight", at) if at < 6 else ("bias", at - 6)
            message = f"{tensor}: 1 value is NaN or infinite, the first at element {i}"
            yield _case(f"value-{name}-{at}", _with({}), message, data, inspect=0)
    for byte in (2, 3, 128, 255):
        header = {"mask": {"dtype": "BOOL", "shape": [24], "data_offsets": [0, 24]}, "bias": _BIAS}
        data = bytes(10) + bytes([byte]) + bytes(13) + _DATA[24:]
        yield _case(
            f"bool-{byte}",
            header,
            f"mask: element 10 is the byte {byte}, neither 0 nor 1",
            data,
            alone=True,
        )
    wide = {"weight": {"dtype": "F64", "shape": [2, 3], "data_offsets": [0, 48]}}
    yield _case("overflow-to-half", wide, "weight: the average overflows", struct.pack("<6d", *[1e300] * 6),
                alone=True, options=("--dtype", "float16"), inspect=0)  # fmt: skip

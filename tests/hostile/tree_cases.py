"""Directories of Hugging Face, PEFT and the Trainer: inconsistent indexes, oversized sidecars, interrupted saves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hostile import opcodes as op
from hostile.case import Case, container, entries, plain, tree, values, write
from hostile.foreign_cases import PAGE, POINTER
from hostile.torch_cases import archive

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
MAP = {"weight": FIRST, "bias": SECOND}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "x"}
_PAYLOAD = archive(op.program(op.SHAPES["reduce"]))
# values that must not mislead a parser
BAD_JSON: dict[str, bytes] = {
    "empty": b"", "null-bytes": bytes(64), "cut": b'{"a": [1, 2', "not-utf8": b'{"a": "\xff"}', "a-list": b"[1, 2]",
    "a-number": b"7", "text": b'"x"', "nan": b'{"a": NaN}', "infinity": b'{"a": -Infinity}', "twice": b'{"a":1,"a":2}',
    "byte-order-mark": b'\xef\xbb\xbf{"a": 1}', "5000-digits": b'{"a": ' + b"9" * 5000 + b"}",
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deep-objects": b'{"a":' * 200_000, "page": PAGE,
    "lfs-pointer": POINTER, "pickle": op.program(op.SHAPES["reduce"]), "single-quotes": b"{'a': 1}",
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Return all cases."""
    yield from (*_indexes(), *_peft(), *_trainer(), *_folders())


def _shard(name: str) -> bytes:
    header, size = entries({name: {"weight": ("F32", [2, 3]), "bias": ("F32", [2])}[name]})
    return container(header, values(size // 4))


def sharded(weight_map: Any = MAP, **files: bytes | None) -> dict[str, bytes]:
    """Return a model in two shards; a file whose content is None is missing."""
    index = weight_map if isinstance(weight_map, bytes) else json.dumps({"metadata": {}, "weight_map": weight_map})
    found: dict[str, bytes | None] = {FIRST: _shard("weight"), SECOND: _shard("bias")}
    found[INDEX] = index if isinstance(index, bytes) else index.encode()
    return {name: data for name, data in {**found, **files}.items() if data is not None}


def _indexes() -> Iterator[Case]:
    def case(
        id: str, files: Mapping[str, bytes] | Callable[[], Mapping[str, bytes]], message: str, **more: Any
    ) -> Case:
        return tree(f"index/{id}", files, message, **more)

    bare = "is not a bare file name"
    for name, shard, message in (
        ("parent", f"../{FIRST}", bare), ("up-and-down", f"../step-3/{FIRST}", bare), ("absolute", "/etc/passwd", bare),
        ("device", "/dev/zero", bare), ("below", f"x/{FIRST}", bare), ("dot", ".", bare), ("dots", "..", bare),
        ("empty", "", bare), ("slash", "/", bare), ("here", f"./{FIRST}", bare), ("trailing", f"{FIRST}/", bare),
        ("itself", INDEX, "is itself an index"), ("missing", "gone.safetensors", "shard gone.safetensors is missing"),
        ("nul", "a\0b", "missing|bare"), ("control", "a\x1b[1m\nb", r"a\\x1b\[1m\\nb.* (missing|bare)"),
        ("long", "x" * 5000, "missing|bare|too long"), ("surrogate", "a\ud800", "missing|bare"),
        ("number", 7, "must map tensor names to file names"), ("null", None, "must map tensor names to file names"),
        ("list", [FIRST], "must map tensor names to file names"),
    ):  # fmt: skip
        yield case(f"map-to-{name}", sharded({**MAP, "bias": shard}), message)
    yield case("shard-gone", sharded(**{SECOND: None}), f"shard {SECOND} is missing")
    yield case("shard-empty", sharded(**{SECOND: b""}), "file is empty", at=SECOND)
    yield case("shard-cut", sharded(**{SECOND: _shard("bias")[:-1]}), "file is truncated", at=SECOND)
    yield case("shard-cut-header", sharded(**{SECOND: _shard("bias")[:30]}), "file is truncated", at=SECOND)
    yield case(
        "shard-of-another", sharded(**{SECOND: _shard("weight")}), "bias: the index places it in .* does not have it"
    )
    yield case("shard-lfs", sharded(**{SECOND: POINTER}), "is a Git LFS pointer", at=SECOND)
    yield case("shard-page", sharded(**{SECOND: PAGE}), "is a web page", at=SECOND)
    yield case("shard-pickle", sharded(**{SECOND: op.program(op.SHAPES["reduce"])}), "is a pickle", at=SECOND,
               payload=True)  # fmt: skip
    yield case("shard-payload", sharded(**{SECOND: _PAYLOAD}), r"os\.system", at=SECOND, payload=True)
    for name, shard in (("itself", SECOND), ("another", FIRST)):  # an index under a shard's name
        more = {SECOND: sharded({"bias": shard})[INDEX]}
        yield case(f"shard-an-index-of-{name}", sharded(**more), f"shard {SECOND} is itself an index")
    yield case("map-swapped", sharded({"weight": SECOND, "bias": FIRST}), "the index places it in")
    yield case("map-lacks-one", sharded({"weight": FIRST}), "bias: missing, but 2 other", code=4, inspect=0)
    both = container(entries()[0], values(8))
    yield case(
        "map-lacks-one-of-a-shard", sharded({"weight": FIRST}, **{FIRST: both}), "is in .* does not place it there"
    )
    yield case("map-more", sharded({**MAP, "more": FIRST}), "more: the index places it in")
    yield case("map-empty", sharded({}), "has no weight_map")
    yield case("map-a-list", sharded([FIRST]), "has no weight_map")
    yield case("map-huge", lambda: sharded({f"t{i}": FIRST for i in range(50_000)}), "the index places it in")
    for name, content in BAD_JSON.items():
        message = "index is not valid JSON|has no weight_map|empty|not a checkpoint|truncated|web page|LFS|pickle"
        yield case(f"json-{name}", sharded(content), message, payload=name == "pickle")
    names = {FIRST: b"", SECOND: b"", INDEX: b""}

    def linked(target: str) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            write(folder / "step-3", sharded(**dict.fromkeys(names)))
            (folder / "step-3" / INDEX).write_bytes(sharded()[INDEX])
            (folder / "step-3" / FIRST).write_bytes(_shard("weight"))
            os.mkfifo(folder / "step-3" / SECOND) if target == "fifo" else (folder / "step-3" / SECOND).symlink_to(
                target
            )

        return build

    for name, target, message in (("fifo", "fifo", "is a FIFO"), ("zero", "/dev/zero", "is a device"),
                                  ("loop", SECOND, "leads back to itself|is missing"),
                                  ("index", INDEX, f"shard {SECOND} is itself an index"),
                                  ("dangling", "gone", "is missing|does not exist"),
                                  ("folder", "..", "is a directory|no such|cannot")):  # fmt: skip
        yield Case(id=f"index/shard-{name}-link", build=linked(target), at="step-3", message=message, tree=True)


def adapter(config: bytes | Mapping[str, Any] | None = None, weights: bytes | None = None) -> dict[str, bytes]:
    """Return the directory of a LoRA adapter."""
    spec = {"base_model.model.q.lora_A.weight": ("F32", [2, 3]), "base_model.model.q.lora_B.weight": ("F32", [4, 2])}
    header, size = entries(spec)  # type: ignore[arg-type]
    config = config if isinstance(config, bytes) else json.dumps({**CONFIG, **(config or {})}).encode()
    return {
        "adapter_model.safetensors": container(header, values(size // 4)) if weights is None else weights,
        "adapter_config.json": config,
    }


def _peft() -> Iterator[Case]:
    def case(id: str, files: Mapping[str, bytes], message: str, **more: Any) -> Case:
        inner = tree(f"peft/{id}", files, message, alone=True, **more)

        def build(folder: Path) -> None:
            other = adapter()
            other["adapter_model.safetensors"] = other["adapter_model.safetensors"][:-4] + b"\0\0\0\0"
            write(folder / "step-1", other)
            inner.build(folder)

        return Case(**{**vars(inner), "build": build})

    for name, content in BAD_JSON.items():
        yield case(f"config-{name}", adapter(content), "not valid JSON|not a JSON object|peft_type", inspect=0,
                   at="adapter_config.json", payload=name == "pickle")  # fmt: skip
    positive = "must be a positive number"
    for name, change, message, code in (
        ("rank-zero", {"r": 0}, positive, 3), ("rank-negative", {"r": -1}, positive, 3),
        ("rank-text", {"r": "2"}, positive, 3), ("rank-float", {"r": 2.0}, positive, 3),
        ("rank-true", {"r": True}, positive, 3), ("rank-other", {"r": 3}, "r is 3, but|dimension", 4),
        ("alpha-inf", {"lora_alpha": "Infinity"}, positive, 3), ("alpha-null", {"lora_alpha": None}, positive, 3),
        ("pattern-list", {"rank_pattern": ["q"]}, "rank_pattern is not a JSON object", 3),
        ("pattern-expression", {"rank_pattern": {"(": 2}}, "is not a regular expression", 3),
        ("pattern-negative", {"alpha_pattern": {"q": -1}}, positive, 3),
        ("other-base", {"base_model_name_or_path": "y"}, "base_model_name_or_path is", 4),
        ("other-type", {"peft_type": "IA3"}, "peft_type is", 4),
        ("other-targets", {"target_modules": ["k"]}, "target_modules is", 4),
    ):  # fmt: skip
        yield case(f"config-{name}", adapter(change), message, code=code, inspect=0, at="adapter_config.json")
    yield case("weights-cut", adapter(weights=adapter()["adapter_model.safetensors"][:-1]), "file is truncated",
               at="adapter_model.safetensors")  # fmt: skip
    config = adapter()["adapter_config.json"]
    yield case("weights-payload", {"adapter_model.bin": _PAYLOAD, "adapter_config.json": config},
               r"os\.system", at="adapter_model.bin", payload=True)  # fmt: skip


def trainer(state: bytes | None = b'{"global_step": 3}', **files: bytes) -> dict[str, bytes]:
    """Return the files of a Trainer's checkpoint; every pickle beside the weights runs code."""
    run = op.program(op.SHAPES["reduce"])
    beside = dict.fromkeys(("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "scaler.pt"), run)
    found = {"model.safetensors": plain(), "config.json": b"{}", **beside, "trainer_state.json": state, **files}
    return {name: data for name, data in found.items() if data is not None}


def _trainer() -> Iterator[Case]:
    def case(id: str, files: Mapping[str, bytes], message: str, **more: Any) -> Case:
        return tree(f"trainer/{id}", files, message, name="checkpoint-3", payload=True, **more)

    yield case("whole", trainer(), "wrote .*out", code=0, inspect=0)
    yield case("interrupted", trainer(None), "incomplete: it has no trainer_state.json", code=0, inspect=0)
    no_weights = {name: data for name, data in trainer().items() if name != "model.safetensors"}
    yield case("without-weights", no_weights, "has no model weights", code=0, inspect=0)
    yield case("weights-cut", trainer(**{"model.safetensors": plain()[:-1]}), "file is truncated")
    yield case("weights-empty", trainer(**{"model.safetensors": b""}), "file is empty")
    yield case("weights-lfs", trainer(**{"model.safetensors": POINTER}), "is a Git LFS pointer")
    yield case("weights-payload", {**no_weights, "pytorch_model.bin": _PAYLOAD}, r"os\.system")
    for name, content in BAD_JSON.items():
        if name in ("a-list", "a-number", "text"):
            continue
        yield case(f"state-{name}", trainer(content), "is not valid JSON", at="trainer_state.json")
    for name, content in (("a-list", b"[1]"), ("negative-step", b'{"global_step": -5}'),
                          ("step-text", b'{"global_step": "x"}'),
                          ("step-huge", b'{"global_step": ' + b"9" * 4000 + b"}"),
                          ("step-1e999", b'{"global_step": 1e999}')):  # fmt: skip
        yield case(f"state-{name}", trainer(content), "wrote .*out", code=0, inspect=0)
    for name, content in BAD_JSON.items():
        yield case(f"config-{name}", trainer(**{"config.json": content}), "wrote .*out", code=0, inspect=0)


def _folders() -> Iterator[Case]:
    def case(id: str, build: Callable[[Path], object], message: str, **more: Any) -> Case:
        return Case(id=f"folder/{id}", build=lambda folder: build(folder / "step-3"), message=message, tree=True,
                    **{"at": "step-3", "code": 0, "inspect": 0, **more})  # fmt: skip

    def made(files: Mapping[str, bytes], then: Callable[[Path], object] = lambda _: None) -> Callable[[Path], object]:
        return lambda path: (write(path, files), then(path))

    empty = "a directory without weights|wrote"
    yield case("empty", made({}), empty)
    yield case("to-itself", lambda path: path.symlink_to("."), "wrote|directory")
    yield case("to-its-parent", made({}, lambda path: (path / "up").symlink_to("..")), "wrote|directory")
    yield case("loop", lambda path: path.symlink_to(path.name), "wrote|loop|not a checkpoint|back to itself")
    yield case("to-root", lambda path: path.symlink_to("/"), "wrote|directory")
    yield case("to-devices", lambda path: path.symlink_to("/dev"), "wrote|directory")
    yield case("to-processes", lambda path: path.symlink_to("/proc/self"), "wrote|directory")
    yield case("weights-a-folder", made({"model.safetensors/x": b""}), "is a directory, not a regular file", code=3,
               inspect=3)  # fmt: skip
    yield case("weights-a-fifo", made({}, lambda path: os.mkfifo(path / "model.safetensors")), "is a FIFO", code=3,
               inspect=3)  # fmt: skip
    yield case("weights-a-loop", made({}, lambda path: (path / "model.safetensors").symlink_to("model.safetensors")),
               "leads back to itself", code=3, inspect=3)  # fmt: skip
    yield case("weights-a-device", made({}, lambda path: (path / "model.safetensors").symlink_to("/dev/zero")),
               "is a device", code=3, inspect=3)  # fmt: skip
    yield case("two-weights", made({"a.pt": b"", "b.pt": b""}), "a directory with 2 weight files|wrote")
    yield case("temporary", lambda path: write(path.with_name("tmp-checkpoint-3"), trainer()), "temporary: still being")
    yield case("incomplete", lambda path: write(path.with_name("step-3.incomplete"), trainer()), "temporary: still")
    yield case("deep", lambda path: path.joinpath(*["d"] * 400).mkdir(parents=True), empty)
    yield case("10000-files", made({f"{i}.log": b"" for i in range(10_000)}), empty)
    yield case("unreadable", made({"model.safetensors": plain()}, lambda path: path.chmod(0)), "permission denied",
               nobody=True, code=3, inspect=3)  # fmt: skip
    yield case("unlistable", made({"model.safetensors": plain()}, lambda path: path.chmod(0o311)), "permission denied",
               nobody=True, code=3, inspect=3)  # fmt: skip
    yield case("unenterable", made({"model.safetensors": plain()}, lambda path: path.chmod(0o744)), "permission denied",
               nobody=True, code=3, inspect=3)  # fmt: skip
    yield case("unenterable-trainer", made(trainer(), lambda path: path.chmod(0o744)), "permission denied",
               nobody=True, code=3, inspect=3)  # fmt: skip

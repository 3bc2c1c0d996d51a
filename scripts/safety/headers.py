"""Any bytes into the parsers that are the project's own, steered by coverage: ``headers.py -max_total_time=600``.

Under atheris (``pip install atheris``, which has wheels for some versions of Python), whose options are libFuzzer's;
a directory as an argument keeps what it learns. Where it is not installed, or with ``--random SECONDS``, the same
function gets valid headers damaged at random, and counts are printed. What is raised but an InputError is a finding.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None and "--random" not in sys.argv

if HAS_ATHERIS:
    import atheris
with atheris.instrument_imports(include=["ckptavg.readers", "ckptavg.manifest"]) if HAS_ATHERIS else nullcontext():
    from ckptavg.errors import InputError
    from ckptavg.manifest import Manifest
    from ckptavg.readers import open_reader
    from ckptavg.readers.json_file import read_json
    from ckptavg.readers.safetensors import READER as SAFETENSORS  # noqa: F401  # loaded while it can be instrumented

from hostile import mutants, sharded_cases, torch_cases  # noqa: E402
from hostile.case import plain, write  # noqa: E402

Parser = Callable[[bytes, Path], object]


def _file(name: str, make: Callable[[bytes], bytes] = bytes) -> Parser:
    def parse(data: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(make(data))
        reader = open_reader(path)
        try:
            return mutants.values(reader)
        finally:
            reader.close()

    return parse


def _metadata(data: bytes, folder: Path) -> object:
    home = folder / "dcp"
    if not home.exists():
        write(home, sharded_cases.saved())
    (home / ".metadata").write_bytes(data)
    reader = open_reader(home)
    reader.close()
    return reader.tree


def _json(data: bytes, folder: Path) -> object:
    (folder / "side.json").write_bytes(data)
    return read_json(folder / "side.json")


class _Listed:
    """As much of a checkpoint as a list of sums is asked about."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "step-1.safetensors"
        self.way_out = ""
        self.path.write_bytes(plain(1))
        self.reader = open_reader(self.path)


def _sums(data: bytes, folder: Path) -> object:
    (folder / "SHA256SUMS").write_bytes(data)
    listed: Any = _Listed(folder)
    try:
        Manifest().check(listed)
    finally:
        listed.reader.close()
        (folder / "SHA256SUMS").unlink()
    return None


PARSERS: dict[str, tuple[Parser, Callable[[random.Random], bytes]]] = {
    "safetensors": (_file("x.safetensors"), lambda rng: plain()),
    "safetensors header": (
        _file("x.safetensors", lambda data: len(data).to_bytes(8, "little") + data + bytes(32)),
        lambda rng: plain()[8 : 8 + int.from_bytes(plain()[:8], "little")],
    ),
    "zip": (_file("x.pt"), lambda rng: torch_cases.state()),
    "pickle": (_file("x.pt", torch_cases.archive), mutants.program),
    "index": (_file("model.safetensors.index.json"), lambda rng: b'{"weight_map": {"w": "x.safetensors"}}'),
    "metadata": (_metadata, lambda rng: sharded_cases.saved()[".metadata"]),
    "json": (_json, lambda rng: b'{"a": [1, 2.5e3, "\\u00e9", null, true], "b": {"c": {}}}'),
    "sums": (_sums, lambda rng: b"0" * 64 + b"  step-1.safetensors\nSHA256 (x) = " + b"a" * 64 + b"\n\\\\y"),
}  # fmt: skip
KINDS = tuple(PARSERS)


def one(data: bytes, folder: Path) -> str:
    """What came of one input: its first byte says which parser gets the rest."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    try:
        PARSERS[kind][0](data[1:], folder)
    except InputError:
        return f"{kind} refused"
    return f"{kind} read"


def at_random(seconds: float, seed: int, folder: Path) -> int:
    """Valid headers, damaged up to four times, for so long; prints counts, and the inputs that raised anything else."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    findings = 0
    while time.monotonic() < end:
        number = rng.randrange(len(KINDS))
        data = PARSERS[KINDS[number]][1](rng)
        for _ in range(rng.randrange(5)):
            data = rng.choice(mutants.DAMAGES)(data, rng) if data else data
        try:
            found[one(bytes([number]) + data, folder)] += 1
        except Exception as error:  # whatever it is, it is a finding
            findings += 1
            print(f"{KINDS[number]}: {type(error).__name__}: {error}: {data[:2000].hex()}", file=sys.stderr)
    print(json.dumps({"tried": sum(found.values()) + findings, "findings": findings, "seed": seed,
                      "outcomes": dict(sorted(found.items()))}, indent=2))  # fmt: skip
    return 1 if findings else 0


def main() -> int:
    sys.setrecursionlimit(1000)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        if not HAS_ATHERIS:
            seconds = float(sys.argv[sys.argv.index("--random") + 1]) if "--random" in sys.argv else 60.0
            if "--random" not in sys.argv:
                print("atheris is not installed: damaging at random for a minute", file=sys.stderr)
            return at_random(seconds, random.SystemRandom().randrange(2**40), folder)
        atheris.Setup(sys.argv, lambda data: one(data, folder))
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

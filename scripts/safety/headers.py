"""Coverage-guided fuzzing of the project's own parsers: ``headers.py --seconds 600 [CORPUS]``.

Uses atheris (``pip install atheris``, which has wheels for some versions of Python); further options go to libFuzzer,
which saves its corpus in the directory CORPUS. Without atheris, or with ``--random``, the same function gets valid
headers with random damage. Any exception other than InputError is a finding; counts are printed as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
CHILD = "--child" in sys.argv

if CHILD:
    import atheris
with (
    atheris.instrument_imports(include=["ckptavg.readers", "ckptavg.checkpoints.checksums"]) if CHILD else nullcontext()
):
    from ckptavg.checkpoints.checksums import Manifest
    from ckptavg.errors import InputError
    from ckptavg.filesystem.strict_json import read_json
    from ckptavg.readers import open_reader
    from ckptavg.readers.safetensors import READER as SAFETENSORS  # noqa: F401  # imported while it can be instrumented

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
    """The attributes of a checkpoint that the parser of a list of sums uses."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "step-1.safetensors"
        self.hint = ""
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


def outcome_of(data: bytes, folder: Path) -> str:
    """Parse one input and return its outcome; the first byte selects the parser of the rest."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    try:
        PARSERS[kind][0](data[1:], folder)
    except InputError:
        return f"{kind} refused"
    return f"{kind} read"


def at_random(seconds: float, seed: int, folder: Path) -> int:
    """Parse valid headers, damaged up to four times, for that long; print counts and inputs with other exceptions."""
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
            found[outcome_of(bytes([number]) + data, folder)] += 1
        except Exception as error:  # any other exception is a finding
            findings += 1
            print(f"{KINDS[number]}: {type(error).__name__}: {error}: {data[:2000].hex()}", file=sys.stderr)
    tried = sum(found.values()) + findings
    print(
        json.dumps(
            {"tried": tried, "findings": findings, "by": f"seed {seed}", "outcomes": dict(sorted(found.items()))}
        )
    )
    return 1 if findings else 0


def plant(directory: Path) -> None:
    """Write valid inputs of each parser as the initial corpus."""
    for number, (kind, (_, make)) in enumerate(PARSERS.items()):
        for seed in range(8):
            (directory / f"{kind.replace(' ', '-')}-{seed}").write_bytes(bytes([number]) + make(random.Random(seed)))


def steered(seconds: float, options: list[str], folder: Path) -> int:
    """Run libFuzzer on these parsers, in a process that it may terminate; print how many inputs it tried."""
    known = [one for one in options if Path(one).is_dir()] or [str(folder)]
    plant(Path(known[0]))
    command = [sys.executable, __file__, "--child", f"-max_total_time={seconds:.0f}", "-print_final_stats=1"]
    command += [f"-artifact_prefix={known[0]}/", *dict.fromkeys([*options, *known])]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert child.stderr
    tried = 0
    for line in child.stderr:
        sys.stderr.write(line)
        if found := re.match(r"stat::number_of_executed_units:\s*(\d+)|#(\d+)\t", line):
            tried = max(tried, int(found[1] or found[2]))
    print(json.dumps({"tried": tried, "findings": int(child.wait() != 0), "by": f"atheris {version('atheris')}"}))
    return child.returncode


def main() -> int:
    sys.setrecursionlimit(1000)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--random", action="store_true", help="do not use atheris, even if it is installed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        if options.child:
            atheris.Setup([sys.argv[0], *rest], lambda data: outcome_of(data, folder))
            atheris.Fuzz()  # terminates the process
        if HAS_ATHERIS and not options.random:
            return steered(options.seconds, rest, folder)
        return at_random(options.seconds, random.SystemRandom().randrange(2**40), folder)


if __name__ == "__main__":
    sys.exit(main())

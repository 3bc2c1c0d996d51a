"""Run the parts of the safety scoreboard, and write docs/safety.md from their results.

    scoreboard.py run                 every part, at overnight length
    scoreboard.py run --quick kills   selected parts, in minutes
    scoreboard.py write               the page from the results in docs/safety.json

A part that was never run is shown as not run; one that was run with less than the goal requires shows its actual size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES, PAGE = ROOT / "docs" / "safety.json", ROOT / "docs" / "safety.md"
CRASH = "scripts/crash/run.py"
PROPERTIES = (
    "tests/readers tests/hostile tests/output/test_safetensors_file.py tests/journal/test_resume.py "
    "tests/cli/test_arguments.py -k 'not corpus'"
)
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A command, and its shorter version; the figures are JSON on stdout, or a section of pytest's summary."""

    full: str
    quick: str
    section: str = ""


PARTS: Mapping[str, Part] = {
    "corpus": Part("-m pytest -q tests/hostile", "-m pytest -q tests/hostile", "hostile inputs"),
    "fuzz": Part("scripts/safety/fuzz.py --seconds 7200", "scripts/safety/fuzz.py --seconds 120"),
    "pickles": Part(
        "scripts/safety/fuzz.py --only pickle --count 500000 --seconds 14400",
        "scripts/safety/fuzz.py --only pickle --count 10000",
    ),
    "headers": Part("scripts/safety/headers.py --seconds 3600", "scripts/safety/headers.py --seconds 60"),
    "properties": Part(
        f"EXAMPLES=35 -m pytest -q --numprocesses logical {PROPERTIES}", f"-m pytest -q {PROPERTIES}", "property tests"
    ),
    "points": Part(f"{CRASH} points", "-m pytest -q tests/faults/test_points.py", "faults"),
    "kills": Part(f"{CRASH} kills --count 300 --stops 50", f"{CRASH} kills --count 60 --stops 12"),
    "disk": Part(f"{CRASH} disk", f"{CRASH} disk"),
    "power": Part("-m pytest -q tests/faults/test_power.py", "-m pytest -q tests/faults/test_power.py", "faults"),
    "races": Part(f"{CRASH} races --count 50", f"{CRASH} races --count 10"),
    "inputs": Part(f"{CRASH} inputs", "-m pytest -q tests/faults/test_inputs.py", "faults"),
    "bytes": Part(f"{CRASH} bytes", "-m pytest -q tests/faults/test_determinism.py", "faults"),
    "awkward": Part(
        "-m pytest -q tests/average/test_awkward.py", "-m pytest -q tests/average/test_awkward.py", "passed"
    ),
    "cost": Part("scripts/safety/cost.py --megabytes 1024", "scripts/safety/cost.py --megabytes 64 --rounds 3"),
    "cost, cold": Part(
        "scripts/safety/cost.py --megabytes 1024 --cold", "scripts/safety/cost.py --megabytes 64 --rounds 3 --cold"
    ),
    "coverage": Part("scripts/safety/coverage.sh", "scripts/safety/coverage.sh"),
    "mutants": Part("scripts/safety/mutants.py", "scripts/safety/mutants.py --sample 100"),
}


@dataclass(frozen=True)
class Row:
    """A line of the scoreboard: the part it belongs to, and the format of its figures."""

    number: int
    measure: str
    goal: str
    part: str
    reached: Callable[[Figures], str]


def _count(*names: str) -> Callable[[Figures], str]:
    return lambda found: ", ".join(f"{found.get(name, 0):,} {name}" for name in names)


ROWS = (
    Row(
        1,
        "Hostile files and directories: a one-line error that names the file, the right exit code, nothing written",
        "≥ 300 files and ≥ 80 directories, all",
        "corpus",
        _count("files", "directories", "other faults"),
    ),
    Row(2, "… bad input accepted", "0", "corpus", _count("other faults")),
    Row(3, "… crash, hang, > 5 s, > 1 GiB, traceback", "0", "corpus", _count("crashes", "hangs", "tracebacks")),
    Row(4, "Code in a file is executed", "0 of ≥ 40 payloads", "corpus", _count("code runs", "payloads")),
    Row(
        5,
        "Damaged files of every format: crash, hang, unclassified error",
        "0 of ≥ 50,000",
        "fuzz",
        _count("tried", "crash", "hang", "error"),
    ),
    Row(6, "… altered tensors of torch's zip files or DCP accepted", "0", "fuzz", _count("altered")),
    Row(
        7,
        "… altered safetensors accepted",
        "0 in the header; data have no checksum: undetectable",
        "fuzz",
        lambda found: _outcomes(found, "safetensors"),
    ),
    Row(8, "Random pickle programs: crashes", "0 of 1,000,000", "pickles", _count("tried", "crash", "hang", "error")),
    Row(
        9,
        "Property tests: round trips, readers against other readers, grammar, arguments",
        "200,000 examples, 0 failures",
        "properties",
        _count("examples", "failed"),
    ),
    Row(
        9,
        "… coverage-guided fuzzing of the parsers with arbitrary bytes",
        "an hour, 0 findings",
        "headers",
        lambda found: f"{found['tried']:,} inputs by {found['by']}, {found['findings']} findings",
    ),
    Row(
        10,
        "Every system call of a run × SIGKILL, torn, SIGTERM, ENOSPC, EIO, EDQUOT × new, --force",
        "≥ 150 points, 0 violations",
        "points",
        _count("fault points", "violations"),
    ),
    Row(
        11,
        "Random SIGKILL of whole runs, then resumed",
        "≥ 200 kills: nothing acknowledged lost, ≤ 60 s of work, the same bytes",
        "kills",
        _count(
            "kills",
            "stops",
            "resumes",
            "acknowledged records",
            "acknowledged records lost",
            "lost or partial outputs",
            "evaluations repeated",
            "temporary files left",
        ),
    ),
    Row(
        12,
        "Power cuts, simulated by a disk model that drops unflushed writes",
        "≥ 20 moments, nothing wrong accepted",
        "power",
        lambda found: f"{found.get('power cuts', 0)} moments × 25 states of the disk, 0 wrong",
    ),
    Row(13, "Concurrent runs, one output: winners", "exactly 1 of 6, 50 times", "races", lambda found: _races(found)),
    Row(
        14,
        "Inputs modified during the run: 12 modifications × 4 formats",
        "48 of 48 noticed, 0 SIGBUS",
        "inputs",
        lambda found: (
            f"{found.get('noticed', found.get('inputs changed', 0) - found.get('unnoticed', 0))} of "
            f"{found.get('inputs changed', 0)} noticed, {found.get('bus errors', 0)} SIGBUS"
        ),
    ),
    Row(
        15,
        "Identical bytes: repeated, 1/2/4 threads, 1/2/4 processes, shuffled listing, 0/2 DataLoader workers, hash "
        "seeds, killed and resumed",
        "1 output of ≥ 14 runs",
        "bytes",
        lambda found: _distinct(found),
    ),
    Row(16, "Valid but unusual inputs are averaged correctly", "≥ 40 of 40", "awkward", _count("passed")),
    Row(
        17,
        "Overhead of the safety measures on an average of 10 files: CPU time and wall-clock time",
        "≤ 60 % of wall-clock time",
        "cost",
        lambda found: f"{found['processor_cost_percent']} % and {found['wall_cost_percent']} %, from the page cache",
    ),
    Row(
        17,
        "… read from the disk",
        "≤ 10 % of wall-clock time",
        "cost, cold",
        lambda found: f"{found['processor_cost_percent']} % and {found['wall_cost_percent']} %",
    ),
    Row(
        17,
        "… memory of an average, and time to open 100,000 tensors",
        "≤ 2 tensors + 64 MB beyond one model; < 5 s",
        "cost, cold",
        lambda found: (
            f"{found['memory_mb']} MB, of models of {found['model_mb']:,} MB; safetensors "
            f"{found['open_100000_tensors.safetensors']} s, torch {found['open_100000_tensors.pt']} s"
        ),
    ),
    Row(
        18,
        "Branch coverage of the readers, the writer and the journal",
        "100 %",
        "coverage",
        lambda found: f"{found['percent_covered']:.1f} %",
    ),
    Row(
        18,
        "… changes to their code that a test detects (mutation score)",
        "≥ 90 %",
        "mutants",
        lambda found: _noticed(found),
    ),
)


def _outcomes(found: Figures, kind: str) -> str:
    own = {name: count for name, count in found.get("outcomes", {}).items() if name.startswith(f"{kind} ")}
    return ", ".join(f"{count:,} {name.removeprefix(f'{kind} ')}" for name, count in own.items()) or "none"


def _distinct(found: Figures) -> str:
    runs = f"{found['distinct outputs']} of {found.get('runs', found.get('runs that should agree'))} runs"
    more = ("averages in 1, 2 and 4 threads", "selections by 1, 2 and 4 workers")
    one = [found.get(f"distinct {name.split()[0]}") for name in more]
    return "; ".join([runs, *(f"{count} of 3 {name}" for count, name in zip(one, more, strict=True) if count)])


def _noticed(found: Figures) -> str:
    drawn = "" if found["tried"] == found["of"] else f" drawn at random from {found['of']:,}"
    return f"{100 * found['noticed'] / found['tried']:.1f} % of {found['tried']:,}{drawn}"


def _races(found: Figures) -> str:
    races = found.get("races of six", found.get("races", 0))
    good = found.get("with one winner", races - found.get("races without one winner", 0))
    return f"1 in {good} of {races}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    known: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    failed = False
    for name in (options.parts or PARTS) if options.what == "run" else ():
        command = PARTS[name].quick if options.quick else PARTS[name].full
        print(f"== {name}: {command}", file=sys.stderr)
        found, code = measured(command, PARTS[name].section)
        failed |= bool(code)
        known[name] = found
        FIGURES.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
    PAGE.write_text(page(known))
    return int(failed)


def measured(command: str, section: str) -> tuple[dict[str, Any], int]:
    """Run a command; return its figures, with the environment they were measured in."""
    words = shlex.split(command)
    given = dict(word.split("=", 1) for word in takewhile(lambda word: re.match(r"[A-Z]+=", word), words))
    words = words[len(given) :]
    began = time.monotonic()
    started = ["bash" if words[0].endswith(".sh") else sys.executable, *words]
    done = subprocess.run(started, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, **given})
    seconds = round(time.monotonic() - began)
    figures = summary(done.stdout, section) if section and "pytest" in command else json.loads(done.stdout)
    return {"figures": figures, "command": command, "exit": done.returncode, "seconds": seconds, "on": versions()}, (
        done.returncode
    )


def summary(text: str, section: str) -> dict[str, int]:
    """Return the counts under a heading of pytest's summary, and how many tests passed."""
    ended = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed)", text)}
    found = re.search(rf"^=+ {section} =+\n(.*)$", text, re.MULTILINE)
    pairs = re.findall(r"([a-zA-Z0-9 ,-]+?) (\d+)(?:, |$)", found[1] if found else "")
    return {name: int(count) for name, count in pairs} | {"passed": 0, "failed": 0, **ended}


def versions() -> str:
    """Return the versions that the figures depend on."""

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return ", ".join([system, of("torch"), of("safetensors"), f"commit {commit.strip() or 'unknown'}"])


def page(known: Mapping[str, Any]) -> str:
    """Return the text of docs/safety.md."""
    lines = ["| # | measure | goal | reached |", "|---|---|---|---|"]
    for row in ROWS:
        found = known.get(row.part)
        reached = "not run" if found is None else row.reached(found["figures"])
        if found is not None and found.get("exit"):
            reached += f" (FAILED, exit {found['exit']})"
        lines.append(f"| {row.number} | {row.measure} | {row.goal} | {reached} |")
    runs = [f"- {name}: `python {known[name]['command']}`; {known[name]['on']}" for name in PARTS if name in known]
    missing = [name for name in PARTS if name not in known]
    not_run = f"\nNot run: {', '.join(missing)}.\n" if missing else ""
    return TEXT.replace("TABLE", "\n".join(lines)).replace("RUNS", "\n".join(runs)).replace("MISSING", not_run)


TEXT = (Path(__file__).parent / "safety.md.in").read_text(encoding="utf-8")

if __name__ == "__main__":
    sys.exit(main())

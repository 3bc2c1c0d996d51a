"""Measure the tables of docs/benchmarks.md and fill them into page.md.in: page.py [TABLE ...] [--quick]

A script's lines that begin with "target |" become rows of the table of targets; those above `most` are bold. A table
whose script fails, or was not asked for, says so in its place. The file is written again after each table.
"""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Table(NamedTuple):
    """A command, relative to this directory, and what --quick adds to it; FOLDER stands for that of checkpoints."""

    command: str
    quick: str


LITTLE = "--megabytes 16 --candidates 3 --rounds 1"
FEW = "--rounds 1 --make '--layers 1 --vocabulary 99 --count 3'"
TABLES: Mapping[str, Table] = {
    "reference": Table("average.py FOLDER reference", FEW),
    "large": Table("average.py FOLDER large", FEW),
    "many-files": Table("average.py FOLDER many", FEW),
    "cold": Table("average.py FOLDER cold", FEW),
    "adapters": Table("average.py FOLDER adapters", FEW),
    "sharded": Table("average.py FOLDER sharded", FEW),
    "small-tensors": Table("average.py FOLDER small-tensors", "--rounds 1 --make '--tensors 1000 --count 3'"),
    "reads": Table("reads.py FOLDER --megabytes 64", "--megabytes 8 --depths 1 2 --blocks 1"),
    "digests": Table("digests.py --rounds 5", ""),
    "safety": Table("../safety/cost.py --table --folder FOLDER", LITTLE),
    "safety-cold": Table("../safety/cost.py --table --cold --folder FOLDER", LITTLE),
    "start": Table("start.py --rounds 5", "--rounds 1"),
    "step": Table("step.py --rounds 2", "--rounds 1 --candidates 6"),
    "evaluation": Table("evaluation.py", "--rounds 1 --candidates 4"),
    "lowbit": Table("lowbit.py", "--rounds 1 --candidates 3 --parameters 1000"),
    "busy": Table(
        'busy.py --networks "demo\'s network"',
        '--loops 1 --arguments=--dry-run --steps 1 --networks "demo\'s network" --policies',
    ),
    "scaling": Table("scaling.py", "--quick"),
    "intervals": Table("intervals.py --summary --draws 1000 --units 50 400 --batches 10 50", "--quick"),
    "many": Table("many.py --rounds 1", "--candidates 10 --elements 100000 --steps 2"),
    "solver": Table("solver.py", "--candidates 6 --noise 1 --every 2 --domains digits-cnn"),
}


def measured(table: Table, folder: Path, quick: bool) -> tuple[str, list[str], bool]:
    """Return the text of a table with its command, its targets, and whether its script ended well."""
    words = shlex.split(f"{table.command} {table.quick if quick else ''}")
    script = os.path.relpath(HERE / words[0], ROOT)
    words = [str(folder) if word == "FOLDER" else word for word in words[1:]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    load, start = os.getloadavg()[0], time.monotonic()
    command = [sys.executable, script, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.rstrip().splitlines()
    if done.returncode:
        lines.append(f"failed with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
        print(done.stderr, file=sys.stderr)
    shown = shlex.join(word.removeprefix(f"{ROOT}/") for word in words)
    text = f"    python {script} {shown}".rstrip()
    rows = [line.rstrip() for line in lines if not line.startswith("target |")]
    rows.append(f"{time.monotonic() - start:.0f} s; load at the start {load:.1f}")
    body = "\n".join(rows)
    targets = [f"{line.removeprefix('target ')} |" for line in lines if line.startswith("target |")]
    return f"{text}\n\n```\n{body}\n```", targets, done.returncode == 0


def machine(folder: Path, quick: bool) -> str:
    """Return the machine, the versions and the commit that the figures depend on."""

    def field(path: str, name: str) -> str:
        return next((line.split(":")[1].strip() for line in Path(path).read_text().splitlines() if name in line), "?")

    def of(package: str) -> str:
        return f"{package} {version(package)}"

    def told(command: list[str]) -> str:
        return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip()

    memory = int(field("/proc/meminfo", "MemTotal").split()[0]) / 1e6
    disk, system = told(["df", "--output=source,fstype", str(folder)]).split()[-2:]
    commit = told(["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"])
    peers = folder.glob("peers/lib/*/site-packages/mergekit-*.dist-info")
    facts = [
        f"{field('/proc/cpuinfo', 'model name')}, {platform.machine()}, {os.cpu_count()} cores",
        f"{memory:.0f} GB of memory", f"disk {disk} ({system})", f"Linux {platform.release()}",
        f"Python {platform.python_version()}", *map(of, ("torch", "numpy", "safetensors")),
        *(peer.stem.replace("-", " ") for peer in peers), f"commit {commit}",
        f"load at the start {os.getloadavg()[0]:.1f}",
    ]  # fmt: skip
    return "; ".join(facts) + (". **`--quick`: sizes at which the figures mean nothing**" if quick else "")


def filled(known: Mapping[str, str], place: re.Match[str]) -> str:
    return known[place[1]]


def main() -> int:
    """Write the page; return 1 if a script failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that everything runs")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmark", help="for checkpoints: 27 GB")
    parser.add_argument("-o", "--output", type=Path, help="FOLDER/run.md by default")
    parser.add_argument("--spent", type=float, default=0, help="seconds of the run before this script started")
    options = parser.parse_args()
    if unknown := {*options.tables} - {*TABLES}:
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    start, facts, failed = time.monotonic() - options.spent, machine(options.folder, options.quick), False
    texts = dict.fromkeys(TABLES, "Not run.")
    reached: list[str] = ["| | to reach | reached |", "|---|---|---|"]
    for name in options.tables or TABLES:
        print(f"== {name}", file=sys.stderr)
        if not (HERE / TABLES[name].command.split()[0]).exists():
            continue
        texts[name], targets, well = measured(TABLES[name], options.folder.absolute(), options.quick)
        print(texts[name], *targets, sep="\n", file=sys.stderr)
        reached += targets
        failed |= not well
        minutes = f"{(time.monotonic() - start) / 60:.1f} minutes"
        known = {**texts, "targets": "\n".join(reached), "machine": facts, "minutes": minutes}
        text = (HERE / "page.md.in").read_text(encoding="utf-8")
        page = re.sub(r"\{\{([\w-]+)\}\}", partial(filled, known), text)
        (options.output or options.folder / "run.md").write_text(page, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

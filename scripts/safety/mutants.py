"""Changes readers, writer and journal in one place at a time, and counts the changes that a test notices.

    mutants.py --sample 1000            of all changes, drawn at random
    mutants.py --only 'ckptavg.filesystem.lock*'   all changes of some modules
    mutants.py --survivors              those that nobody noticed, of the last run

By mutmut (``pip install mutmut``), in the folder ``mutants``, by the settings in pyproject.toml. Prints JSON. A change
that lets tests run for too long is noticed too; one in code that these tests do not run is not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mutants"
SKIPPED = 34  # mutmut's own code


def mutmut(*arguments: str) -> None:
    own = {"PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1", "EXAMPLES": "0.1"}
    environment = {**os.environ, **own, "FIXTURES": str(ROOT / "build" / "fixtures")}
    FOLDER.mkdir(exist_ok=True)  # before it starts: Python forgets for good what it did not find when it looked first
    command = [sys.executable, "-m", "mutmut", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)


def found() -> dict[str, int | None]:
    """Name of a change → what the tests ended with."""
    known: dict[str, int | None] = {}
    for path in sorted(FOLDER.rglob("*.meta")):
        known |= json.loads(path.read_text())["exit_code_by_key"]
    return known


def choose(names: set[str]) -> None:
    """Let mutmut think that it has skipped all others, and these are still to be tried."""
    for path in FOLDER.rglob("*.meta"):
        known = json.loads(path.read_text())
        codes = known["exit_code_by_key"]
        known["exit_code_by_key"] = {name: None if name in names else SKIPPED for name in codes}
        path.write_text(json.dumps(known))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=0, help="number of mutants; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="patterns of names")
    parser.add_argument("--survivors", action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    from mutmut.stats import status_by_exit_code as status

    if options.survivors:
        for name in [name for name, code in found().items() if status[code] in ("survived", "no tests")]:
            subprocess.run([sys.executable, "-m", "mutmut", "show", name], check=True)
        return 0
    mutmut("run", *(options.only or ["ckptavg.filesystem.lock.x_release*"]))
    names = [*found()] if not options.only else []
    if options.sample:
        names = random.Random(options.seed).sample(names, min(options.sample, len(names)))
    if names:
        (FOLDER / "mutmut-stats.json").unlink()  # or it would ask pytest for tests by names that pytest does not take
        choose({*names})
        mutmut("run")
    every = found()
    counts = Counter(status[every[name]] for name in (names or [n for n, code in every.items() if code is not None]))
    noticed = counts["killed"] + counts["timeout"] + counts["segfault"]
    tried = counts.total() - counts["not checked"] - counts["skipped"]
    print(json.dumps({"noticed": noticed, "tried": tried, "of": len(every), "outcomes": dict(counts)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

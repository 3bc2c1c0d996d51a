"""Mutate readers, writer and journal one place at a time, and count the mutants that a test detects.

    mutants.py --sample 1000            of all mutants, drawn at random
    mutants.py --only 'ckptavg.filesystem.lock*'   all mutants of some modules
    mutants.py --survivors              list the undetected mutants of the last run

Uses mutmut (``pip install mutmut``), in the folder ``mutants``, with the settings in pyproject.toml. Prints JSON. A
mutant that makes tests time out counts as detected; one in code that these tests do not run counts as undetected.
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
SKIPPED = 34  # mutmut's own exit code


def mutmut(*arguments: str) -> None:
    own = {"PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1", "EXAMPLES": "0.1"}
    environment = {**os.environ, **own, "FIXTURES": str(ROOT / "build" / "fixtures")}
    FOLDER.mkdir(exist_ok=True)  # beforehand: Python caches the absence of a directory that an import looked up
    command = [sys.executable, "-m", "mutmut", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)


def exit_codes() -> dict[str, int | None]:
    """Return name of a mutant → exit code of its tests."""
    known: dict[str, int | None] = {}
    for path in sorted(FOLDER.rglob("*.meta")):
        known |= json.loads(path.read_text())["exit_code_by_key"]
    return known


def choose(names: set[str]) -> None:
    """Mark all other mutants as skipped and these as pending."""
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
        for name in [name for name, code in exit_codes().items() if status[code] in ("survived", "no tests")]:
            subprocess.run([sys.executable, "-m", "mutmut", "show", name], check=True)
        return 0
    mutmut("run", *(options.only or ["ckptavg.filesystem.lock.x_release*"]))
    names = [*exit_codes()] if not options.only else []
    if options.sample:
        names = random.Random(options.seed).sample(names, min(options.sample, len(names)))
    if names:
        (FOLDER / "mutmut-stats.json").unlink()  # otherwise it passes test names to pytest that pytest does not accept
        choose({*names})
        mutmut("run")
    every = exit_codes()
    counts = Counter(status[every[name]] for name in (names or [n for n, code in every.items() if code is not None]))
    noticed = counts["killed"] + counts["timeout"] + counts["segfault"]
    tried = counts.total() - counts["not checked"] - counts["skipped"]
    print(json.dumps({"noticed": noticed, "tried": tried, "of": len(every), "outcomes": dict(counts)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Read damaged checkpoints and random pickles for a given time: ``fuzz.py --seconds 600`` prints counts.

Inputs are read in worker processes, so that a crash is counted and its seed printed; ``--seed N --count 1`` repeats one
seed. Exits with 1 on any crash, hang, exception other than InputError, or altered tensor accepted by a format that has
checksums.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 3 << 30
HANG = 20  # seconds for one mutant
BAD = ("altered", "error", "crash", "hang")


def outcome_of(seed: int, folder: Path, only: str = "") -> str:
    """Read the mutant or pickle of a seed; return ``kind outcome``."""
    from hostile import mutants, torch_cases

    rng = random.Random(seed)
    kind = only or rng.choice((*mutants.seeds(), "pickle", "pickle"))
    if kind == "pickle":
        data = torch_cases.archive(mutants.program(rng))
        found = mutants.read("torch", {"step-3.pt": data}, folder)
        return f"pickle {'refused' if isinstance(found, Exception) else 'read'}"
    outcome = mutants.verdict(kind, mutants.damaged(kind, rng), folder)
    return f"{kind} {'undetectable' if outcome == 'altered' and kind not in mutants.CHECKED else outcome}"


def work(seed: int, step: int, seconds: float, count: int, only: str) -> None:
    """Run as a worker over every ``step``-th seed; print each seed first, so that a crash can be attributed."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(1000)
    end = time.monotonic() + seconds
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        while count and time.monotonic() < end:
            sys.stdout.write(f"> {seed}\n")
            sys.stdout.flush()
            signal.alarm(HANG)
            try:
                outcome = outcome_of(seed, Path(folder) / "step-3", only)
            except Exception as error:  # any other exception is a finding
                outcome = f"any error {type(error).__name__}"
                traceback.print_exc()
            signal.alarm(0)
            sys.stdout.write(f"{outcome}\n")
            seed, count = seed + step, count - 1
        sys.stdout.flush()


def run(seed: int, step: int, seconds: float, count: int, only: str) -> tuple[Counter[str], list[str]]:
    """Run workers one after the other until the time is up; return outcomes and findings."""
    found: Counter[str] = Counter()
    findings: list[str] = []
    end = time.monotonic() + seconds
    paths = (ROOT, ROOT / "tests")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    while count > 0 and (left := end - time.monotonic()) > 0:
        command = [sys.executable, "-W", "ignore", __file__, "--work", str(step), "--seed", str(seed)]
        command += ["--seconds", str(left), "--count", str(count), "--only", only]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert worker.stdout
        current, open_ = seed, False
        for line in worker.stdout:
            if line.startswith("> "):
                current, open_ = int(line[2:]), True
                continue
            open_ = False
            count -= 1
            found[line.strip()] += 1
            if any(word in line for word in BAD):
                findings.append(f"seed {current}: {line.strip()}")
        if code := worker.wait():
            what = "hang" if code == -signal.SIGALRM else "crash"
            found[f"any {what}"] += 1
            findings.append(f"seed {current}: {what} ({code})")
            count -= open_
        elif not open_:
            break
        seed = current + step
    return found, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=2**62, help="number of seeds of each worker")
    parser.add_argument("--seed", type=int, default=None, help="first seed; by default a new one every time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="one kind, such as pickle")
    parser.add_argument("--work", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.seed, options.work, options.seconds, options.count, options.only)
        return 0
    seed = random.SystemRandom().randrange(2**40) if options.seed is None else options.seed
    workers = 1 if options.count == 1 else options.workers
    with ThreadPoolExecutor(workers) as pool:
        parts = list(
            pool.map(lambda i: run(seed + i, workers, options.seconds, options.count, options.only), range(workers))
        )
    found: Counter[str] = Counter()
    for part, _ in parts:
        found += part
    findings = [line for _, lines in parts for line in lines]
    total = {"tried": sum(found.values()), **dict.fromkeys(BAD, 0)}
    for name, count in found.items():
        for word in BAD:
            total[word] += count if word in name else 0
    print(json.dumps({**total, "first_seed": seed, "outcomes": dict(sorted(found.items()))}, indent=2))
    print(*findings[:20], sep="\n", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

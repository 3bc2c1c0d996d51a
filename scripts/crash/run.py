"""Long fault-injection campaigns on real runs: ``run.py kills --count 300`` prints counts, exit 1 on any violation.

- ``kills``: SIGKILL at random moments, half of them at random system calls of the files being written (before the
  call, or in the middle of a write), followed by ``--stops`` stops by SIGINT, SIGTERM and SIGUSR1. A run is killed up
  to four times and then allowed to finish. Its bytes must equal those of an undisturbed run, every record that the
  journal acknowledged must be in it, at most one evaluation may be repeated per kill, no temporary file may survive.
- ``points``: SIGKILL, SIGTERM, ENOSPC, EIO, EDQUOT and torn writes at every system call of a whole run with a task.
- ``disk``: a file system of 1 MiB with less and less free space; skipped with the reason if none can be mounted.
- ``races``: six runs of one output at once; exactly one wins, the others exit with 6.
- ``inputs``: twelve changes of a checkpoint, in four formats, at two moments of a run.
- ``bytes``: runs that must give equal bytes: repeated, with other threads, listings, workers and hash seeds, resumed.

Runs are forked from a process that has already imported torch, since the import would dominate their time; see
`faults.warm`. ``--seed`` repeats the same kills, except for moments that depend on the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import formats, job  # noqa: E402
from faults.kills import Campaign  # noqa: E402
from faults.mutations import MUTATIONS  # noqa: E402
from faults.points import OLD, counted, every_point  # noqa: E402
from faults.warm import Warm  # noqa: E402

TASK = Path(job.__file__)
DISK = 1 << 20
Found = tuple[Mapping[str, int], list[str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--count", type=int, default=300, help="number of kills, or rounds of a race")
    parser.add_argument("--stops", type=int, default=50, help="number of stops by SIGINT, SIGTERM or SIGUSR1")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Warm(_made(Path(folder) / "said")) as warm:
        train(Path(folder) / "ckpts")
        counts, wrong = KINDS[options.what](warm, Path(folder), options)
    print(json.dumps({**counts, "violations": len(wrong)}, indent=2))
    print(*wrong[:20], sep="\n", file=sys.stderr)
    return 1 if wrong else 0


def train(folder: Path) -> None:
    """Train the candidates in a separate process, so that forks of this one have never run autograd."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    subprocess.run([sys.executable, "-m", "faults.job", folder], env=environment, check=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def kills(warm: Warm, folder: Path, options: argparse.Namespace) -> Found:
    campaign = Campaign(warm, folder / "runs", TASK, folder / "ckpts", options.seed)
    campaign.run(campaign.measure(), options.count, options.stops)
    del campaign.counts["places"]
    phases = {f"ended while {name}": count for name, count in sorted(campaign.phases.items())}
    return {**campaign.counts, **phases}, campaign.wrong


def points(warm: Warm, folder: Path, options: argparse.Namespace) -> Found:
    place = _made(folder / "points")
    (place / "ckpts").symlink_to(folder / "ckpts")
    command = ("soup", "ckpts", "--last", 3, "--task", TASK, "--no-baselines")
    modules = ("filesystem.atomic", "journal", "filesystem.lock", "output.safetensors_file")
    found = list(every_point(warm, place, command, modules=modules))
    wrong = [f"{one.what} at call {one.at}, force {one.force}: {one.wrong}" for one in found if one.wrong]
    kinds = Counter(f"{one.what} points" for one in found)
    return {"fault points": counted(found)["fault points"], **kinds}, wrong


def disk(warm: Warm, folder: Path, options: argparse.Namespace) -> Found:
    counts, wrong = Counter[str](), list[str]()
    with _mounted(_made(folder / "disk")) as reason:
        if reason:
            return {"skipped": 1}, []
        place = folder / "disk"
        arguments = ("aswa", folder / "ckpts", "--task", TASK, "-o", place / "out")
        assert warm.run(*arguments, cwd=folder).code == 0
        new = (place / "out").read_bytes()
        for force in (False, True):
            for leave in range(0, 120_000, 4096):
                for path in place.iterdir():
                    path.unlink()
                if force:
                    (place / "out").write_bytes(OLD)
                status = os.statvfs(place)
                (place / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - leave))
                more = ["--force"] if force else []
                done = warm.run(*arguments, *more, cwd=folder)
                data = (place / "out").read_bytes() if (place / "out").exists() else None
                counts.update({"full disks": 1, "written all the same": done.code == 0})
                if (
                    data not in (new, OLD if force else None)
                    or done.code not in (0, 5)
                    or (done.code == 0) > (data == new)
                ):
                    wrong.append(f"{leave} bytes left, force {force}: exit {done.code}: {done.err[-300:]}")
                (place / "filler").unlink()
                if done.code:
                    again = warm.run(*arguments, *more, cwd=folder)
                    if again.code or (place / "out").read_bytes() != new:
                        wrong.append(f"{leave} bytes left, force {force}: the next run: {again}")
                if left := {path.name for path in place.iterdir()} - {"out"}:
                    wrong.append(f"{leave} bytes left, force {force}: leaves {left}")
                    return counts, wrong
    return counts, wrong


@contextmanager
def _mounted(place: Path) -> Iterator[str]:
    """Mount a small file system, or return the reason why none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"a tmpfs cannot be mounted here: {done.stderr.strip()}", file=sys.stderr)
        yield done.stderr or "no"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def races(warm: Warm, folder: Path, options: argparse.Namespace) -> Found:
    wrong: list[str] = []
    for number in range(options.count):
        place = _made(folder / "races" / str(number))
        hook = {"gate": str(place / "gate")}
        racers = [warm.start("swa", folder / "ckpts", "-o", "out", cwd=place, hook=hook) for _ in range(6)]
        (place / "gate").touch()
        codes = sorted(racer.wait().code for racer in racers)
        if codes != [0, 6, 6, 6, 6, 6] or {path.name for path in place.iterdir()} != {"gate", "out"}:
            wrong.append(f"round {number}: {codes}, {sorted(path.name for path in place.iterdir())}")
    return {"races of six": options.count, "with one winner": options.count - len(wrong)}, wrong


def inputs(warm: Warm, folder: Path, options: argparse.Namespace) -> Found:
    counts, wrong = Counter[str](), list[str]()
    for number, (kind, name, moment) in enumerate(
        (kind, name, moment) for kind in formats.FORMATS for name in MUTATIONS for moment in ("load", "learn")
    ):
        place = _made(folder / "inputs" / str(number))
        files = formats.written(kind, folder / "ckpts", place / "ckpts")
        asked = f"{moment}:{name}:{files[-2]}:{files[0]}"
        arguments = ("soup", "ckpts", "--last", 3, "--task", TASK, "-o", "out", "--no-baselines")
        done = warm.run(*arguments, cwd=place, MUTATION=asked)
        noticed = done.code == 3 and not (place / "out").exists()
        counts.update({"inputs changed": 1, "noticed": noticed, "bus errors": done.code == -7})
        if not noticed:
            wrong.append(f"{asked}: {done}")
    return counts, wrong


def bytes_(warm: Warm, folder: Path, options: argparse.Namespace) -> Found:
    base = ("sewa", folder / "ckpts", "--k", 3, "--steps", 30, "--task", TASK)
    outputs, wrong = list[Path](), list[str]()

    def run(name: str, wanted: int = 0, hook: Mapping[str, int] | None = None, **environment: str) -> None:
        done = warm.run(*base, "-o", name, cwd=folder, hook=hook, **environment)
        if done.code != wanted:
            wrong.append(f"{name}: {done}")
        elif not wanted:
            outputs.append(folder / name)

    for number in range(5):
        run(f"again-{number}")
    for number in range(3):
        run(f"listing-{number}", hook={"listing": number})
        run(f"workers-{number}", WORKERS=str(number))
    for number, stop in enumerate(("10:SIGKILL", "60:SIGKILL", "90:SIGTERM", "120:SIGUSR1")):
        run(f"resumed-{number}", -9 if "KILL" in stop else 75, LOG=str(folder / f"log-{number}"), STOP=stop)
        run(f"resumed-{number}")
    for number in range(2):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2]), "PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-m", "ckptavg", *map(str, base), "-q", "-o", f"fresh-{number}"]
        subprocess.run(
            command, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL
        )
        outputs.append(folder / f"fresh-{number}")
    distinct = {hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs}
    plain = set[str]()
    for threads in (1, 2, 4):  # averages only: a model's arithmetic may depend on threads
        done = warm.run("swa", folder / "ckpts", "-o", f"threads-{threads}", cwd=folder, hook={"threads": threads})
        assert done.code == 0, done.err
        plain.add(hashlib.sha256((folder / f"threads-{threads}").read_bytes()).hexdigest())
    scored = set[str]()
    for world in (1, 2, 4):  # selections by scores
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += ["-m", "ckptavg", "aswa", str(folder / "ckpts"), "--task", str(TASK), "-q", "-o", f"world-{world}"]
        paths = {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, env={**os.environ, **paths}, check=True, stdout=subprocess.DEVNULL)
        scored.add(hashlib.sha256((folder / f"world-{world}").read_bytes()).hexdigest())
    if {len(distinct), len(plain), len(scored)} != {1}:
        wrong.append(f"{len(distinct)}, {len(plain)} and {len(scored)} distinct outputs")
    return {
        "runs": len(outputs), "distinct outputs": len(distinct),
        "averages in 1, 2 and 4 threads": 3, "distinct averages": len(plain),
        "selections by 1, 2 and 4 workers": 3, "distinct selections": len(scored),
    }, wrong  # fmt: skip


KINDS: Mapping[str, Callable[[Warm, Path, argparse.Namespace], Found]] = {
    "kills": kills,
    "points": points,
    "disk": disk,
    "races": races,
    "inputs": inputs,
    "bytes": bytes_,
}

if __name__ == "__main__":
    sys.exit(main())

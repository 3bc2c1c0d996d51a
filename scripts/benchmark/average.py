"""Time averaging against plain copies and other tools: python scripts/benchmark/average.py /tmp/llama

The folder is the output of make_llama.py. Rounds are interleaved; the minimum of each figure is printed, with its ratio
to `cat` of all inputs plus `cp` of one. CPU seconds are the more stable figure on a shared machine.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# averaging only: open, read, sum and write, without the start of Python, digests and fsync
ITSELF = """
import resource, sys, time
from pathlib import Path
from ckptavg.average.weighted_sum import output_specs, weighted_average
from ckptavg.coefficients import Coefficients
from ckptavg.checkpoints.discover import discover
from ckptavg.output.safetensors_file import SafetensorsFile
def used():
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), mine.ru_utime + mine.ru_stime
start = used()
found = discover([Path(sys.argv[1])]).checkpoints
specs = output_specs(found)
with SafetensorsFile(Path(sys.argv[2]), specs, {}, force=True) as out:
    for part in weighted_average(found, Coefficients.uniform(range(len(found)), len(found)), specs):
        out.write(*part)
    print(*(after - before for before, after in zip(start, used())))
"""
RUNNING = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
paths, total = sorted(Path(sys.argv[1]).rglob("*.safetensors")), {}
for path in paths:
    for name, w in load_file(path).items():
        total[name] = total[name].add_(w) if name in total else w.float()
save_file({name: (w / len(paths)).bfloat16() for name, w in total.items()}, sys.argv[2])
"""
STACK = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
states = [load_file(path) for path in sorted(Path(sys.argv[1]).rglob("*.safetensors"))]
save_file({n: torch.stack([s[n] for s in states]).float().mean(0).bfloat16() for n in states[0]}, sys.argv[2])
"""


class Used(NamedTuple):
    """Cost of one run: wall-clock seconds, CPU seconds and peak memory in megabytes."""

    seconds: float
    processor: float
    peak: float


def measure(command: str) -> Used:
    """Run ``command``; if it prints two numbers, they replace the measured seconds."""
    start = time.perf_counter()
    with subprocess.Popen(["/bin/bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout
        printed = running.stdout.read().split()
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if running.returncode:
        raise SystemExit(f"failed with {running.returncode}: {command}")
    peak = usage.ru_maxrss / 1000
    if len(printed) == 2:
        return Used(float(printed[0]), float(printed[1]), peak)
    return Used(seconds, usage.ru_utime + usage.ru_stime, peak)


def drop_cache(files: list[Path]) -> None:
    """Evict files from the page cache, if the file system supports it."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def commands(folder: Path, scratch: Path, options: argparse.Namespace) -> Mapping[str, str]:
    """Return the compared commands by the label they are printed under."""
    mergekit, timm, half = options.mergekit, options.timm, options.half
    files = sorted(folder.rglob("*.safetensors"))
    inputs, out = " ".join(shlex.quote(str(path)) for path in files), scratch / "out.safetensors"

    def python(code: str) -> str:
        return shlex.join([sys.executable, "-c", code, str(folder), str(out)])

    def ours(folder: Path, *more: str) -> str:
        words = [sys.executable, "-m", "ckptavg", "swa", str(folder), "-o", str(out), "--force", *more]
        return f"{shlex.join(words)} > /dev/null"

    found = {
        "cat all + cp one": f"cat {inputs} > /dev/null; cp {shlex.quote(str(files[0]))} {scratch}/copy",
        "import torch": shlex.join([sys.executable, "-c", "import torch"]),
        "ckptavg, averaging alone": python(ITSELF),
        "ckptavg swa": ours(folder),
        "  --digests none": ours(folder, "--digests", "none"),
        "  half the candidates": ours(folder, "--last", str(len(files) // 2)),
        "float32 running sum": python(RUNNING),
        "stack().mean()": python(STACK),
    }
    if half:
        found["  half the model"] = ours(half)
    if mergekit:
        models = "".join(f"  - model: {path.parent}\n    parameters: {{weight: 1.0}}\n" for path in files)
        (scratch / "linear.yml").write_text(f"merge_method: linear\ndtype: bfloat16\nmodels:\n{models}")
        found["mergekit linear"] = f"HF_HUB_OFFLINE=1 {mergekit} {scratch}/linear.yml {scratch}/mergekit > /dev/null"
    if timm:
        found["timm avg_checkpoints"] = (
            f"{timm} --input {folder} --filter '**/*.safetensors' --no-sort --safetensors "
            f"--output {scratch}/timm.safetensors > /dev/null && rm {scratch}/timm*"
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", type=Path, help="as many candidates of half the size, to measure their memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml in its own environment")
    parser.add_argument("--timm", help="command of timm's avg_checkpoints.py, such as 'python avg_checkpoints.py'")
    options = parser.parse_args()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    print(f"{model.split(': ')[1]}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as name:
        table = commands(options.folder, Path(name), options)
        runs: dict[str, list[Used]] = {what: [] for what in table}
        for _ in range(options.rounds):
            for what, command in table.items():
                runs[what].append(measure(command))
        for what in ("cat all + cp one", "ckptavg swa"):
            drop_cache(sorted(options.folder.rglob("*.safetensors")))
            runs[f"{what}, cold"] = [measure(table[what])]
    base = min(used.seconds for used in runs["cat all + cp one"])
    print(f"{'':26} {'seconds':>8} {'x cat+cp':>8} {'CPU s':>8} {'peak MB':>8}")
    for what, taken in runs.items():
        seconds, processor, peak = (min(column) for column in zip(*taken, strict=True))
        print(f"{what:26} {seconds:8.2f} {seconds / base:8.1f} {processor:8.2f} {peak:8.0f}")


if __name__ == "__main__":
    main()

"""Startup time of the command line beside the interpreter's and torch's: python scripts/benchmark/start.py

`ckptavg --help`, and `ckptavg inspect` of 100 safetensors files of 100 tensors each, as whole processes with a warm
page cache. Rounds are interleaved; the minimum of each figure is printed, with its ratio to `python -c pass`. CPU
seconds are the more stable figure on a shared machine.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES, TENSORS = 100, 100
TARGETS = {"ckptavg --help": 0.3, f"ckptavg inspect, {FILES} files": 0.6}


def write(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for step in range(FILES):
        draws = torch.Generator().manual_seed(step)
        state = {f"layers.{i}.weight": torch.randn(32, 32, generator=draws) for i in range(TENSORS)}
        save_file(state, folder / f"step-{step}.safetensors")


def took(command: list[str]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        ckptavg = [sys.executable, "-m", "ckptavg"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "ckptavg --help": [*ckptavg, "--help"],
            f"ckptavg inspect, {FILES} files": [*ckptavg, "inspect", name],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        }
        runs = {what: [took(command)] for what, command in commands.items()}  # the first round warms the page cache
        for _ in range(options.rounds):
            for what, command in commands.items():
                runs[what].append(took(command))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; load "
          f"{os.getloadavg()[0]:.1f}; {options.rounds} rounds")  # fmt: skip
    print("                             seconds  of the processor   ratio  to reach")
    least = {what: tuple(min(column) for column in zip(*found[1:], strict=True)) for what, found in runs.items()}
    unit = least["python -c pass"][0]
    for what, (seconds, cpu) in least.items():
        target = f"{TARGETS[what]:.1f} s" if what in TARGETS else ""
        print(f"{what:27}  {seconds:7.3f}  {cpu:16.3f}  {seconds / unit:6.1f}  {target:>8}")


if __name__ == "__main__":
    main()

"""The average beside a copy of the same bytes and the naive loop, in one run: python scripts/benchmark/average.py

Eight bfloat16 files of 105 MB (or --megabytes), warm page cache. Prints seconds, ratios and each process's peak memory.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

OURS = """
import sys, ckptavg
ckptavg.swa(sys.argv[1], output=sys.argv[2], force=True)
"""
NAIVE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
states = [load_file(path) for path in Path(sys.argv[1]).iterdir()]
save_file({n: torch.stack([s[n] for s in states]).float().mean(0).bfloat16() for n in states[0]}, sys.argv[2])
"""
PEAK = "\nimport re; print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"


def process(code: str, folder: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of a whole Python process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code + PEAK, str(folder), str(folder.parent / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(re.findall(r"\d+", done.stdout)[-1]) / 1000


def copy(folder: Path) -> float:
    """Seconds to read all files and to write one of them, flushed: the least that averaging could take."""
    start = time.perf_counter()
    subprocess.run(f"cat {folder}/* >/dev/null; cp {folder}/step-0.safetensors {folder}/../copy; sync {folder}/../copy",
                   shell=True, check=True)  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=105)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ckpts"
        folder.mkdir()
        for i in range(8):
            torch.manual_seed(i)
            tensors = {f"layer.{j}": torch.randn(options.megabytes * 50_000).bfloat16() for j in range(10)}
            save_file(tensors, folder / f"step-{i}.safetensors")
        copies = sorted(copy(folder) for _ in range(options.rounds))[options.rounds // 2]
        for what, code in (("ckptavg swa", OURS), ("stack().mean()", NAIVE)):
            runs = sorted(process(code, folder) for _ in range(options.rounds))
            seconds, peak = runs[options.rounds // 2]
            print(
                f"{what:16} {seconds:6.2f} s = {seconds / copies:5.1f} × cat+cp ({copies:.2f} s), peak {peak:6.0f} MB"
            )


if __name__ == "__main__":
    main()

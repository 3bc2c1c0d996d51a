"""Start-up time of the command line beside the interpreter's, numpy's and torch's: python scripts/benchmark/start.py

Whole processes with a warm page cache, in alternating rounds; medians, and their ratio to `python -c pass`. The files
to inspect have 100 tensors each; `swa` averages ten LoRA adapters of 20 MB, `sewa` selects from the demo's checkpoints.
Then the packages that take longest to import in `swa` and `sewa`, by `python -X importtime` (which itself takes time):
"own" is a package's modules alone, "in all" includes what they import.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from processes import alternate, measure, middle, target

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
FILES = 100


def importtime(text: str) -> dict[str, tuple[float, float]]:
    """Return package → milliseconds of its own modules, and of its outermost imports with all that these import."""
    own, whole, parents = Counter[str](), Counter[str](), list[str]()
    lines = re.findall(r"^import time: +(\d+) \| +(\d+) \| ( *)([\w.]+)$", text, re.MULTILINE)
    for mine, total, indent, module in reversed(lines):  # from the back, an import comes before what it imports
        package = module.split(".")[0]
        parents[len(indent) // 2 :] = [package]
        own[package] += int(mine) / 1000
        whole[package] += int(total) / 1000 if package not in parents[:-1] else 0
    return {package: (own[package], milliseconds) for package, milliseconds in whole.most_common()}


def show_imports(name: str, words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", *words[1:]], capture_output=True, text=True, check=True)
    found = importtime(done.stderr)
    print(f"\nimports of {name}, {sum(own for own, _ in found.values()):.0f} ms    own ms  in all ms")
    for package, (own, whole) in list(found.items())[:10]:
        print(f"  {package:32} {own:8.0f} {whole:10.0f}")


def main() -> None:
    """Print the tables, and the targets."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9, help="a third of it for sewa")
    options = parser.parse_args()
    python, ckptavg = [sys.executable, "-c"], [sys.executable, "-m", "ckptavg"]
    help_, inspect, swa, sewa = "ckptavg --help", f"ckptavg inspect, {FILES} files", "ckptavg swa", "ckptavg sewa"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make = shlex.join([sys.executable, str(HERE / "make_llama.py")])
        measure(
            f"{make} {root}/files --count {FILES} --tensors 100; {make} {root}/lora --count 10 --layers 15 --lora 16"
        )
        measure(shlex.join([sys.executable, str(DEMO / "train.py")]), folder=root)
        out = ["-o", f"{root}/out.safetensors", "--force"]
        words = {
            "python -c pass": [*python, "pass"],
            "import numpy": [*python, "import numpy"],
            "import torch": [*python, "import torch"],
            help_: [*ckptavg, "--help"],
            inspect: [*ckptavg, "inspect", f"{root}/files"],
            swa: [*ckptavg, "swa", f"{root}/lora", *out],
            sewa: [*ckptavg, "sewa", f"{root}/ckpts", "--k", "5", "--task", str(DEMO / "task.py"), *out],
        }
        commands = {what: f"{shlex.join(command)} > /dev/null" for what, command in words.items()}
        counts = {what: options.rounds if what != sewa else (options.rounds + 2) // 3 for what in words}
        for command in commands.values():
            measure(command)  # warms the page cache
        runs = alternate(commands, counts, lambda: None)
        print(f"{'':27} {'seconds':>8} {'CPU s':>8} {'ratio':>7} {'peak MB':>8} {'runs':>5}")
        used = {what: middle(taken) for what, taken in runs.items()}
        for what, one in used.items():
            ratio = one.seconds / used["python -c pass"].seconds
            print(f"{what:27} {one.seconds:8.3f} {one.processor:8.3f} {ratio:7.1f} {one.peak:8.0f} {len(runs[what]):5}")
        for what in (swa, sewa):
            show_imports(what, words[what])
    for what, most in ((help_, 0.25), (inspect, 0.5), (swa, 0.45)):
        target(what if what != swa else f"{swa}, ten adapters", used[what].seconds, most, "s")


if __name__ == "__main__":
    main()

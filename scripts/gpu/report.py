"""Write docs/gpu.md from the results of scripts/gpu/check.sh: python scripts/gpu/report.py [OUT] [--to docs/gpu.md]

Without results the page is written without figures. Causes of missed goals are written by hand between the two marks
at its end, and are preserved.
"""

import argparse
import json
import operator
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
HEAD: Final = """# On a GPU

What `./scripts/gpu/check.sh` measures on a machine with CUDA, and how to run it: from the repository's root, with
torch, safetensors, typer, rich, pytest, hypothesis and scikit-learn installed, and without a network.

    ./scripts/gpu/check.sh                # all of it, 7 minutes at most: tests, process, speed
    ./scripts/gpu/check.sh speed          # one part
    python scripts/gpu/report.py          # writes this page from build/gpu (or $OUT)

*tests*: each strategy, each way to keep candidates (as they are, in 16 to 1 bits, in the host's memory, in their
files), BatchNorm, resume, `--compile`, `--precision bfloat16` and `--deterministic` find what they find on the CPU: the
same candidates, learned coefficients within 0.001, the same bytes of the file. A step of `sewa` and `twa` runs where
torch refuses whatever would make the host wait. *process*: one process by `torchrun` with NCCL, and a model that FSDP2
has sharded. *speed*: the figures, each beside its floor in the same run.
"""
BEGIN, END = "<!-- causes -->", "<!-- end of causes -->"
NOTHING: Final = "Nothing was measured yet: no machine with CUDA was at hand.\n"
COMPARE: Final = {">=": operator.ge, "<=": operator.le}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def listed(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name} {of}" for name, of in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def reached(line: Mapping[str, Any]) -> str:
    if line["value"] is None:
        return f"failed: {line['failure'].splitlines()[0]}"
    if not line["goal"]:
        return ""
    sign, goal = line["goal"].split()
    return "yes" if COMPARE[sign](line["ratio"], float(goal)) else "**missed**"


def of_speed(found: Sequence[Mapping[str, Any]]) -> str:
    shown = {"n": "N", "elements": "D", "tokens": "tokens", "bytes": "bytes"}
    rows = [
        [
            line["what"], ", ".join(f"{name} = {line[key]:,}" for key, name in shown.items() if key in line),
            f"{number(line['value'])} {line['unit']}", number(line["floor"]), number(line["ratio"]),
            line["goal"], reached(line),
        ]
        for line in found
    ]  # fmt: skip
    return table(["", "of", "measured", "floor", "ratio", "to reach", "reached"], rows)


def of_tests(path: Path) -> str:
    cases = list(ET.parse(path).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    text = f"{len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped.\n"
    return text + "".join(f"\n- failed: `{case.get('classname')}::{case.get('name')}`" for case in bad)


def page(out: Path, causes: str) -> str:
    machine = out / "machine.json"
    parts = {line["part"]: line for line in lines(out / "parts.jsonl") if line["device"] != "cpu"}
    if not parts or not machine.exists():
        return f"{HEAD}\n{NOTHING}"
    known = json.loads(machine.read_text())
    found = [HEAD, "## Machine\n", table(["", ""], [[name, listed(value)] for name, value in known.items()])]
    for name, what in (("tests", "Tests"), ("process", "One process"), ("speed", "Speed")):
        if name not in parts:
            continue
        part = parts[name]
        ended = {0: "", 124: ", cut off by its time limit"}.get(part["code"], f", ended with {part['code']}")
        found.append(f"## {what}\n\n{part['seconds']} s{ended}.\n")
        if name == "tests" and (out / "tests.xml").exists():
            found.append(of_tests(out / "tests.xml"))
        if name == "process":
            rows = [
                [line["what"], line["backend"], number(line["difference"]), "yes" if line["ok"] else "**no**"]
                for line in lines(out / "process.jsonl")
            ]
            found.append(table(["", "backend", "relative difference", "equal"], rows))
        if name == "speed":
            found.append(of_speed(lines(out / "speed.jsonl")))
    return "\n".join([*found, f"## What was missed, and why\n\n{BEGIN}{causes}{END}\n"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "build" / "gpu")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "gpu.md")
    options = parser.parse_args()
    before = options.to.read_text() if options.to.exists() else ""
    causes = before.partition(BEGIN)[2].partition(END)[0] if BEGIN in before else "\n"
    options.to.write_text(page(options.out, causes))


if __name__ == "__main__":
    main()

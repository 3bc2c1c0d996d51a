"""Compare the study's test figures of knowledge-graph models with those of dicee's own evaluator.

Run as ``PYTHONPATH=scripts .venv/bin/python scripts/study/dicee_check.py umls-distmult umls-complex umls-keci``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file

import ckptavg
from study.data import fetched
from study.domains import domain
from study.domains.knowledge_graph import GRAPHS, MODELS
from study.job import SCRIPTS, Training

NAMES: Final = {"test MRR": "MRR", "Hits@1": "H@1", "Hits@3": "H@3", "Hits@10": "H@10"}
"""Figure of the study → of dicee."""


def check(name: str, epochs: int, root: Path) -> float:
    """Print the figures of the last model of a training, of dicee's ASWA and of SWA; return the largest difference."""
    job, (graph, model) = domain(name).job(0, None), name.split("-")
    assert job.run is not None and job.figure is not None
    folder = root / "ckpts"
    steps = Training(folder=folder, steps=epochs, every=1, schedule="cosine", seed=0, device=torch.device("cpu"))
    files = {"last": root / "last.pt", "SWA": root / "swa.pt", **job.run(steps)}
    torch.save(torch.load(folder / f"step-{epochs}.pt")["state_dict"], files["last"])
    ckptavg.run(folder, "swa", output=root / "swa.safetensors", last=epochs // 2)
    torch.save(load_file(root / "swa.safetensors"), files["SWA"])
    command = [fetched("dicee-venv") / "bin" / "python", SCRIPTS / "study" / "dicee_train.py"]
    command += [fetched("pykeen") / GRAPHS[graph][1], f"--model={MODELS[model]}", "--evaluate", *files.values()]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    largest = 0.0
    for (label, file), theirs in zip(files.items(), json.loads(printed).values(), strict=True):
        module = job.model().eval()
        module.load_state_dict(torch.load(file))
        ours = job.figure(module)
        assert isinstance(ours, Mapping)
        print(f"{name}, {label}:", ", ".join(f"{key} {ours[key]:.4f} ({theirs[NAMES[key]]:.4f})" for key in NAMES))
        largest = max(largest, *(abs(ours[key] - theirs[NAMES[key]]) for key in NAMES))
    return largest


def main() -> int:
    """Return 0 if no figure differs by 1e-4."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domains", nargs="+", help="such as umls-keci")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    found: list[float] = []
    for name in options.domains:
        with tempfile.TemporaryDirectory(prefix="dicee-check-") as root:
            found.append(check(name, options.epochs, Path(root)))
    print(f"largest difference: {max(found):.1e}")
    return int(max(found) >= 1e-4)


if __name__ == "__main__":
    raise SystemExit(main())

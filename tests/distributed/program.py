"""Program for torchrun: carries out several runs in sequence on all ranks, and writes each rank's results to a file.

``torchrun --nproc-per-node 2 program.py PLAN.json FOLDER`` writes ``FOLDER/RANK.json``. The plan gives the name,
checkpoints, strategy, task and options of each run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckptavg.api import compare, run
from ckptavg.options import Options
from ckptavg.report.as_json import to_dict
from ckptavg.report.result import Comparison
from ckptavg.runtime.workers import ALONE, Workers, joined
from ckptavg.strategies import from_spec

Plan = Sequence[Mapping[str, Any]]


def carry_out(plan: Plan, folder: Path, workers: Workers = ALONE) -> list[dict[str, Any]]:
    """Return the report of each run as in its JSON, without times and paths."""
    found: list[dict[str, Any]] = []
    for one in plan:
        options = {"output": folder / f"{one['name']}.safetensors", "workers": workers, **one.get("options", {})}
        if one["strategy"].startswith("compare"):
            done = compare(one["ckpts"], one["strategy"].split(",")[1:], task=one["task"], **options)
        else:
            done = run(one["ckpts"], from_spec(one["strategy"]), task=one["task"], **options)
        contest = [
            {
                "name": each.name,
                "coefficients": each.coefficients,
                "gain": str(each.over_last),
                "cost": str(each.cost.epochs),
            }
            for each in (done.strategies if isinstance(done, Comparison) else ())
        ]
        shown = to_dict(done)
        shown["warnings"] = [said for said in shown["warnings"] if "--wait-stable" not in said]  # freshly written files
        if shown["cost"]:
            del shown["cost"]["seconds"]
        for strategy in shown.get("strategies", ()):
            del strategy["cost"]["seconds"]
        del shown["next_steps"]
        if shown["output"]:
            shown["output"]["path"] = Path(shown["output"]["path"]).name
        found.append({"name": one["name"], "contest": contest, **shown})
    return found


def main() -> None:
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    assert "workers" in Options.__dataclass_fields__
    with joined("cpu", 60.0) as workers:
        found = carry_out(plan, folder, workers)
    (folder / f"{workers.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

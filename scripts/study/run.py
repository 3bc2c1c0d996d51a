"""Run the study, two trainings at a time, and write its tables: ``./scripts/study/run.sh --help``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from ckptavg.errors import CkptavgError
from study import report
from study.cell import Cell, measure
from study.domains import DOMAINS, WITH_DATA, domain
from study.plan import PLANS, Plan, digest
from study.record import Failure, Record, append, read

RESULTS = "results.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if all trainings were measured, 1 if one failed."""
    options = _parser().parse_args(arguments)
    plan = PLANS["quick" if options.quick else "full"]
    plan = replace(plan, seeds=options.seeds or plan.seeds)
    names = options.domains.split(",")
    out = options.out / plan.name
    try:
        for name in names:
            if domain(name).needs_data and options.data is None:
                raise ValueError(f"{name} needs --data PATH")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cells = [
        Cell(domain=name, seed=seed, schedule=schedule, data=options.data if domain(name).needs_data else None)
        for seed in range(plan.seeds)
        for name in names
        for schedule in domain(name).schedules
    ]
    out.mkdir(parents=True, exist_ok=True)
    failed = run(cells, plan, out / RESULTS, options.workers)
    report.write(out / RESULTS, out)
    print(out / report.NAME)
    return int(failed > 0)


def run(cells: Sequence[Cell], plan: Plan, results: Path, workers: int) -> int:
    """Measure the cells missing from ``results`` and append them; return the number of failures."""
    done = {(one.digest, one.cell) for one in read(results) if isinstance(one, Record)}
    missing = [cell for cell in cells if (_digest(cell, plan), (cell.domain, cell.seed, cell.schedule)) not in done]
    if len(missing) < len(cells):
        _say(f"{len(cells) - len(missing)} of {len(cells)} trainings are in {results} already")
    started, failed = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        running = {pool.submit(measured, cell, plan): cell for cell in missing}
        try:
            for count, future in enumerate(as_completed(running), 1):
                result, cell = future.result(), running[future]
                append(results, result)
                failed += isinstance(result, Failure)
                what = f"failed: {result.error}" if isinstance(result, Failure) else f"{result.cpu_seconds:.0f} s"
                passed = f"{(time.monotonic() - started) / 60:.1f} min"
                _say(f"[{count}/{len(missing)}, {passed}] {cell.domain}, seed {cell.seed}, {cell.schedule}: {what}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def measured(cell: Cell, plan: Plan) -> Record | Failure:
    """Measure a cell, or return its failure: a training that diverged must neither stop the others nor be lost."""
    try:
        return measure(cell, plan)
    except CkptavgError as error:
        return Failure(
            digest=_digest(cell, plan), domain=cell.domain, seed=cell.seed, schedule=cell.schedule, error=str(error)
        )


def _digest(cell: Cell, plan: Plan) -> str:
    return digest(cell.domain, plan.of(cell.domain), cell.data)


def _prepare() -> None:
    torch.set_num_threads(1)  # networks this small gain nothing from a second thread, and are reproducible with one
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Exit with the parent: a worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small trainings and few seeds: minutes, not hours")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="comma-separated domains (%(default)s)")
    parser.add_argument("--seeds", type=int, help="trainings of each domain and schedule (full: 8, quick: 3)")
    parser.add_argument("--data", type=Path, help=f"files for the domains {', '.join(WITH_DATA)}")
    parser.add_argument("--out", type=Path, default=Path("build/study"), help="directory of the results (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (%(default)s)")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

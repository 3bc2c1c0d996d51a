"""``ckptavg landscape``: a second-order model of the loss around the candidates, and the error of that model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ckptavg.cli.command import reporting, run_command
from ckptavg.declaration import MAIN, SEARCH, Help, declared


@dataclass(frozen=True, kw_only=True)
class _Settings:
    samples: Annotated[int, Help(MAIN, "Random mixtures to score.", metavar="N")] = 32
    mixtures: Annotated[
        str, Help(MAIN, "Three strategies that span a plane to score: last,swa,twa.", metavar="A,B,C")
    ] = ""
    grid: Annotated[int, Help(MAIN, "Points along each side of the plane.", metavar="N")] = 9
    hessian: Annotated[Literal["auto", "exact", "gauss-newton"], Help(SEARCH, "Second derivatives to use.")] = "auto"


def _run(**arguments: Any) -> None:
    names = [name.strip() for name in arguments.pop("mixtures").split(",") if name.strip()]
    more = {name: arguments.pop(name) for name in ("samples", "grid", "hessian")}

    def work(*inputs: Any) -> Any:
        from ckptavg.pipeline.landscape import landscape
        from ckptavg.report import as_json
        from ckptavg.report import landscape as surface

        paths, options, watch = inputs
        measured = landscape(paths, options, watch, mixtures=names, as_text=as_json.to_json, **more)
        if measured.plane is not None and options.workers.is_rank_zero:
            surface.draw(measured.plane, Path(options.output).with_suffix(".png"))
        return measured

    arguments["output"] = arguments["output"] or "landscape.json"
    run_command(arguments, work, needs_task=True)


command = reporting(
    _run,
    "landscape",
    "Write a second-order model of the loss around the candidates as JSON.",
    declared(_Settings),
    without=(
        "never_worse", "baselines", "dtype", "max_shard_size", "digests", "format", "shard", "adapter", "rank",
        "dry_run", "holdout", "precision",
    ),
    defaults={"output": "landscape.json"},
)  # fmt: skip

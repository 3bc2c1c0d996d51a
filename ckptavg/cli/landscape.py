"""``ckptavg landscape``: the loss to second order around the candidates, and how far that can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from ckptavg.cli.command import parameter, run_command, with_signature
from ckptavg.cli.options import option

Samples = Annotated[int, option("Landscape", "Random mixtures that are really scored.")]
Mixtures = Annotated[
    str,
    option("Landscape", "Three strategies whose plane is scored too: last,swa,twa:solver=quadratic.", metavar="A,B,C"),
]
Grid = Annotated[int, option("Landscape", "Points along each side of the plane.")]
Curvature = Annotated[
    Literal["auto", "exact", "gauss-newton"], option("Landscape", "Which second derivatives.", "--hessian")
]


def _run(**arguments: Any) -> None:
    names = [name.strip() for name in arguments.pop("mixtures").split(",") if name.strip()]
    more = {name: arguments.pop(name) for name in ("samples", "grid", "hessian")}

    def work(*inputs: Any) -> Any:
        from ckptavg.pipeline.landscape import landscape
        from ckptavg.report import as_json
        from ckptavg.report import landscape as surface

        paths, options, watch = inputs
        found = landscape(paths, options, watch, mixtures=names, as_text=as_json.to_json, **more)
        if found.plane is not None and options.workers.is_rank_zero:
            surface.draw(found.plane, Path(options.output).with_suffix(".png"))
        return found

    arguments["output"] = arguments["output"] or "landscape.json"
    run_command(arguments, work, needs_task=True)


command = with_signature(
    _run,
    "landscape",
    "Describe the loss around the candidates to second order, and write it as JSON.",
    [
        parameter("samples", Samples, 32),
        parameter("mixtures", Mixtures, ""),
        parameter("grid", Grid, 9),
        parameter("hessian", Curvature, "auto"),
    ],
    without=(
        "never_worse",
        "baselines",
        "dtype",
        "max_shard_size",
        "digests",
        "format",
        "shard",
        "adapter",
        "rank",
        "dry_run",
        "holdout",
        "precision",
    ),
    defaults={"output": "landscape.json"},
)

"""``ckptavg landscape``: a second-order model of the loss around the candidates, and the error of that model."""

from pathlib import Path
from typing import Any, Final, Literal

from ckptavg.cli.command import reports, run_command
from ckptavg.declaration import MAIN, SEARCH, Help, Option

_OWN: Final = (
    Option("samples", int, 32, Help(MAIN, "Random mixtures to score.", metavar="N")),
    Option("mixtures", str, "", Help(
        MAIN, "Three strategies that span a plane to score: last,swa,twa.", metavar="A,B,C"
    )),
    Option("grid", int, 9, Help(MAIN, "Points along each side of the plane.", metavar="N")),
    Option("hessian", Literal["auto", "exact", "gauss-newton"], "auto", Help(SEARCH, "Second derivatives to use.")),
)  # fmt: skip
_WITHOUT: Final = (
    "never_worse", "baselines", "dtype", "max_shard_size", "digests", "format", "shard", "adapter", "rank", "dry_run",
    "holdout", "precision",
)  # fmt: skip


@reports(_OWN, without=_WITHOUT, defaults={"output": "landscape.json"})
def command(**arguments: Any) -> None:
    """Write a second-order model of the loss around the candidates as JSON."""
    names = [name.strip() for name in arguments.pop("mixtures").split(",") if name.strip()]
    more = {name: arguments.pop(name) for name in ("samples", "grid", "hessian")}

    def work(*inputs: Any) -> Any:
        from ckptavg.pipeline.landscape import landscape
        from ckptavg.report import landscape as surface

        paths, options, watch = inputs
        measured = landscape(paths, options, watch, mixtures=names, **more)
        if measured.plane is not None and options.workers.is_rank_zero:
            surface.draw(measured.plane, Path(options.output).with_suffix(".png"))
        return measured

    arguments["output"] = arguments["output"] or "landscape.json"
    run_command(arguments, lambda: work, needs_task=True)

"""``ckptavg compare``: compare strategies on the user's own candidates and task."""

from __future__ import annotations

from typing import Annotated, Any

from ckptavg.cli.command import parameter, run_command, with_signature
from ckptavg.cli.options import MAIN, option

Strategies = Annotated[
    str,
    option(
        MAIN,
        "Strategies, as last,sewa:k=8,twa:on=train:lr=0.01; default: all possible.",
        metavar="LIST",
    ),
]


def _run(**arguments: Any) -> None:
    names = [name.strip() for name in arguments.pop("strategies").split(",") if name.strip()]

    def work(*inputs: Any) -> Any:
        from ckptavg.pipeline.comparison import compare

        paths, options, watch = inputs
        return compare(paths, names, options, watch)

    run_command(arguments, work, needs_task=True)


command = with_signature(
    _run,
    "compare",
    "Run several strategies on the same candidates and write the average that validates best.",
    [parameter("strategies", Strategies, "")],
    without=("never_worse", "baselines"),
)

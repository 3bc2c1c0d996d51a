"""``ckptavg compare``: compare strategies on the user's own candidates and task."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from ckptavg.cli.command import reporting, run_command
from ckptavg.declaration import MAIN, Help, declared


@dataclass(frozen=True, kw_only=True)
class _Settings:
    strategies: Annotated[
        str, Help(MAIN, "Strategies, as last,sewa:k=8,twa:on=train:lr=0.01; default: all possible.", metavar="LIST")
    ] = ""


def _run(**arguments: Any) -> None:
    from ckptavg.pipeline.comparison import compare

    names = [name.strip() for name in arguments.pop("strategies").split(",") if name.strip()]
    run_command(arguments, partial(compare, names=names), needs_task=True)


command = reporting(
    _run,
    "compare",
    "Run several strategies on the same candidates and write the average that validates best.",
    declared(_Settings),
    without=("never_worse", "baselines"),
)

"""``ckptavg compare``: compare strategies on the user's own candidates and task."""

from functools import partial
from typing import Any

from ckptavg.cli.command import reports, run_command
from ckptavg.declaration import MAIN, Help, Option
from ckptavg.options import NOT_COMPARE
from ckptavg.strategies import specs

_HELP = Help(MAIN, "Strategies, as last,sewa:k=8,twa:on=train:lr=0.01; default: all possible.", metavar="LIST")


@reports([Option("strategies", str, "", _HELP)], without=NOT_COMPARE)
def command(**arguments: Any) -> None:
    """Run several strategies on the same candidates and write the average that validates best."""
    names = specs(arguments.pop("strategies"))

    def load() -> Any:
        from ckptavg.pipeline.comparison import compare

        return partial(compare, names=names)

    run_command(arguments, load, needs_task=True)

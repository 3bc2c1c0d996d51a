"""``ckptavg compare``: compare strategies on the user's own candidates and task."""

from functools import partial
from typing import Any

from ckptavg.cli.command import reports, run_command
from ckptavg.declaration import MAIN, Help, Option

_HELP = Help(MAIN, "Strategies, as last,sewa:k=8,twa:on=train:lr=0.01; default: all possible.", metavar="LIST")


@reports([Option("strategies", str, "", _HELP)], without=("never_worse", "baselines"))
def command(**arguments: Any) -> None:
    """Run several strategies on the same candidates and write the average that validates best."""
    names = [name.strip() for name in arguments.pop("strategies").split(",") if name.strip()]

    def load() -> Any:
        from ckptavg.pipeline.comparison import compare

        return partial(compare, names=names)

    run_command(arguments, load, needs_task=True)

"""``ckptavg compare``: compare strategies on the user's own candidates and task."""

from functools import partial
from typing import Any

from ckptavg.cli.command import reports, run_command
from ckptavg.declaration import declared
from ckptavg.options import NOT_COMPARE
from ckptavg.options.comparison import ComparisonOptions


@reports(declared(ComparisonOptions), without=NOT_COMPARE)
def command(**arguments: Any) -> None:
    """Run several strategies on the same candidates and write the average of the winner."""
    settings = {option.name: arguments.pop(option.name) for option in declared(ComparisonOptions)}

    def load() -> Any:
        from ckptavg.pipeline.comparison import compare

        return partial(compare, **settings)

    run_command(arguments, load, needs_task=True)

"""``ckptavg landscape``: a second-order model of the loss around the candidates, and a picture of a plane."""

from functools import partial
from typing import Any, Final

from ckptavg.cli.command import reports, run_command
from ckptavg.declaration import MAIN, Help, Option, declared
from ckptavg.options.follow import FOLLOW
from ckptavg.options.landscape import LandscapeOptions

_OUTPUT: Final = Help(
    MAIN, "x.json: numbers; x.png, .svg, .pdf: picture; directory/: both.", metavar="PATH", short="-o"
)
_WITHOUT: Final = (
    "output", "never_worse", "baselines", "dtype", "max_shard_size", "digests", "format", "shard", "adapter", "rank",
    "dry_run", "holdout", "precision", "log_to", *FOLLOW,
)  # fmt: skip


@reports((*declared(LandscapeOptions), Option("output", str, "./", _OUTPUT)), without=_WITHOUT)
def command(**arguments: Any) -> None:
    """Measure the loss around the candidates: to second order, and with --mixtures a picture of a plane."""
    settings = {option.name: arguments.pop(option.name) for option in declared(LandscapeOptions)}

    def load() -> Any:
        from ckptavg.pipeline.landscape import landscape

        return partial(landscape, **settings)

    run_command(arguments, load, needs_task=True)

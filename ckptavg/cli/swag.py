"""``ckptavg swag``: the mean of the candidates, and models drawn from a Gaussian around it."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

from ckptavg.cli.command import reports, run_command
from ckptavg.cli.options import CKPTS, named
from ckptavg.declaration import declared
from ckptavg.options import NOT_SWAG
from ckptavg.options.posterior import PosteriorOptions

_FILES: Final = named("ckpts", Annotated[list[Path], CKPTS], [])  # --from has none


@reports(declared(PosteriorOptions), without=NOT_SWAG, searches=False, argument=_FILES)
def command(**arguments: Any) -> None:
    """Average all candidates; draw models from a Gaussian around the mean, and average their predictions."""
    settings = {option.name: arguments.pop(option.name) for option in declared(PosteriorOptions)}

    def load() -> Any:
        from ckptavg.pipeline.swag import swag

        return partial(swag, settings=PosteriorOptions(**settings))

    run_command(arguments, load, needs_task=False)

"""The options of a run beside a training: when it looks for new checkpoints, and when it ends."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from ckptavg.declaration import AT_LEAST_1, MAIN, POSITIVE, RUN, Help, Limit, check, declared
from ckptavg.errors import UsageError

_IDLE: Final = 3600.0  # seconds without a new checkpoint that end a run without another condition
DURATION: Final = Limit(lambda value: 0 <= value < math.inf, "0 or more seconds")


@dataclass(frozen=True, kw_only=True)
class FollowOptions:
    """The options of a run beside a training; its ends are alternatives."""

    follow: Annotated[bool, Help(
        MAIN, "Average while a job trains: again for each checkpoint.",
        "It ends by --pid, --until or --idle.",
        changes_measurements=False)] = False  # fmt: skip
    until: Annotated[Path | str | None, Help(
        RUN, "With --follow: end once this file exists.", metavar="FILE", changes_measurements=False
    )] = None  # fmt: skip
    pid: Annotated[int | None, Help(
        RUN, "With --follow: end once this process has ended.", metavar="PID", limit=AT_LEAST_1,
        changes_measurements=False)] = None  # fmt: skip
    idle: Annotated[float | None, Help(
        RUN, "With --follow: end after SECONDS without a checkpoint.",
        f"By default {_IDLE:.0f} if there is neither --until nor --pid.", "SECONDS", limit=POSITIVE,
        changes_measurements=False)] = None  # fmt: skip
    poll: Annotated[float, Help(
        RUN, "With --follow: seconds between looks at the directory.", metavar="SECONDS", limit=POSITIVE,
        changes_measurements=False)] = 5.0  # fmt: skip

    @property
    def idle_limit(self) -> float:
        """Seconds without a new checkpoint after which the run ends; infinite if it ends in another way."""
        without = _IDLE if self.until is None and self.pid is None else math.inf
        return without if self.idle is None else self.idle

    def __post_init__(self) -> None:
        check(self)
        for name, value in (("--until", self.until), ("--pid", self.pid)):  # the others may be in a configuration file
            if value is not None and not self.follow:
                raise UsageError(f"{name} goes with --follow, which waits for checkpoints")


FOLLOW: Final = tuple(option.name for option in declared(FollowOptions))
"""The options of a run beside a training, which few strategies have: `ckptavg.objective.Strategy.follows`."""

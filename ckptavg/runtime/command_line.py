"""The command line of this process, with what the environment and a configuration file add to it, and versions."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from ckptavg.runtime import version


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The command to repeat a run.

    Attributes:
        command: as it was typed in a shell, behind the variables ``CKPTAVG_…`` that were set.
        configuration: options from ckptavg.toml or pyproject.toml.
        processes: processes that torchrun started.
        versions: package → version, of those that were loaded.
    """

    command: str
    configuration: Mapping[str, str] = field(default_factory=dict[str, str])
    processes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def current(cls, configuration: Mapping[str, str], processes: int = 1) -> Self:
        """Return that of this process."""
        variables = [
            f"{name}={shlex.quote(value)}" for name, value in sorted(os.environ.items()) if name.startswith("CKPTAVG_")
        ]
        loaded = {name: version.installed(name) for name in ("torch", "numpy", "transformers") if name in sys.modules}
        return cls(
            command=" ".join([*variables, "ckptavg", shlex.join(sys.argv[1:])]),
            configuration=dict(configuration),
            processes=processes,
            versions={"ckptavg": version.own(), "python": platform.python_version()}
            | {name: number for name, number in loaded.items() if number},
        )

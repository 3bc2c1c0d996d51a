"""State of another process: alive or ended."""

import os
from contextlib import suppress
from pathlib import Path


class Process:
    """A process of this machine; where there is a /proc, a later one with the same id is told from it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = self._state()[1]

    def ended(self) -> bool:
        """Return whether it has ended; on Linux also if its parent has not asked for its exit code yet."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # another user's
            pass
        state, started = self._state()
        return state in ("Z", "X") or started != self._started

    def _state(self) -> tuple[str, str]:
        """Return its state and its start time in clock ticks; both empty if unknown."""
        with suppress(OSError, IndexError):
            fields = Path(f"/proc/{self.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            return fields[0], fields[19]
        return "", ""

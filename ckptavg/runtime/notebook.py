"""Progress in a notebook: one line of output, which is rewritten."""

import sys
from collections.abc import Mapping


class ProgressLine:
    """Progress callback that prints ``stage 12/100`` over its previous line; it needs no widgets."""

    def __init__(self) -> None:
        self._width = 0

    def __call__(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Print a line; see `ckptavg.runtime.progress.Watch`."""
        figures = "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        line = f"{stage} {done}/{total}{figures}" if total else stage
        print("\r" + line.ljust(self._width), end="" if total else "\n", flush=True)
        self._width = len(line) if total else 0

    def clear(self) -> None:
        """Erase the line."""
        print("\r" + " " * self._width, end="\r", flush=True)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None

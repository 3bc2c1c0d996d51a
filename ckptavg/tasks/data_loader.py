"""Settings of a data loader that tell the sizes of its batches, and a fresh start for each of its passes."""

from contextlib import suppress
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from ckptavg.runtime.seeds import seed_loader


def restart(loader: Any) -> None:
    """Make the next pass draw the same random numbers as every other pass.

    Generators of the loader are seeded. Persistent worker processes, which keep theirs from pass to pass, are ended:
    the next pass starts new ones.
    """
    seed_loader(loader)
    if isinstance(loader, DataLoader) and (workers := getattr(loader, "_iterator", None)) is not None:
        with suppress(AttributeError, RuntimeError):
            workers._shutdown_workers()
        loader._iterator = None  # pyright: ignore[reportPrivateUsage]


class Sizes:
    """Numbers of examples that a loader is set to give.

    Args:
        loader: a data loader of any kind; only torch's settings are understood.
    """

    def __init__(self, loader: Any) -> None:
        sampler = getattr(loader, "batch_sampler", None)
        full = getattr(loader, "batch_size", None) or (sampler.batch_size if type(sampler) is BatchSampler else None)
        self._full: int | None = full if type(full) is int and full > 0 else None
        self._total = _examples(loader)
        if self._total is not None and self._full and getattr(sampler or loader, "drop_last", False):
            self._total -= self._total % self._full

    def expected(self, before: int) -> tuple[int | None, bool]:
        """Return the size of the batch after ``before`` examples, if the loader is set to one, and whether it must be.

        A batch of a loader that is set to single items may hold any number of them: items may be batches.
        """
        if self._full is None or self._total is None:
            return self._full, False
        return min(self._full, max(self._total - before, 0)), self._full > 1

    def mismatch(self, counted: int) -> str:
        """Return a remark if a pass has counted other examples than the loader draws."""
        if self._total is None or counted == self._total:
            return ""
        return (
            f"a pass has {counted} examples, but its dataset {self._total}: if it should not, define batch_size(batch)"
        )


def _examples(loader: Any) -> int | None:
    """Return the number of examples that a pass draws; None if the loader does not tell."""
    source = getattr(loader, "dataset", None)
    if isinstance(loader, DataLoader):
        sampler: Any = loader.batch_sampler
        if type(sampler) is BatchSampler:
            source = sampler.sampler
        elif sampler is not None or loader.batch_size is None:
            return None  # examples may be drawn several times, or items of the dataset are batches
    with suppress(TypeError, NotImplementedError):
        return len(source)  # pyright: ignore[reportArgumentType]
    return None

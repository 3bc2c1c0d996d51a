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


def sizes(loader: Any) -> list[int]:
    """Return the numbers of examples of a full batch and of the last one, where the loader is set to them."""
    sampler = getattr(loader, "batch_sampler", None)
    full = getattr(loader, "batch_size", None) or (sampler.batch_size if type(sampler) is BatchSampler else None)
    if type(full) is not int or full < 1:
        return []
    total = _examples(loader)
    return [full] if total is None else [full, total % full or full]


def mismatch(loader: Any, counted: int) -> str:
    """Compare the examples counted in a pass with those that the loader draws; return a remark if they differ."""
    total, sampler = _examples(loader), getattr(loader, "batch_sampler", loader)
    if total is not None and getattr(sampler, "drop_last", False):
        total -= total % max(sizes(loader))
    if total is None or counted == total:
        return ""
    return f"a pass has {counted} examples, but its dataset {total}: if it should not, define batch_size(batch)"


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

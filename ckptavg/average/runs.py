"""Division of an average into runs of elements, small enough for the buffers of a thread."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ckptavg.checkpoints.checkpoint import Checkpoint
from ckptavg.checkpoints.integrity import same_bytes
from ckptavg.checkpoints.kept import is_averaged
from ckptavg.coefficients import Coefficients
from ckptavg.readers import FLOATING, ITEM_SIZE, StoredTensor

# name → range of element indices in C order; tensors that are not listed have no elements
Ranges: TypeAlias = Mapping[str, range]


class Run(NamedTuple):
    """Consecutive elements of one tensor, or of several that lie together, averaged at once into dtype ``target``."""

    name: str
    start: int
    numel: int
    terms: Sequence[tuple[float, Checkpoint]]
    target: str
    following: list[str] | None = None  # whole tensors that come next in all files, and belong to it

    def follows(self, run: "Run") -> bool:
        """Return whether it begins where ``run`` ends, in every file, and has the same coefficients and dtypes."""
        alike = self.target == run.target and self.target in FLOATING and len(self.terms) == len(run.terms)
        ends = run.following or run.start + run.numel == run.terms[0][1].spec(run.name).numel
        if not alike or not ends or self.numel != self.terms[0][1].spec(self.name).numel:
            return False
        for (c, source), (same, other) in zip(self.terms, run.terms, strict=True):
            last, first = source.spec((run.following or [run.name])[-1]), source.spec(self.name)
            if c != same or source is not other or not source.reader.flat or first.dtype != last.dtype:
                return False
            if (first.record, first.offset) != (last.record, last.offset + last.nbytes) or first.stride or last.stride:
                return False
        return True

    def split(self, data: memoryview) -> Iterator[tuple["Run", memoryview]]:
        """Yield a run of each tensor, and its part of ``data``."""
        size = ITEM_SIZE[self.target]
        numel = self.numel - sum(self.terms[0][1].spec(name).numel for name in self.following or ())
        yield self._replace(numel=numel, following=None), data[: numel * size]
        for name in self.following or ():
            data, numel = data[numel * size :], self.terms[0][1].spec(name).numel
            yield self._replace(name=name, start=0, numel=numel, following=None), data[: numel * size]


def part(checkpoint: Checkpoint, rank: int, world_size: int) -> Ranges:
    """Return the elements that ``rank`` averages: 1/``world_size`` of the bytes, contiguous in file order."""
    names = in_order(checkpoint)
    total = sum(checkpoint.spec(name).nbytes for name in names)
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    ranges: dict[str, range] = {}
    for name in names:
        spec = checkpoint.spec(name)
        begin, end = (min(max(0, edge // ITEM_SIZE[spec.dtype]), spec.numel) for edge in (start, stop))
        if begin < end:
            ranges[name] = range(begin, end)
        start, stop = start - spec.nbytes, stop - spec.nbytes
    return ranges


def in_order(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors in the order of the file."""
    specs = checkpoint.tensors
    return sorted(specs, key=lambda name: (specs[name].record, specs[name].offset, name))


def batches(
    checkpoints: Sequence[Checkpoint], coefficients: Coefficients, specs: Mapping[str, StoredTensor],
    only: Ranges | None, chunk: int,
) -> Iterator[list[Run]]:  # fmt: skip
    """Yield runs in batches of at most one chunk, since a task per small tensor would cost more than its sum."""
    batch: list[Run] = []
    numel = 0
    for name in in_order(checkpoints[0]):
        spec = checkpoints[0].spec(name)
        elements = range(spec.numel) if only is None else only.get(name, range(0))
        terms = [(1.0, checkpoints[coefficients.selected[-1]])]
        if is_averaged(checkpoints[0], name) and elements:
            terms = [(c, checkpoints[i]) for i, c in enumerate(coefficients.row(name)) if c != 0]
            alike = not coefficients.linear and not _reproduces(terms, spec.dtype, specs[name].dtype)
            if alike and same_bytes([c for _, c in terms], name):
                terms = [(1.0, terms[-1][1])]
        for start in range(elements.start, elements.stop, chunk):
            run = Run(name, start, min(chunk, elements.stop - start), terms, specs[name].dtype)
            if numel + run.numel > chunk:
                yield batch
                batch, numel = [], 0
            batch.append(run)
            numel += run.numel
    if batch:
        yield batch


def joined(batch: Sequence[Run]) -> list[Run]:
    """Return the batch with runs that follow one another in all files as one: a sum of few elements is all overhead."""
    runs: list[Run] = []
    for run in batch:
        if runs and run.follows(runs[-1]):
            following = runs[-1].following or list[str]()
            following.append(run.name)
            runs[-1] = runs[-1]._replace(numel=runs[-1].numel + run.numel, following=following)
        else:
            runs.append(run)
    return runs


def _reproduces(terms: Sequence[tuple[float, Checkpoint]], dtype: str, target: str) -> bool:
    """Return whether one rounding of the sum of equal finite values gives these values, bit for bit."""
    widened = target in (dtype, "F32") and "F64" not in (dtype, target)
    return len(terms) == 1 or (widened and all(c > 0 for c, _ in terms))

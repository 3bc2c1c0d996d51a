"""The surroundings that every part of a run shares: `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.journal import Journal, ReadOnlyJournal
from ckptavg.runtime.progress import Progress
from ckptavg.runtime.workers import ALONE, Workers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Run:
    """Device, ranks, seed, progress and journal of a run, made once.

    Attributes:
        device: the device of the model and the candidates; None, whatever its type, where neither is loaded.
        workers: the ranks that divide the work.
        seed: the seed of all random numbers; loaders get seeds derived from it, so shuffling repeats.
        progress: the progress display.
        journal: measurements of an interrupted run, and of this one; by default none are kept.
        candidates: names of the candidates in the journal, if it is of a run whose candidates change.
    """

    device: torch.device
    workers: Workers = ALONE
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    journal: Journal | ReadOnlyJournal = field(default_factory=ReadOnlyJournal)
    candidates: Sequence[str] = ()

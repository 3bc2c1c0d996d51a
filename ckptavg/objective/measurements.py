"""Write scores, losses and gradients to the journal, and read back those of an interrupted run."""

from __future__ import annotations

import hashlib
import time
import zlib
from dataclasses import fields, replace
from typing import Final

import torch
from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import TaskError
from ckptavg.journal import Journal, ReadOnlyJournal
from ckptavg.journal.pass_progress import PassProgress
from ckptavg.journal.tensor_json import decode, encode, raw
from ckptavg.score import PerExample, Score, Split
from ckptavg.surrogate import Surrogate
from ckptavg.tasks import Task
from ckptavg.tasks.torch_metrics import Resampled

_FLUSH_INTERVAL: Final = 1.0  # seconds between writes of pending losses
_NUMBERS: Final = ("value", "loss", "metric")


class MeasurementLog:
    """Journal of measurements: read before measuring, written afterwards.

    Losses are numbered within a search, because a strategy requests them in a fixed order; a record is reused only if
    its coefficients are bitwise equal. Numbers are stored exactly.
    """

    def __init__(self, journal: Journal | ReadOnlyJournal) -> None:
        self._journal = journal
        self.folder = journal.folder
        self._search = -1
        self._next_loss = 0
        self._pending: list[tuple[str, Tensor, Tensor]] = []
        # split and exactness → `PerExample.order` of each score of an interrupted run
        self._orders: dict[str, list[int]] = {}
        self._flushed = time.monotonic()

    def restart(self) -> None:
        """Start the next search."""
        self._search += 1
        self._next_loss = 0

    def loss(self, c_GN: Tensor) -> tuple[str, tuple[Tensor, Tensor] | None]:
        """Return the key of the next loss, and the recorded loss and gradient (in the shape of c), or None."""
        key = f"loss {self._search} {self._next_loss}"
        record = self._journal.get(key)
        if record is None or record["at"] != _checksum(c_GN):
            return key, None
        self._next_loss += 1
        values = decode(record["values"]).to(c_GN)
        return key, (values[0], values[1:].view(c_GN.shape))

    def keep_loss(self, key: str, c_GN: Tensor, loss: Tensor, gradient_GN: Tensor) -> None:
        """Queue a loss for the journal; written in groups, because each write waits for the device."""
        self._next_loss += 1
        values = torch.cat([loss.view(1).to(gradient_GN), gradient_GN.flatten()])
        self._pending.append((key, c_GN.detach().clone(), values))
        if time.monotonic() - self._flushed > _FLUSH_INTERVAL:
            self.flush()

    @property
    def halvings(self) -> int:
        """Number of times that an interrupted run halved its batches."""
        return self._journal.get("halvings") or 0

    def halved(self) -> bool:
        """Return whether an interrupted run halved its batches, and so restarted its streams, before the next loss."""
        return self._journal.get(f"halved {self._search} {self._next_loss}", earlier=True) is not None

    def keep_halving(self) -> None:
        """Record that batches are halved from here on."""
        self._journal.put_all({"halvings": self.halvings + 1, f"halved {self._search} {self._next_loss}": True})

    def flush(self) -> None:
        """Write the pending losses."""
        losses = {key: {"at": _checksum(c_GN), "values": encode(values)} for key, c_GN, values in self._pending}
        self._journal.put_all(losses)
        self._pending = []
        self._flushed = time.monotonic()

    def pass_progress(self, key: str) -> PassProgress:
        """Return the progress of the pass with this key."""
        return PassProgress(f"part of {key}", self._journal.get, self._journal.put)

    def score(self, key: str, task: Task | None = None, *, earlier: bool = False) -> Score | None:
        """Return a recorded score, or None.

        Args:
            key: the key, from `score_key` or derived from it.
            task: the task, whose metric a score may need to be resampled.
            earlier: ignore records of this run; only those of an interrupted one count.
        """
        record = self._journal.get(key, earlier=earlier)
        if record is None:
            return None
        if record["each"] and self._journal.get(key, earlier=True):
            self._orders.setdefault(_data_of(key), []).append(record["each"]["order"])
        numbers = {name: None if (text := record[name]) is None else float.fromhex(text) for name in _NUMBERS}
        each = record["each"] and PerExample(**decode(record["each"]))
        score = Score(**numbers, examples=record["examples"], per_example=each, invalid=record["invalid"])  # pyright: ignore[reportArgumentType]
        if record["corpus"] is None:
            return score
        assert task is not None and task.corpus is not None
        corpus = task.corpus()
        corpus.load_state_dict(decode(record["corpus"]))
        sign = -1.0 if task.metric_goal == "min" else 1.0
        return replace(score, resampled=Resampled(corpus, sign), batches=corpus.batches)

    def keep_score(self, key: str, score: Score) -> None:
        """Record a score, with the values that its confidence intervals need.

        Raises:
            TaskError: if it was computed on other data than the interrupted run's scores that it will be compared with.
        """
        self.flush()
        orders = self._orders.get(_data_of(key), [])
        if (
            score.per_example is not None
            and len(orders) > 1
            and set(orders) - {score.per_example.order}
            and len(set(orders)) == 1
        ):
            raise TaskError("the data are not those that the interrupted run scored on", hint="--no-resume starts over")
        corpus = None
        if isinstance(score.resampled, Resampled):
            try:
                corpus = encode(score.resampled.corpus.state_dict(everything=True))
            except TypeError:
                return  # the state of its metric cannot be serialised
        each = score.per_example and {
            column.name: getattr(score.per_example, column.name) for column in fields(score.per_example)
        }
        numbers = {name: None if (x := getattr(score, name)) is None else x.hex() for name in _NUMBERS}
        rest = {"examples": score.examples, "each": encode(each), "corpus": corpus, "invalid": score.invalid}
        self._journal.put(key, numbers | rest)

    def rejected(self, key: str, threshold: float) -> bool:
        """Return whether an interrupted run recorded a score below the threshold."""
        return self._journal.get(f"{key} below {threshold.hex()}", earlier=True) is not None

    def keep_rejected(self, key: str, threshold: float) -> None:
        """Record that a score is below the threshold."""
        self._journal.put(f"{key} below {threshold.hex()}", True)

    def gradient(self, key: str) -> tuple[float, Tensor] | None:
        """Return the mean loss over a split and its gradient as an interrupted run recorded them, or None."""
        record = self._journal.get(key, earlier=True)
        return None if record is None else tuple(decode(record))

    def keep_gradient(self, key: str, value: float, gradient_N: Tensor) -> None:
        """Record the mean loss over a split and its gradient."""
        self._journal.put(key, encode([value, gradient_N]))

    def surrogate(self, key: str) -> Surrogate | None:
        """Return the recorded surrogate, or None."""
        record = self._journal.get(key)
        return None if record is None else Surrogate(**decode(record))

    def keep_surrogate(self, key: str, surrogate: Surrogate) -> None:
        """Record a surrogate."""
        self._journal.put(key, encode({field.name: getattr(surrogate, field.name) for field in fields(surrogate)}))


def _data_of(key: str) -> str:
    """Return the part of a score's key that names its data."""
    return key.rpartition(" ")[0]


def _checksum(c_GN: Tensor) -> int:
    return zlib.crc32(raw(c_GN))


def score_key(coefficients: Coefficients, split: Split, *, exact: bool) -> str:
    """Return the journal key of a mixture's score on a split, from the exact average or from the candidate matrix."""
    text = repr(([[c.hex() for c in row] for row in coefficients.values], coefficients.groups))
    return f"score {split} {exact} {hashlib.sha256(text.encode()).hexdigest()[:32]}"

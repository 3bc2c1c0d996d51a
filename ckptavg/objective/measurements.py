"""What of a run goes into its journal, and how it comes back: scores, and losses with their gradients."""

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

_TOGETHER: Final = 1.0  # seconds of losses that are written at a time
_FIGURES: Final = ("value", "loss", "metric")


class MeasurementLog:
    """Asks a journal before anything is measured, and tells it afterwards.

    Losses are numbered within a search, because a strategy asks for them in one order; a record is used only where it
    was of the same coefficients to the last bit. Numbers keep all their bits.
    """

    def __init__(self, journal: Journal | ReadOnlyJournal) -> None:
        self._journal = journal
        self.folder = journal.folder
        self._search = -1
        self._asked = 0
        self._pending: list[tuple[str, Tensor, Tensor]] = []
        self._orders: dict[str, list[int]] = {}  # of the data of an earlier run's scores
        self._flushed = time.monotonic()

    def restart(self) -> None:
        """Another search begins."""
        self._search += 1
        self._asked = 0

    def loss(self, c_GN: Tensor) -> tuple[str, tuple[Tensor, Tensor] | None]:
        """The key of the next loss, and what is known of it: the loss and its gradient in the shape of c."""
        key = f"loss {self._search} {self._asked}"
        found = self._journal.get(key)
        if found is None or found["at"] != _checksum(c_GN):
            return key, None
        self._asked += 1
        values = decode(found["values"]).to(c_GN)
        return key, (values[0], values[1:].view(c_GN.shape))

    def keep_loss(self, key: str, c_GN: Tensor, loss: Tensor, gradient_GN: Tensor) -> None:
        """Write a loss down, with others, now and then: it waits for the device."""
        self._asked += 1
        values = torch.cat([loss.view(1).to(gradient_GN), gradient_GN.flatten()])
        self._pending.append((key, c_GN.detach().clone(), values))
        if time.monotonic() - self._flushed > _TOGETHER:
            self.flush()

    @property
    def halvings(self) -> int:
        """How often an earlier run had to halve its batches."""
        return self._journal.get("halvings") or 0

    def halved(self) -> bool:
        """Whether an earlier run did so before the next loss, and began its data anew."""
        return self._journal.get(f"halved {self._search} {self._asked}", earlier=True) is not None

    def keep_halving(self) -> None:
        """Write down that batches are half as large from here on."""
        self._journal.put_all({"halvings": self.halvings + 1, f"halved {self._search} {self._asked}": True})

    def flush(self) -> None:
        """Write down what is pending."""
        losses = {key: {"at": _checksum(c_GN), "values": encode(values)} for key, c_GN, values in self._pending}
        self._journal.put_all(losses)
        self._pending = []
        self._flushed = time.monotonic()

    def partial(self, key: str) -> PassProgress:
        """How far the pass over data with this key has come."""
        return PassProgress(f"part of {key}", self._journal.get, self._journal.put)

    def score(self, key: str, task: Task | None = None, *, earlier: bool = False) -> Score | None:
        """What is known of a score.

        Args:
            key: of `score_key`, or the like.
            task: has the metric that a score may need again.
            earlier: only what an earlier run has measured.
        """
        found = self._journal.get(key, earlier=earlier)
        if found is None:
            return None
        if found["each"] and self._journal.get(key, earlier=True):
            self._orders.setdefault(_data_of(key), []).append(found["each"]["order"])
        numbers = {name: None if (text := found[name]) is None else float.fromhex(text) for name in _FIGURES}
        each = found["each"] and PerExample(**decode(found["each"]))
        score = Score(**numbers, examples=found["examples"], per_example=each, invalid=found["invalid"])  # pyright: ignore[reportArgumentType]
        if found["corpus"] is None:
            return score
        assert task is not None and task.corpus is not None
        corpus = task.corpus()
        corpus.load_state_dict(decode(found["corpus"]))
        sign = -1.0 if task.metric_goal == "min" else 1.0
        return replace(score, resampled=Resampled(corpus, sign), batches=corpus.batches)

    def keep_score(self, key: str, score: Score) -> None:
        """Write a score down, with all that intervals need.

        Raises:
            TaskError: if its data are others than those of the earlier run's scores, with which it will be compared.
        """
        self.flush()
        orders = self._orders.get(_data_of(key), [])
        if (
            score.per_example is not None
            and len(orders) > 1
            and set(orders) - {score.per_example.order}
            and len(set(orders)) == 1
        ):
            raise TaskError("the data are not those that the interrupted run scored on", hint="--no-resume begins anew")
        corpus = None
        if isinstance(score.resampled, Resampled):
            try:
                corpus = encode(score.resampled.corpus.state_dict(everything=True))
            except TypeError:
                return  # its metric keeps what cannot be written down
        each = score.per_example and {
            one.name: getattr(score.per_example, one.name) for one in fields(score.per_example)
        }
        figures = {name: None if (x := getattr(score, name)) is None else x.hex() for name in _FIGURES}
        known = {"examples": score.examples, "each": encode(each), "corpus": corpus, "invalid": score.invalid}
        self._journal.put(key, figures | known)

    def rejected(self, key: str, bar: float) -> bool:
        """Whether an earlier run found that a score stays below a bar."""
        return self._journal.get(f"{key} below {bar.hex()}", earlier=True) is not None

    def keep_rejected(self, key: str, bar: float) -> None:
        """Write down that a score stays below a bar."""
        self._journal.put(f"{key} below {bar.hex()}", True)

    def gradient(self, key: str) -> tuple[float, Tensor] | None:
        """What an earlier run found of a loss over a whole split, and of its gradient."""
        found = self._journal.get(key, earlier=True)
        return None if found is None else tuple(decode(found))

    def keep_gradient(self, key: str, value: float, gradient_N: Tensor) -> None:
        """Write both down."""
        self._journal.put(key, encode([value, gradient_N]))

    def surrogate(self, key: str) -> Surrogate | None:
        """What is known of the loss to second order."""
        found = self._journal.get(key)
        return None if found is None else Surrogate(**decode(found))

    def keep_surrogate(self, key: str, surrogate: Surrogate) -> None:
        """Write the loss to second order down."""
        self._journal.put(key, encode({one.name: getattr(surrogate, one.name) for one in fields(surrogate)}))


def _data_of(key: str) -> str:
    """Scores with the same are of the same data."""
    return key.rpartition(" ")[0]


def _checksum(c_GN: Tensor) -> int:
    return zlib.crc32(raw(c_GN))


def score_key(coefficients: Coefficients, split: Split, *, exact: bool) -> str:
    """What the score of a mixture on a split is called: of the exact average, or of the candidate matrix."""
    text = repr(([[c.hex() for c in row] for row in coefficients.values], coefficients.groups))
    return f"score {split} {exact} {hashlib.sha256(text.encode()).hexdigest()[:32]}"

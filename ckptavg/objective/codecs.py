"""The kinds of measurements, as records of the journal. Numbers are stored exactly."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Final, TypeAlias

from torch import Tensor

from ckptavg.coefficients import Coefficients
from ckptavg.errors import TaskError
from ckptavg.journal.tensor_json import decode, encode
from ckptavg.score import PerExample, Score, Split, sign
from ckptavg.surrogate import Surrogate
from ckptavg.tasks import Task
from ckptavg.tasks.torch_metrics import Resampled

ScoreKey: TypeAlias = tuple[Coefficients, Split, bool]
"""Coefficients, split, and whether the exact average is scored or the mixture of the candidate matrix."""
_NUMBERS: Final = ("value", "loss", "metric", "loss_noise")


def score_name(key: ScoreKey, candidates: Sequence[str] = ()) -> str:
    """Return the journal key of a score: split, exactness, and a digest of candidates and their coefficients.

    ``candidates`` are the names of all N; without them they are numbered. An exact score depends on the selected ones
    only, a score of the candidate matrix on all of them: their differences from the mean are what is rounded.
    """
    coefficients, split, exact = key
    names = candidates or [str(i) for i in range(coefficients.n)]
    used = coefficients.selected if exact else range(coefficients.n)
    columns = [(names[i], [row[i].hex() for row in coefficients.values]) for i in used]
    text = repr((columns, coefficients.groups))
    return f"score {split} {exact} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


class ScoreCodec:
    """A score with the values that its confidence intervals need.

    Args:
        task: the task, whose metric a score may need to be resampled; None for scores without values per example.
        candidates: see `score_name`.
        prefix: tells scores of the output file, whose dtype may differ from the candidates', from those of mixtures.
    """

    def __init__(self, task: Task | None, candidates: Sequence[str] = (), prefix: str = "") -> None:
        self._task = task
        self._candidates = candidates
        self._prefix = prefix
        # split and exactness → `PerExample.order` of each score of an interrupted run
        self._orders: dict[tuple[Split, bool], list[int]] = {}

    def name(self, key: ScoreKey) -> str:
        """See `Codec.name`."""
        return self._prefix + score_name(key, self._candidates)

    def encode(self, key: ScoreKey, value: Score) -> Any:
        """See `Codec.encode`.

        Raises:
            TaskError: if it was computed on other data than the interrupted run's scores that it will be compared with.
        """
        if value.invalid and self._task is None:
            return None  # a command that failed is tried again
        each, orders = value.per_example, self._orders.get(key[1:], [])
        if each is not None and len(orders) > 1 and len(set(orders)) == 1 and orders[0] != each.order:
            raise TaskError("the data are not those that the interrupted run scored on", hint="--no-resume starts over")
        try:
            return self._encode(value)
        except TypeError:
            return None  # the state of its metric cannot be serialised

    def _encode(self, value: Score) -> Any:
        each, resampled = value.per_example, value.resampled
        corpus = encode(resampled.corpus.state_dict()) if isinstance(resampled, Resampled) else None
        numbers = {name: None if (x := getattr(value, name)) is None else x.hex() for name in _NUMBERS}
        rest = {"examples": value.examples, "corpus": corpus, "invalid": value.invalid, "name": value.name}
        others = {name: self._encode(score) for name, score in value.others.items()}
        return numbers | rest | {"each": each and encode(vars(each)), "others": others}

    def decode(self, key: ScoreKey, record: Any) -> Score:
        """See `Codec.decode`."""
        score = self._decode(record)
        if score.per_example is not None:
            self._orders.setdefault(key[1:], []).append(score.per_example.order)
        return score

    def _decode(self, record: Any) -> Score:
        each = record["each"] and PerExample(**decode(record["each"]))
        numbers: dict[str, Any] = {name: record[name] and float.fromhex(record[name]) for name in _NUMBERS}
        others = {name: self._decode(other) for name, other in record["others"].items()}
        plain = {field: record[field] for field in ("examples", "invalid", "name")}
        score = Score(**numbers, **plain, per_example=each, others=others)
        if record["corpus"] is None:
            return score
        assert self._task is not None and self._task.corpus is not None
        corpus = self._task.corpus()[score.name]
        corpus.load_state_dict(decode(record["corpus"]))
        resampled = Resampled(corpus, sign(self._task.metric_goal, score.name))
        return replace(score, resampled=resampled, batches=corpus.batches)


class GradientCodec:
    """The examples [F] and mean losses [F] of the folds of a split at a mixture, and their gradients [F, N]."""

    def name(self, key: tuple[Coefficients, Split, int]) -> str:
        """See `Codec.name`."""
        return f"gradients {key[2]} {score_name((*key[:2], False))}"

    def encode(self, key: tuple[Coefficients, Split, int], value: tuple[Tensor, Tensor, Tensor]) -> Any:
        """See `Codec.encode`."""
        return encode(value)

    def decode(self, key: tuple[Coefficients, Split, int], record: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `Codec.decode`."""
        examples_F, value_F, gradient_FN = decode(record)
        return examples_F, value_F, gradient_FN


class SurrogateCodec:
    """The surrogate on a split, or some examples of it, with one kind of second derivatives."""

    def name(self, key: tuple[Split, str, int | None]) -> str:
        """See `Codec.name`."""
        return f"surrogate {' '.join(str(part) for part in key if part is not None)}"

    def encode(self, key: tuple[Split, str, int | None], value: Surrogate) -> Any:
        """See `Codec.encode`."""
        return encode({field.name: getattr(value, field.name) for field in fields(value)})

    def decode(self, key: tuple[Split, str, int | None], record: Any) -> Surrogate:
        """See `Codec.decode`."""
        return Surrogate(**decode(record))

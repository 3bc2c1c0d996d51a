"""What a language model has answered of one score, kept now and then: an interrupted score asks for the rest only.

lm-evaluation-harness sorts the requests and answers them in batches of that order, whose composition has a say in the
last bits of an answer. Whole batches from the front are known, so the rest falls into the batches it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ckptavg.journal.pass_progress import PassProgress
from ckptavg.runtime import signals

if TYPE_CHECKING:
    from torch import nn

_METHODS: Final = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@contextmanager
def cached_answers(lm: Any, model: nn.Module, partial: PassProgress) -> Generator[None]:
    """Within, ``lm`` answers from ``partial`` what is known there, and a signal ends it before the next forward pass.

    Args:
        lm: the harness's view of the model.
        model: the model.
        partial: of this score.
    """
    answers = _Answers(partial)
    before = lm.cache_hook
    lm.cache_hook = answers
    for name in _METHODS:
        setattr(lm, name, answers.asking(name, getattr(lm, name)))
    handle = model.register_forward_pre_hook(answers.batch_is_done)
    try:
        yield
    finally:
        handle.remove()
        lm.cache_hook = before
        for name in _METHODS:
            delattr(lm, name)


class _Answers:
    """In the place of the harness's cache: it is told each answer."""

    def __init__(self, partial: PassProgress) -> None:
        self._partial = partial
        self._known: dict[str, list[Any]] = {}
        self._new: list[tuple[str, Any]] = []
        self._count = 0
        for part in partial.states:
            for key, answer in part:
                self._known.setdefault(key, []).append(tuple(answer) if isinstance(answer, list) else answer)
                self._count += 1

    def add_partial(self, method: str, request: Any, answer: Any) -> None:
        """A request has been answered; the others of its batch may not have been yet."""
        self._new.append((_key(method, request), answer))

    def batch_is_done(self, *_: object) -> None:
        """The model is about to run again."""
        if self._new and (self._partial.should_save() or signals.pending()):
            self._count += len(self._new)
            self._partial.keep(self._count, self._new)
            self._new = []
        signals.check()

    def asking(self, method: str, ask: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """``ask``, but for what is known; of equal requests the first ones are."""

        def asked(requests: Sequence[Any], **options: Any) -> list[Any]:
            known = {key: iter(answers) for key, answers in self._known.items()}
            found = [next(known.get(_key(method, request.args), iter(())), None) for request in requests]
            rest = [request for request, answer in zip(requests, found, strict=True) if answer is None]
            answers = iter(ask(rest, **options) if rest else [])
            return [next(answers) if answer is None else answer for answer in found]

        return asked


def _key(method: str, request: Any) -> str:
    return json.dumps([method, request], default=repr)

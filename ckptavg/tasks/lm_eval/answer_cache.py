"""Periodically saved answers of a language model during one score, so that an interrupted score resumes.

lm-evaluation-harness sorts the requests and answers them in batches of that order; the composition of a batch affects
the last bits of an answer. Only whole leading batches are saved, so the remaining requests form the same batches.
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
    """Make ``lm`` reuse the answers saved in ``partial``, save new ones, and stop on signals before a forward pass.

    Args:
        lm: the harness's language model object.
        model: the underlying module.
        partial: the saved progress of this score.
    """
    answers = _Answers(partial)
    before = lm.cache_hook
    lm.cache_hook = answers
    for name in _METHODS:
        setattr(lm, name, answers.with_cache(name, getattr(lm, name)))
    handle = model.register_forward_pre_hook(answers.before_forward)
    try:
        yield
    finally:
        handle.remove()
        lm.cache_hook = before
        for name in _METHODS:
            delattr(lm, name)


class _Answers:
    """Replacement of the harness's cache hook, which receives each answer."""

    def __init__(self, partial: PassProgress) -> None:
        self._partial = partial
        self._saved: dict[str, list[Any]] = {}
        self._new: list[tuple[str, Any]] = []
        self._count = 0
        for part in partial.states:
            for key, answer in part:
                self._saved.setdefault(key, []).append(tuple(answer) if isinstance(answer, list) else answer)
                self._count += 1

    def add_partial(self, method: str, request: Any, answer: Any) -> None:
        """Record the answer to a request; other requests of its batch may still be unanswered."""
        self._new.append((_key(method, request), answer))

    def before_forward(self, *_: object) -> None:
        """Save the answers if it is time, and handle signals; the previous batch is complete at this point."""
        if self._new and (self._partial.should_save() or signals.pending()):
            self._count += len(self._new)
            self._partial.keep(self._count, self._new)
            self._new = []
        signals.check()

    def with_cache(self, method: str, compute: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """Wrap ``compute`` to skip requests with saved answers; equal requests use them in order."""

        def answer_requests(requests: Sequence[Any], **options: Any) -> list[Any]:
            saved = {key: iter(answers) for key, answers in self._saved.items()}
            cached = [next(saved.get(_key(method, request.args), iter(())), None) for request in requests]
            rest = [request for request, answer in zip(requests, cached, strict=True) if answer is None]
            computed = iter(compute(rest, **options) if rest else [])
            return [next(computed) if answer is None else answer for answer in cached]

        return answer_requests


def _key(method: str, request: Any) -> str:
    return json.dumps([method, request], default=repr)

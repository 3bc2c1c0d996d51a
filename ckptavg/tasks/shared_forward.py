"""One forward pass for the loss, the metric and the predictions of a batch."""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final

from torch import Tensor

from ckptavg.errors import TaskError
from ckptavg.tasks import batch as batches

USERS: Final = ("loss", "metric", "predict")  # functions that get the result of forward()


class SharedForward:
    """Runs a forward pass once for all functions of a batch inside `one_batch`, and at every call outside."""

    def __init__(self) -> None:
        self._results: list[Any] | None = None

    @contextmanager
    def one_batch(self) -> Generator[bool]:
        """Share a forward pass in the context, in which all calls are about one batch and the same weights."""
        self._results = []
        try:
            yield True
        finally:
            self._results = None

    def __call__(self, forward: Callable[[], Any]) -> Any:
        """Return the result of ``forward``."""
        if self._results is None:
            return forward()
        if not self._results:
            self._results.append(forward())
        return self._results[0]

    @contextmanager
    def unchanged(self, output: Any, function: str, source: str) -> Generator[None]:
        """Raise TaskError if ``function`` changes a shared result in place: the next function would get another one."""
        before = self._results and _versions(output)
        yield
        if before and _versions(output) != before:
            message = f"{function}() changes the result of forward() in place, which other functions get too"
            raise TaskError(message, path=source, hint="change a copy: .clone()")


def checked_forward(module: Any, source: str) -> Callable[[Any, Any], Any] | None:
    """Return the function ``forward(model, batch)`` of a task file, or None if it has none.

    Raises:
        TaskError: if it does not take (model, batch), or one of its `USERS` takes the model.
    """
    forward = getattr(module, "forward", None)
    if not callable(forward):
        return None
    taken = _parameters(forward)
    if taken is not None and len(taken) != 2:
        hint = "loss(output, batch), metric and predict get its result; rename it if it is for something else"
        raise TaskError(f"forward() must take (model, batch), not ({', '.join(taken)})", path=source, hint=hint)
    for name in USERS:
        function = getattr(module, name, None)
        own = _parameters(function) if inspect.isfunction(function) else None
        if taken and own and own[0] == taken[0]:
            message = f"{name}({', '.join(own)}) takes the model, but it gets the result of forward()"
            hint = f"{name}({', '.join(['output', *own[1:]])}), or another name for forward()"
            raise TaskError(message, path=source, hint=hint)
    return forward


def _parameters(function: Any) -> list[str] | None:
    """Return the names of the parameters that need a value; None if they are unknown or any number is taken."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


def _versions(output: Any) -> list[int]:
    tensors = (leaf for leaf in batches.leaves(output) if isinstance(leaf, Tensor))
    return [tensor._version for tensor in tensors if not tensor.is_inference()]

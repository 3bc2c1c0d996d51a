"""How the model's passes are computed while searching: in which precision, and whether compiled."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from ckptavg.errors import UsageError, is_out_of_memory

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
OWN: Final = "float32"  # no autocast: a model of another dtype keeps it


def precision(asked: str, device: torch.device) -> str:
    """``float32`` or ``bfloat16``: what ``asked`` means on this device.

    ``auto`` is bfloat16 where a GPU computes in it. A CPU may have it and be slower in it: there it must be asked for.

    Raises:
        UsageError: if the device has no bfloat16.
    """
    has = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if asked == "auto":
        return "bfloat16" if has and device.type == "cuda" else OWN
    if asked != OWN and not has:
        raise UsageError(f"--precision {asked}: {device} does not compute in it", hint="--precision float32, or auto")
    return asked


def autocast(to: str, device: torch.device) -> AbstractContextManager[Any]:
    """The model's own precision, or matrix products and convolutions in bfloat16; weights stay as they are."""
    return nullcontext() if to == OWN else torch.autocast(device.type, dtype=torch.bfloat16)


class Compiled:
    """A model whose ``forward`` goes through torch.compile, and through Python again where that fails.

    The weights stay where they are: what is compiled reads the same parameters, and its backward pass adds to the same
    gradients. Graphs are made as they are needed, for a few shapes of batches and with and without gradients.

    Attributes:
        failure: why it was given up, in one line; None as long as it was not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.failure: str | None = None
        self._paused = False
        plain = model.forward
        with _quiet():
            fast = torch.compile(plain)

        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._paused or self.failure is not None:
                return plain(*args, **kwargs)
            try:
                with _quiet():
                    return fast(*args, **kwargs)
            except Exception as error:  # of any kind: whether it is the model's own, the plain call shows
                if is_out_of_memory(error):
                    raise
                result = plain(*args, **kwargs)
                self.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                return result

        model.forward = forward

    @contextmanager
    def paused(self) -> Generator[None]:
        """The plain model: for derivatives that a compiled graph does not have."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


@contextmanager
def _quiet() -> Generator[None]:
    """Without what torch says of its own use of TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield

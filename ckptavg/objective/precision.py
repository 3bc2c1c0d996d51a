"""Precision and compilation of the model's passes during a search."""

import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Final

import torch
from torch import nn

from ckptavg.errors import UsageError, is_out_of_memory

OWN: Final = "float32"  # no autocast: a model of another dtype keeps its own


def precision(asked: str, device: torch.device) -> str:
    """Resolve ``asked`` to ``float32`` or ``bfloat16`` on this device.

    ``auto`` is bfloat16 on a GPU with native support. On a CPU, where bfloat16 may be slower, it is float32.

    Raises:
        UsageError: if the device does not support bfloat16.
    """
    on_cuda = device.type == "cuda"
    supported = device.type == "cpu" or (on_cuda and torch.cuda.is_bf16_supported(including_emulation=False))
    if asked == "auto":
        return "bfloat16" if supported and on_cuda else OWN
    if asked != OWN and not supported:
        raise UsageError(f"--precision {asked}: {device} does not support it", hint="--precision float32, or auto")
    return asked


def autocast(to: str, device: torch.device) -> AbstractContextManager[Any]:
    """Run matrix products and convolutions in bfloat16, or all in the model's own precision; weights are unchanged."""
    return nullcontext() if to == OWN else torch.autocast(device.type, dtype=torch.bfloat16)


class Compiled:
    """A model whose ``forward`` goes through torch.compile, and falls back to the plain model if that fails.

    The weights are shared: the compiled code reads the same parameters, and its backward pass adds to the same
    gradients. Graphs are compiled on demand, per batch shape and with or without gradients.

    Attributes:
        failure: the reason for falling back, in one line; None while compiled code is in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.failure: str | None = None
        self._paused = False
        plain = model.forward
        with quiet():
            fast = torch.compile(plain)

        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._paused or self.failure is not None:
                return plain(*args, **kwargs)
            try:
                with quiet():
                    return fast(*args, **kwargs)
            except Exception as error:  # any kind: an error of the model itself is raised again by the plain call
                if is_out_of_memory(error):
                    raise
                result = plain(*args, **kwargs)
                self.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                return result

        model.forward = forward

    @contextmanager
    def paused(self) -> Generator[None]:
        """Run the plain model: for derivatives that a compiled graph does not have."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


@contextmanager
def quiet() -> Generator[None]:
    """Suppress torch's warnings about its own use of TorchScript, and its advice to give up digits for speed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)
        yield

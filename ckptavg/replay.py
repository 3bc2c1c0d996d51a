"""What of a run goes into its journal, and how it comes back: scores, and losses with their gradients."""

from __future__ import annotations

import base64
import hashlib
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ckptavg import copies
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import Coefficients
from ckptavg.journal import Journal
from ckptavg.objective import Each, Score, Split
from ckptavg.readers.regular_file import is_file

_TOGETHER: Final = 1.0  # seconds of losses that are written at a time


class Replay:
    """Asks a journal before anything is measured, and tells it afterwards.

    Losses are numbered within a search, because a strategy asks for them in one order; a record is used only where it
    was of the same coefficients to the last bit. Numbers keep all their bits.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._search = -1
        self._asked = 0
        self._pending: list[tuple[str, Tensor, Tensor]] = []
        self._flushed = time.monotonic()

    def restart(self) -> None:
        """Another search begins."""
        self._search += 1
        self._asked = 0

    def loss(self, c_GN: Tensor) -> tuple[str, tuple[Tensor, Tensor] | None]:
        """The key of the next loss, and what is known of it: the loss and its gradient in the shape of c."""
        key = f"loss {self._search} {self._asked}"
        self._asked += 1
        found = self._journal.get(key)
        if found is None or found["at"] != _checksum(c_GN):
            return key, None
        values = _tensor(found["values"]).to(c_GN)
        return key, (values[0], values[1:].view(c_GN.shape))

    def keep_loss(self, key: str, c_GN: Tensor, loss: Tensor, gradient_GN: Tensor) -> None:
        """Write a loss down, with others, now and then: it waits for the device."""
        values = torch.cat([loss.view(1).to(gradient_GN), gradient_GN.flatten()])
        self._pending.append((key, c_GN.detach().clone(), values))
        if time.monotonic() - self._flushed > _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write down what is pending."""
        for key, c_GN, values in self._pending:
            self._journal.put(key, {"at": _checksum(c_GN), "values": _text(values)})
        self._pending = []
        self._flushed = time.monotonic()

    def score(self, coefficients: Coefficients, split: Split, *, exact: bool) -> Score | None:
        """What is known of a score."""
        found = self._journal.get(_key(coefficients, split, exact))
        if found is None:
            return None
        each = found["each"] and Each(
            values_U=_tensor(found["each"]["values"]),
            losses_U=_tensor(found["each"]["losses"]),
            examples_U=_tensor(found["each"]["examples"]),
            order=found["each"]["order"],
        )
        loss, metric = (None if found[name] is None else float.fromhex(found[name]) for name in ("loss", "metric"))
        return Score(
            value=float.fromhex(found["value"]), loss=loss, metric=metric, examples=found["examples"], each=each,
            invalid=found["invalid"],
        )  # fmt: skip

    def keep_score(self, coefficients: Coefficients, split: Split, score: Score, *, exact: bool) -> None:
        """Write a score down, unless it depends on more than numbers."""
        self.flush()
        if score.resampled is not None:
            return
        self._journal.put(
            _key(coefficients, split, exact),
            {
                "value": score.value.hex(),
                "loss": None if score.loss is None else score.loss.hex(),
                "metric": None if score.metric is None else score.metric.hex(),
                "examples": score.examples,
                "invalid": score.invalid,
                "each": score.each
                and {
                    "values": _text(score.each.values_U),
                    "losses": _text(score.each.losses_U),
                    "examples": _text(score.each.examples_U),
                    "order": score.each.order,
                },
            },
        )


def fingerprint(
    checkpoints: Sequence[Checkpoint], settings: Mapping[str, Any], sources: Sequence[Path | str | None]
) -> dict[str, Any]:
    """What must be the same for a journal to be of the same run.

    Args:
        checkpoints: the candidates; told apart by name, size and a digest of their names, shapes and samples.
        settings: of the strategy and of the run.
        sources: the task and the data; files by the SHA-256 of their content, all else by name.
    """
    return {
        "candidates": [[one.name, one.size, copies.digest(one).hex()[:16]] for one in checkpoints],
        "torch": torch.__version__,
        **{name: repr(value) for name, value in settings.items()},
        "task": [_of_file(source) for source in sources if source is not None],
    }


def _of_file(source: Path | str) -> str:
    path = Path(source)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if is_file(path) else str(source)
    except OSError:  # whoever needs it says why it cannot be read
        return str(source)


def _checksum(c_GN: Tensor) -> int:
    return zlib.crc32(_bytes(c_GN.detach().to("cpu", torch.float64)))


def _key(coefficients: Coefficients, split: Split, exact: bool) -> str:
    text = repr(([[c.hex() for c in row] for row in coefficients.values], coefficients.groups))
    return f"score {split} {exact} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _bytes(tensor: Tensor) -> bytes:
    data = bytearray(tensor.numel() * 8)
    if data:
        torch.frombuffer(data, dtype=torch.float64).copy_(tensor.flatten())
    return bytes(data)


def _text(tensor: Tensor) -> str:
    return base64.b64encode(_bytes(tensor.detach().to("cpu", torch.float64))).decode()


def _tensor(text: str) -> Tensor:
    data = bytearray(base64.b64decode(text))
    return torch.frombuffer(data, dtype=torch.float64) if data else torch.empty(0, dtype=torch.float64)

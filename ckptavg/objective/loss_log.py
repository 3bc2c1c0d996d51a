"""Losses and gradients of a search in the journal."""

import hashlib

import torch
from torch import Tensor

from ckptavg.coefficients import Groups
from ckptavg.journal import Journal, ReadOnlyJournal
from ckptavg.journal.tensor_json import decode, encode, raw
from ckptavg.score import Split


class LossLog:
    """The losses of a search, numbered in the order in which its strategy requests them, which is fixed.

    A record is used only if its batch and coefficients are equal, to the last bit. Coefficients are read from the
    device later, in groups, because that waits for it.
    """

    def __init__(self, journal: Journal | ReadOnlyJournal) -> None:
        self._journal = journal
        self.restart("")

    def restart(self, search: str) -> None:
        """Start the search of the strategy that ``search`` describes with its settings."""
        self._search = hashlib.sha256(search.encode()).hexdigest()[:16]
        self._number = 0

    def find(self, c_GN: Tensor, batch: tuple[Split, int, Groups]) -> tuple[Tensor, Tensor] | None:
        """Return the next loss and its gradient in the shape of c, as an interrupted run recorded them, or None.

        Args:
            c_GN: the coefficients.
            batch: the split, the number of its batch, and the groups of ``c_GN``.
        """
        record = self._journal.get(self._key(), earlier=True)
        if record is None or record["at"] != _digest(c_GN, batch):
            return None
        self._number += 1
        values = decode(record["values"]).to(c_GN)
        return values[0], values[1:].view(c_GN.shape)

    def keep(self, c_GN: Tensor, batch: tuple[Split, int, Groups], loss: Tensor, gradient_GN: Tensor) -> None:
        """Record the next loss."""
        values, at = torch.cat([loss.view(1).to(gradient_GN), gradient_GN.flatten()]), c_GN.detach().clone()
        self._journal.defer(self._key(), lambda: {"at": _digest(at, batch), "values": encode(values)})
        self._number += 1

    @property
    def halvings(self) -> int:
        """Number of times that batches were halved."""
        return self._journal.get("halvings") or 0

    def halved(self) -> bool:
        """Return whether an interrupted run halved its batches, and so restarted its streams, before the next loss."""
        return self._journal.get(f"halved {self._key()}", earlier=True) is not None

    def keep_halving(self) -> None:
        """Record that batches are halved from here on."""
        self._journal.flush()  # the losses before it
        self._journal.put_all({"halvings": self.halvings + 1, f"halved {self._key()}": True})

    def _key(self) -> str:
        return f"loss {self._search} {self._number}"


def _digest(c_GN: Tensor, batch: tuple[Split, int, Groups]) -> str:
    return hashlib.sha256(repr(batch).encode() + raw(c_GN)).hexdigest()[:16]

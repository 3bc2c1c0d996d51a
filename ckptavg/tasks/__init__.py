"""Tasks: the model, data, loss and metric that candidates are scored with. One file per kind of task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ckptavg.journal.pass_progress import PassProgress
    from ckptavg.score import Score, Split
    from ckptavg.tasks.torch_metrics import CorpusMetric


class Task(Protocol):
    """Model, data, loss and metric of a training job; exceptions raised by its code are re-raised as TaskError."""

    @property
    def source(self) -> str:
        """Path or module name of the task, as shown in the report."""
        ...

    @property
    def metric(self) -> Callable[[nn.Module, Any], Tensor] | None:
        """Metric function returning one value per example, or a mean; None if the task has only a loss."""
        ...

    @property
    def metric_goal(self) -> str:
        """Direction of the metric: ``max`` if larger is better, ``min`` if smaller is."""
        ...

    @property
    def metric_bounds(self) -> tuple[float, float] | None:
        """Lower and upper bound of the metric for one example; None if unknown."""
        ...

    @property
    def corpus(self) -> Callable[[], CorpusMetric] | None:
        """Factory of a metric that is not a mean over examples, such as an F1 score; None if the task has none."""
        ...

    @property
    def whole(self) -> Callable[[nn.Module, PassProgress], Score] | None:
        """Function that scores a model without per-batch losses and saves its progress; None for batched tasks."""
        ...

    def model(self) -> nn.Module:
        """Return a model whose state dict has the checkpoints' names and shapes; its values do not matter."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch, or one loss per example [B]."""
        ...

    def has(self, split: Split) -> bool:
        """Return whether the task has data for this split."""
        ...

    def batches(self, split: Split) -> Iterator[Any]:
        """Iterate once over the batches of a split."""
        ...

    def examples(self, split: Split) -> int | None:
        """Return the number of examples of a split; None if unknown without reading it."""
        ...

    def halve(self) -> bool:
        """Halve the batch size after running out of memory; return False if it cannot be halved."""
        ...

    def length(self, split: Split) -> int | None:
        """Return the number of batches of a split; None if unknown without reading it."""
        ...

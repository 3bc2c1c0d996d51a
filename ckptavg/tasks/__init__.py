"""Tasks: the model, data, loss and metric that candidates are scored with. One file per kind of task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from ckptavg.score import METRIC

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ckptavg.score import Score, Split
    from ckptavg.tasks.batch import Batch
    from ckptavg.tasks.torch_metrics import CorpusMetric


class Task(Protocol):
    """Model, data, loss and metric of a training job; exceptions raised by its code are re-raised as TaskError.

    Attributes:
        source: path or module name of the task, as shown in the report.
        metric: function returning one value per example, or a mean, or several of these by name; None if the task has
            only a loss.
        metric_name: the name of a metric that is returned without one, for reports.
        metric_key: the name of the metric that decides; None for the first of ``metric`` or ``corpus``, else −loss.
        metric_goal: ``max`` if a larger metric is better, ``min`` if a smaller one is; or goals by name.
        metric_bounds: lower and upper bound of the deciding metric for one example; None if unknown.
        corpus: factory of metrics by name that are not means over examples, such as an F1 score; None if the task has
            none.
        predict: function returning the metrics of the model's class probabilities by name, one value per example: see
            `ckptavg.tasks.probabilities`; None if the task has none.
        probabilities: function returning the class probabilities [B, C] themselves and the labels [B]; None if the task
            has none, or if ``predict`` gives none.
        whole: function that scores a model without per-batch losses; None for batched tasks.
    """

    source: str
    metric: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]] | None = None
    metric_name: str = METRIC
    metric_key: str | None = None
    metric_goal: str | Mapping[str, str] = "max"
    metric_bounds: tuple[float, float] | None = None
    corpus: Callable[[], Mapping[str, CorpusMetric]] | None = None
    predict: Callable[[nn.Module, Any], Mapping[str, Tensor]] | None = None
    probabilities: Callable[[nn.Module, Any], tuple[Tensor, Tensor] | None] | None = None
    whole: Callable[[nn.Module], Score] | None = None

    def model(self) -> nn.Module:
        """Return a model whose state dict has the checkpoints' names and shapes; its values do not matter."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch, or one loss per example [B]."""
        ...

    def shared_forward(self) -> AbstractContextManager[bool]:
        """Let the functions of one batch share a forward pass in the context; False if each one runs the model."""
        return nullcontext(False)

    def has(self, split: Split) -> bool:
        """Return whether the task has data for this split."""
        ...

    def batches(self, split: Split) -> Iterator[Any]:
        """Iterate once over the batches of a split."""
        ...

    def sized_batches(self, split: Split) -> Iterator[Batch]:
        """Iterate once over the batches of a split, each with its number of examples; TaskError if it is unclear."""
        from ckptavg.tasks.batch import Batch, size

        for batch in self.batches(split):
            yield Batch(batch, size(batch))

    def examples(self, split: Split) -> int | None:
        """Return the number of examples of a split; None if unknown without reading it."""

    def length(self, split: Split) -> int | None:
        """Return the number of batches of a split; None if unknown without reading it."""

    def positions(self, split: Split) -> Sequence[int] | None:
        """Return the place in its file of each example of a pass; None if the loader's order is kept."""

    def unpadded(self, batch: Any) -> Any:
        """Return the content of the examples of a batch, without what depends on the others, such as padding."""
        return batch

    def halve(self) -> bool:
        """Halve the batch size after running out of memory; return False if it cannot be halved."""
        return False

"""What says how good a model is: the task. One file a kind of task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ckptavg.journal.pass_progress import PassProgress
    from ckptavg.score import Score, Split
    from ckptavg.tasks.torch_metrics import CorpusMetric


class Task(Protocol):
    """Model, data, loss and metric of a training job; whatever its code raises comes out as a TaskError."""

    @property
    def source(self) -> str:
        """Where it comes from, as the report names it."""
        ...

    @property
    def metric(self) -> Callable[[nn.Module, Any], Tensor] | None:
        """One value an example, or a mean; None where the loss is all there is."""
        ...

    @property
    def metric_goal(self) -> str:
        """``max`` where a larger metric is better, ``min`` where a smaller one is."""
        ...

    @property
    def metric_bounds(self) -> tuple[float, float] | None:
        """The least and greatest value the metric can have for an example; None where that is not known."""
        ...

    @property
    def corpus(self) -> Callable[[], CorpusMetric] | None:
        """Makes a metric that is no mean over examples, such as an F1 score; None where there is none."""
        ...

    @property
    def whole(self) -> Callable[[nn.Module, PassProgress], Score] | None:
        """Scores a model as a whole, where there are no losses of batches; keeps what of it is known already."""
        ...

    def model(self) -> nn.Module:
        """A model whose state dict has the checkpoints' names and shapes; its values do not matter."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, or one value for each example [B]."""
        ...

    def has(self, split: Split) -> bool:
        """Whether there is data of this split."""
        ...

    def batches(self, split: Split) -> Iterator[Any]:
        """One pass over the data of a split."""
        ...

    def examples(self, split: Split) -> int | None:
        """How many examples a split has, where that is known without reading it."""
        ...

    def halve(self) -> bool:
        """Make batches half as large because memory ran out; False where they cannot be."""
        ...

    def length(self, split: Split) -> int | None:
        """How many batches a split has, where that is known without reading it."""
        ...

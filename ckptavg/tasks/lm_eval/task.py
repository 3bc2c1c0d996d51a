"""Task scored by lm-evaluation-harness on the model in memory; no candidate is written to disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ckptavg.errors import TaskError
from ckptavg.score import Score, Split
from ckptavg.tasks.hugging_face.architecture import Adapter, ModelFolder
from ckptavg.tasks.lm_eval.harness import Harness


class LmEvalTask:
    """Task over the model and tokenizer of a Hugging Face directory, scored as a whole; it has no loss.

    Args:
        folder: directory with config.json and the tokenizer, or a PEFT adapter.
        tasks, batch_size, seed: see `ckptavg.tasks.lm_eval.harness.Harness`.
        trust_remote_code: run model code in the directory.
    Raises:
        UsageError: if the harness is not installed, or has no such task.
        TaskError: if the directory has no supported model, or no tokenizer.
    """

    metric = None
    metric_goal = "max"
    metric_bounds = None
    corpus = None

    def __init__(
        self, folder: Path, tasks: Sequence[str], *, batch_size: int = 8, seed: int = 0, trust_remote_code: bool = False
    ) -> None:
        self.source = str(folder)
        self._harness = Harness(tasks, batch_size=batch_size, seed=seed)
        self._folder = ModelFolder(folder, trust=trust_remote_code)
        self._tokenizer = self._folder.tokenizer()

    def model(self) -> nn.Module:
        """See `Task.model` and `ModelFolder.build`."""
        return self._folder.build()

    def whole(self, model: nn.Module) -> Score:
        """See `Task.whole`."""
        return self._harness.score(model.model if isinstance(model, Adapter) else model, self._tokenizer)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Raise TaskError: the harness has no loss."""
        raise TaskError("lm-evaluation-harness has no loss to optimize", path=self.source)

    def has(self, split: Split) -> bool:
        """See `Task.has`; the harness's data counts as validation data."""
        return split == "val"

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; always empty."""
        return iter(())

    def examples(self, split: Split) -> int | None:
        """See `Task.examples`; unknown before a score."""
        return None

    def length(self, split: Split) -> int | None:
        """See `Task.length`; there are no batches."""
        return None

    def halve(self) -> bool:
        """See `Task.halve`; always False, since the user sets the harness's batch size."""
        return False

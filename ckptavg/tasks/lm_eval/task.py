"""Task scored by lm-evaluation-harness on the model in memory; no candidate is written to disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ckptavg.errors import TaskError
from ckptavg.journal.pass_progress import PassProgress
from ckptavg.score import Score, Split
from ckptavg.tasks.hugging_face.architecture import architecture, base, build, offline, transformers
from ckptavg.tasks.hugging_face.peft_module import Adapter
from ckptavg.tasks.lm_eval.harness import Harness


class LmEvalTask:
    """Task over the model and tokenizer of a Hugging Face directory, scored as a whole; it has no loss.

    Args:
        folder: directory with config.json and the tokenizer, or a PEFT adapter.
        tasks: task names of the harness; see `ckptavg.tasks.lm_eval.harness.Harness`.
        batch_size: batch size of the forward passes.
        seed: seed of the few-shot examples.
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
        self._folder = folder
        self._trust = trust_remote_code
        self._harness = Harness(tasks, batch_size=batch_size, seed=seed)
        self._harness.check()
        self._base = base(folder)
        with offline():
            self._kind = architecture(self._base, self.source, trust=trust_remote_code)
            self._config = self._load("AutoConfig", self._base)
            has_tokenizer = any(folder.glob("tokenizer*"))
            self._tokenizer = self._load("AutoTokenizer", str(folder) if has_tokenizer else self._base)

    def model(self) -> nn.Module:
        """See `Task.model`."""
        is_adapter = self._base != self.source
        with offline():
            model = build(self._base, self._kind, self._config, trust=self._trust, weights=is_adapter)
            return Adapter(model, self._folder) if is_adapter else model

    def whole(self, model: nn.Module, partial: PassProgress) -> Score:
        """See `Task.whole`."""
        measured = self._harness.score(
            getattr(model, "model", model) if isinstance(model, Adapter) else model, self._tokenizer, partial
        )
        return Score(
            value=measured.value,
            loss=None,
            metric=measured.value,
            examples=measured.examples,
            per_example=measured.each,
        )

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

    def _load(self, auto: str, place: str) -> Any:
        try:
            auto_class = getattr(transformers(), auto)
            return auto_class.from_pretrained(place, local_files_only=True, trust_remote_code=self._trust)
        except (OSError, ValueError) as error:
            message = f"{auto}: {str(error).strip().splitlines()[0]}"
            raise TaskError(message, path=self.source, hint="copy tokenizer.json beside config.json") from error

"""A task that lm-evaluation-harness scores: the model stays where it is, and no candidate is written for it."""

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
    """The model and tokenizer of a Hugging Face directory, scored as a whole; there is no loss.

    Args:
        folder: has config.json and the tokenizer, or is a PEFT adapter.
        tasks: names of the harness; see `ckptavg.tasks.lm_eval.harness.Harness`.
        batch_size: of its forward passes.
        seed: of its few-shot examples.
        trust_remote_code: run model code that lies in the directory.
    Raises:
        UsageError: if a task is not known, or the harness is not installed.
        TaskError: if there is no such model or tokenizer.
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
            own = any(folder.glob("tokenizer*"))
            self._tokenizer = self._load("AutoTokenizer", str(folder) if own else self._base)

    def model(self) -> nn.Module:
        """See `Task.model`."""
        adapts = self._base != self.source
        with offline():
            model = build(self._base, self._kind, self._config, trust=self._trust, weights=adapts)
            return Adapter(model, self._folder) if adapts else model

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
        """There is none."""
        raise TaskError("lm-evaluation-harness gives no loss to learn from", path=self.source)

    def has(self, split: Split) -> bool:
        """See `Task.has`: the harness's data are validation data."""
        return split == "val"

    def batches(self, split: Split) -> Iterator[Any]:
        """There are none."""
        return iter(())

    def examples(self, split: Split) -> int | None:
        """Not known before a score."""
        return None

    def length(self, split: Split) -> int | None:
        """There are no batches."""
        return None

    def halve(self) -> bool:
        """See `Task.halve`: the harness's own batches are as the user says."""
        return False

    def _load(self, auto: str, place: str) -> Any:
        try:
            found = getattr(transformers(), auto)
            return found.from_pretrained(place, local_files_only=True, trust_remote_code=self._trust)
        except (OSError, ValueError) as error:
            what = f"{auto}: {str(error).strip().splitlines()[0]}"
            raise TaskError(what, path=self.source, hint="copy tokenizer.json beside config.json") from error

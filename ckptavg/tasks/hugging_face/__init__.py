"""A task without a task file: the model and tokenizer of a Hugging Face directory, and data files.

Nothing is downloaded, and code that lies in the directory is run only by leave.

Shape suffixes: B = examples, T = tokens of the longest of them, V = tokens of the vocabulary, or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ckptavg.errors import CkptavgError, InputError, TaskError, UsageError, is_out_of_memory
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.score import Split
from ckptavg.tasks.hugging_face import data_files
from ckptavg.tasks.hugging_face.architecture import WRITE_ONE, architecture, base, build, offline, transformers
from ckptavg.tasks.hugging_face.data_files import DataFile
from ckptavg.tasks.hugging_face.peft_module import Adapter
from ckptavg.tasks.hugging_face.tokens import IGNORED, UNLIMITED, Example, Tokens, collated, max_tokens, padding
from ckptavg.tasks.worker_sampler import RankBatchSampler

AUTOMATIC: Final = 32  # examples a batch, where nobody says
_KEPT: Final = 2 << 30  # bytes of images that are processed once and kept
_TOKENIZERS: Final = ("tokenizer*", "*.model", "vocab.*", "tekken.json")


class HuggingFaceTask:
    """Language modelling or classification, as the architecture in config.json and the columns of the data say.

    =========================  =======================  ==========================================================
    architecture               columns                  loss of an example
    =========================  =======================  ==========================================================
    causal language model      ``prompt, completion``   mean of −ln p over the tokens of the completion
    the same                   ``messages``             the same over the last message, by the chat template
    the same                   ``text``                 mean of −ln p over all tokens but the first
    masked language model      ``text``                 mean of −ln p over 15 % of the tokens
    sequence to sequence       ``prompt, completion``   mean of −ln p over the tokens of the completion
    sequence classification    ``text, label``          −ln p of the label; the metric is accuracy
    image classification       ``image, label``         −ln p of the label; the metric is accuracy
    =========================  =======================  ==========================================================

    Other columns are ignored. The loss has one value an example [B], so every example counts the same, however long
    it is; perplexities of a corpus, where every token does, differ from it. The tokens are those the tokenizer gives,
    no end token is added. Which tokens are masked is decided by the text, so every pass masks the same; of them 80 %
    become the mask, 10 % a random token, and 10 % stay. Padding is on the right and changes no loss.

    A text is cut to what the model and its tokenizer take. Of a prompt that is too long, the end is kept. A text of
    which no token is predicted, such as an empty one, is left out; a completion of that kind is an error.

    Args:
        folder: has config.json (or PEFT's adapter_config.json), and the tokenizer or image processor.
        val: the data that is learned and scored on; see `ckptavg.tasks.hugging_face.data_files`.
        train: other data, shuffled by torch's global generator for each pass.
        test: data for a final score.
        batch_size: examples a batch; None begins with 32, and `halve` makes it less.
        trust_remote_code: run model code that lies in the directory.
        max_length: tokens to cut a text to, at most.
    Raises:
        UsageError: if a file is missing, of unknown kind, or needs a package that is not installed.
        InputError: if a data file is damaged or empty.
        TaskError: if the directory is not one of these models, or the columns are not what it learns from.
    """

    def __init__(
        self,
        folder: Path,
        *,
        val: Path,
        train: Path | None = None,
        test: Path | None = None,
        batch_size: int | None = 8,
        trust_remote_code: bool = False,
        max_length: int | None = None,
    ) -> None:
        if (batch_size is not None and batch_size < 1) or (max_length is not None and max_length < 2):
            raise UsageError("a batch needs at least 1 example, and a text at least 2 tokens")
        self.source = str(folder)
        self._folder = folder
        self._size = batch_size or AUTOMATIC
        self._may_halve = batch_size is None
        self._trust = trust_remote_code
        named: dict[Split, Path | None] = {"val": val, "train": train, "test": test}
        self._data = {split: data_files.read(path) for split, path in named.items() if path is not None}
        self._base = base(folder)
        with self._blame("config.json"), offline():
            self._kind = architecture(self._base, self.source, trust=trust_remote_code)
            self._config = self._load("AutoConfig", self._base)
        self._columns = {split: self._understood(data) for split, data in self._data.items()}
        with self._blame("tokenizer or image processor"), offline():
            if self._kind.name == "image":
                place = self._beside("image processor", ("*processor_config.json",), "preprocessor_config.json")
                self._processor = self._load("AutoImageProcessor", place)
            else:
                self._processor = self._load("AutoTokenizer", self._beside("tokenizer", _TOKENIZERS, "tokenizer.json"))
                if self._kind.name == "masked" and self._processor.mask_token_id is None:
                    raise TaskError("its tokenizer has no mask token", path=folder, hint=WRITE_ONE)
                limit = max_tokens(self._config.get_text_config(), self._processor, max_length)
                self._tokens = Tokens(tokenizer=self._processor, limit=limit)
        self.metric: Callable[[nn.Module, Any], Tensor] | None = None
        self.metric_goal = "max"
        self.corpus = None
        self.whole = None
        self.metric_bounds: tuple[float, float] | None = None
        if self._kind.name in ("text", "image"):
            if self._config.num_labels < 2:
                raise TaskError("is a classifier of one class", path=folder, hint=WRITE_ONE)
            self.metric, self.metric_bounds = self._accuracy, (0.0, 1.0)
        self._examples: dict[Split, list[Example]] = {}
        self._pixels: dict[tuple[Split, int], Tensor] = {}
        self._forwarded: tuple[nn.Module, Any, Tensor] | None = None

    def model(self) -> nn.Module:
        """See `Task.model`; in float32, and of an adapter the base with the weights it has."""
        adapts = self._base != self.source
        with self._blame("model"), offline():
            model = build(self._base, self._kind, self._config, trust=self._trust, weights=adapts)
            for config in (model.config, model.config.get_text_config()):
                if self._kind.name == "text" and getattr(config, "pad_token_id", None) is None:
                    config.pad_token_id = padding(self._processor)  # by it causal classifiers find the last token
            return Adapter(model, self._folder) if adapts else model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Task.loss`; one value an example [B]."""
        with self._blame("loss"):
            labels = batch["labels"]
            logits = self._logits(model, batch)
            if self.metric is not None:
                self._forwarded = None if torch.is_grad_enabled() else (model, batch, logits)
                return functional.cross_entropy(logits, labels, reduction="none")
            if self._kind.name == "causal":
                labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            losses = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            return losses.view(labels.shape).sum(dim=1) / (labels != IGNORED).sum(dim=1)

    def halve(self) -> bool:
        """Make batches half as large, also of a pass under way; False where they cannot be, or the size was given."""
        halved = self._may_halve and self._size > 1
        self._size = self._size // 2 if halved else self._size
        return halved

    def has(self, split: Split) -> bool:
        """See `Task.has`."""
        return split in self._data

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; in the order of the file, but for training data."""
        order, start = self._order(split), 0
        while start < len(order):
            chosen = order[start : start + self._size]
            yield self._batch(split, chosen)
            start += len(chosen)

    def turns(self, split: Split, rank: int, world: int) -> Iterator[tuple[Any, Sequence[int]]]:
        """See `ckptavg.batches.loader.Feed`."""
        order = self._order(split)
        turns = RankBatchSampler([order[i : i + self._size] for i in range(0, len(order), self._size)], rank, world)
        for chosen in turns:
            yield self._batch(split, chosen), turns.sizes.popleft()

    def examples(self, split: Split) -> int | None:
        """See `Task.examples`; those without a token to predict are not counted."""
        if split not in self._data:
            return None
        return len(self._data[split].rows) if self._kind.name == "image" else len(self._encoded(split))

    def length(self, split: Split) -> int | None:
        """See `Task.length`."""
        count = self.examples(split)
        return None if count is None else -(-count // self._size)

    def _order(self, split: Split) -> Sequence[int]:
        count = self.examples(split) or 0
        return torch.randperm(count).tolist() if split == "train" else range(count)

    def _batch(self, split: Split, chosen: Sequence[int]) -> Any:
        with self._blame(f"{split} data"):
            return collated([self._example(split, i) for i in chosen], padding(self._processor))

    def _accuracy(self, model: nn.Module, batch: Any) -> Tensor:
        """Whether the most probable class is the label [B]; where the loss was just asked for, by its logits."""
        with self._blame("metric"):
            kept, self._forwarded = self._forwarded, None
            same = kept is not None and kept[0] is model and kept[1] is batch
            logits = kept[2] if kept is not None and same else self._logits(model, batch)
            return (logits.argmax(dim=-1) == batch["labels"]).float()

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, T, V] or [B, V]; a model with a decoder makes its inputs from the labels."""
        needed = self._kind.name == "seq2seq"
        return model(**{name: tensor for name, tensor in batch.items() if needed or name != "labels"}).logits

    def _encoded(self, split: Split) -> list[Example]:
        """The examples of a text split, which are tokenised once."""
        if split not in self._examples:
            data, columns = self._data[split], self._columns[split]
            with self._blame(f"{split} data"):
                found = [self._encode(data, i, columns) for i in range(len(data.rows))]
            self._examples[split] = [example for example in found if example is not None]
            if not self._examples[split]:
                raise InputError("no text has a token to predict", path=data.path)
        return self._examples[split]

    def _encode(self, data: DataFile, i: int, columns: tuple[str, ...]) -> Example | None:
        tokens = self._tokens
        if columns[0] == "text":
            text = data.value(i, "text", str)
            if self._kind.name == "text":
                example = tokens.sequence(text, data.label(i, self._config.label2id))
            else:
                example = tokens.masked(text) if self._kind.name == "masked" else tokens.text(text)
        elif columns[0] == "messages":
            example = tokens.conversation(data.value(i, "messages", list))
        else:
            prompt, completion = data.value(i, "prompt", str), data.value(i, "completion", str)
            translates = self._kind.name == "seq2seq"
            example = (
                tokens.translation(prompt, completion) if translates else tokens.completion(prompt, prompt + completion)
            )
        if example is None and columns[0] != "text":
            raise InputError(f"`{columns[-1]}` has no token to predict", path=data.where(i))
        if example is not None and int(example["input_ids"].max()) >= self._vocabulary:
            raise TaskError("the tokenizer has more tokens than the model", path=self.source)
        return example

    def _example(self, split: Split, i: int) -> Example:
        if self._kind.name != "image":
            return self._encoded(split)[i]
        data = self._data[split]
        label = torch.tensor(data.label(i, self._config.label2id))
        pixels = self._pixels.get((split, i))
        if pixels is None:
            pixels = self._processed(data, i)
            if (len(self._pixels) + 1) * pixels.nbytes <= _KEPT:
                self._pixels[split, i] = pixels
        return {"pixel_values": pixels, "labels": label}

    def _processed(self, data: DataFile, i: int) -> Tensor:
        """[channels, height, width], of an image or of the path of one, which begins where the data lies."""
        from PIL import Image

        image = data.rows[i]["image"]
        if isinstance(image, str):
            path = (data.path if is_folder(data.path) else data.path.parent) / image
            try:
                image = Image.open(path)
                image.load()
            except OSError as error:
                raise InputError(f"is no image that can be read: {error}", path=path) from error
        if not isinstance(image, Image.Image):
            raise InputError("`image` must be an image or the path of one", path=data.where(i))
        grey = getattr(self._config, "num_channels", 3) == 1
        return self._processor(images=image.convert("L" if grey else "RGB"), return_tensors="pt")["pixel_values"][0]

    @property
    def _vocabulary(self) -> int:
        return getattr(self._config.get_text_config(), "vocab_size", UNLIMITED)

    def _understood(self, data: DataFile) -> tuple[str, ...]:
        """The columns that are learned from."""
        found = list(data.rows[0])
        for columns in self._kind.columns:
            if set(columns) <= set(found):
                return columns
        raise TaskError(
            f"has the columns {', '.join(found) or '(none)'}, but {self._config.architectures[0]} learns from "
            + ", or ".join(" and ".join(columns) for columns in self._kind.columns),
            path=data.path,
            hint="rename the columns, or " + WRITE_ONE,
        )

    def _beside(self, what: str, patterns: tuple[str, ...], example: str) -> str:
        """The directory, else the base model, whichever has such a file."""
        for place in (self.source, self._base):
            folder = Path(place)
            if not is_folder(folder) or any(any(folder.glob(pattern)) for pattern in patterns):
                return place
        raise TaskError(f"no {what} in {self._base}", hint=f"copy {example} beside config.json")

    def _load(self, auto: str, place: str, **options: Any) -> Any:
        found = getattr(transformers(), auto)
        return found.from_pretrained(place, local_files_only=True, trust_remote_code=self._trust, **options)

    @contextmanager
    def _blame(self, what: str) -> Generator[None]:
        """Turn whatever a framework raises into one line that says about what."""
        try:
            yield
        except Exception as error:  # the boundary to code that is not ours
            if isinstance(error, CkptavgError) or is_out_of_memory(error):
                raise
            first = next(iter(str(error).strip().splitlines()), "")
            hint = "-v shows the traceback"
            raise TaskError(f"{what}: {type(error).__name__}: {first}", path=self.source, hint=hint) from error

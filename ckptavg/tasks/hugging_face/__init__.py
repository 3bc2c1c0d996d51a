"""Task without a task file: the model and tokenizer of a Hugging Face directory, and data files.

Nothing is downloaded, and model code in the directory runs only with ``trust_remote_code``.

Shape suffixes: B = examples, T = tokens of the longest example, V = tokens of the vocabulary, or classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ckptavg.errors import InputError, TaskError, UsageError
from ckptavg.score import Split
from ckptavg.tasks import Task
from ckptavg.tasks.hugging_face import data_files
from ckptavg.tasks.hugging_face.architecture import ModelFolder
from ckptavg.tasks.hugging_face.data_files import DataFile
from ckptavg.tasks.hugging_face.library import WRITE_ONE, translate_errors
from ckptavg.tasks.hugging_face.tokens import (
    IGNORED,
    UNLIMITED,
    Example,
    Tokens,
    collated,
    grouped_by_length,
    padding,
    token_limit,
)
from ckptavg.tasks.shared_forward import SharedForward
from ckptavg.tasks.worker_sampler import RankBatchSampler

AUTOMATIC: Final = 32  # examples per batch, if no batch size is given
_MAX_CACHED: Final = 2 << 30  # bytes of processed images to keep in memory


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """Settings of a training that its directory does not have, or has wrongly.

    Attributes:
        base: base model of an adapter: a directory, or a name in the hub's cache.
        labels: names of the classes in the order of their numbers, separated by commas.
        max_length: number of tokens to which texts are truncated.
    """

    base: Path | str | None = None
    labels: str | None = None
    max_length: int | None = None


class HuggingFaceTask(Task):
    """Language modelling or classification, chosen by the architecture in config.json and the columns of the data.

    =========================  =======================  ==========================================================
    architecture               columns                  loss of an example
    =========================  =======================  ==========================================================
    causal language model      ``prompt, completion``   mean of −ln p over the tokens of the completion
    the same                   ``messages``             the same over the last message, by the chat template
    the same                   ``text``                 mean of −ln p over all tokens but the first
    masked language model      ``text``                 mean of −ln p over 15 % of the tokens
    sequence to sequence       ``prompt, completion``   mean of −ln p over the tokens of the completion
    sequence classification    ``text, label``          −ln p of the label; the metric is accuracy
    token classification       ``tokens, ner_tags``     mean of −ln p over the words; the metric is their accuracy
    image classification       ``image, label``         −ln p of the label; the metric is accuracy
    =========================  =======================  ==========================================================

    Other columns are ignored. The loss has one value per example [B], so every example has the same weight, whatever
    its length; corpus perplexity, where every token has the same weight, differs. The tokens are exactly those of the
    tokenizer; no end token is added. The masked tokens are a function of the text, so every pass masks the same; 80 %
    of them become the mask, 10 % a random token, and 10 % stay. Padding is on the right and does not affect the loss.

    The architecture of a PEFT adapter is that of its task_type, with as many classes as the classifier that it saves.
    A batch has texts of similar lengths, so that little of it is padding; scores have an example's value at its place
    in the file. Texts are truncated to the length that training used, where tokenizer.json has it, and to the limits
    of the model and its tokenizer. A prompt that is too long keeps its end. A text without a token to predict, such as
    an empty one, is skipped; a completion without one is an error.

    Args:
        folder: directory with config.json (or PEFT's adapter_config.json), and the tokenizer or image processor.
        val, train, test: data of the splits, see `ckptavg.tasks.hugging_face.data_files`; training data is shuffled by
            torch's global generator for each pass.
        batch_size: examples per batch; None starts with 32, which `halve` reduces.
        trust_remote_code: run model code in the directory.
        overrides: settings that replace those of the directory.
    Raises:
        UsageError: if an override does not fit the model, a file is missing or its type is not supported, or a
            required package is not installed.
        InputError: if a data file is damaged or empty.
        TaskError: if the directory does not hold one of these models, or the columns do not match it.
    """

    def __init__(
        self, folder: Path, *, val: Path, train: Path | None = None, test: Path | None = None,
        batch_size: int | None = 8, trust_remote_code: bool = False, overrides: Overrides = Overrides(),
    ) -> None:  # fmt: skip
        self.source = str(folder)
        self._batch_size = batch_size or AUTOMATIC
        self._block = self._batch_size  # examples that stay together, also after `halve`
        self._may_halve = batch_size is None
        named: dict[Split, Path | None] = {"val": val, "train": train, "test": test}
        self._data = {split: data_files.read(path) for split, path in named.items() if path is not None}
        self._folder = ModelFolder(folder, trust=trust_remote_code, base=overrides.base)
        self._kind = self._folder.kind
        self._config = self._folder.config
        self._columns = {split: self._matching_columns(data) for split, data in self._data.items()}
        self._processor = self._folder.processor(image=self._kind.name == "image")
        if self._kind.name != "image":
            if self._kind.name == "masked" and self._processor.mask_token_id is None:
                raise TaskError("its tokenizer has no mask token", path=folder, hint=WRITE_ONE)
            text_config = self._config.get_text_config()
            limit, self._limited_by = token_limit(text_config, self._processor, folder, overrides.max_length)
            self._tokens = Tokens(tokenizer=self._processor, limit=limit)
        self.notes: list[str] = []
        self._full: dict[Split, str] = {}  # counts of the texts that have as many tokens as are read
        if self._kind.name in ("text", "tokens", "image"):
            if self._config.num_labels < 2:
                raise TaskError("is a classifier with one class", path=folder, hint=WRITE_ONE)
            self._ids = self._class_ids(overrides.labels)
            self.metric, self.metric_bounds, self.metric_name = self._accuracy, (0.0, 1.0), "accuracy"
        if self._kind.name in ("text", "image"):
            self.probabilities = lambda model, batch: (self._logits(model, batch).float().softmax(1), batch["labels"])
        self._examples: dict[Split, list[Example]] = {}
        self._pixels: dict[tuple[Split, int], Tensor] = {}
        self._shared = SharedForward()
        self.shared_forward = self._shared.one_batch

    def model(self) -> nn.Module:
        """See `Task.model` and `ModelFolder.build`."""
        return self._folder.build(pad_token=padding(self._processor) if self._kind.name == "text" else None)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Task.loss`; one value per example [B]."""
        with translate_errors(self.source, "loss"):
            labels = batch["labels"]
            logits = self._logits(model, batch)
            if labels.ndim == 1:
                return functional.cross_entropy(logits, labels, reduction="none")
            if self._kind.name == "causal":
                labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            losses = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            return losses.view(labels.shape).sum(dim=1) / (labels != IGNORED).sum(dim=1)

    def halve(self) -> bool:
        """See `Task.halve`; applies to a pass in progress too, and returns False if the batch size was given."""
        if not self._may_halve or self._batch_size == 1:
            return False
        self._batch_size //= 2
        return True

    def has(self, split: Split) -> bool:
        """See `Task.has`."""
        return split in self._data

    def batches(self, split: Split) -> Iterator[Any]:
        """See `Task.batches`; texts of similar lengths are together, in an order that only training data change."""
        order, start = self._order(split), 0
        while start < len(order):
            chosen = order[start : start + self._batch_size]
            yield self._batch(split, chosen)
            start += len(chosen)

    def turns(self, split: Split, rank: int, world: int) -> Iterator[tuple[Any, Sequence[int]]]:
        """Iterate over this rank's batches, each with the batch sizes of all ranks."""
        order, size = self._order(split), self._batch_size
        turns = RankBatchSampler([order[i : i + size] for i in range(0, len(order), size)], rank, world)
        for chosen in turns:
            yield self._batch(split, chosen), turns.sizes.popleft()

    def examples(self, split: Split) -> int | None:
        """See `Task.examples`; texts without a token to predict are not counted."""
        if split not in self._data:
            return None
        return len(self._data[split].rows) if self._kind.name == "image" else len(self._encoded(split))

    def length(self, split: Split) -> int | None:
        """See `Task.length`."""
        count = self.examples(split)
        return None if count is None else -(-count // self._batch_size)

    def _order(self, split: Split) -> Sequence[int]:
        """Return the order of a pass; see `grouped_by_length`."""
        count, is_train = self.examples(split) or 0, split == "train"
        order = torch.randperm(count).tolist() if is_train else range(count)
        if self._kind.name == "image":
            return order
        lengths = [sum(map(len, (one["input_ids"], one["labels"].view(-1)))) for one in self._encoded(split)]
        return grouped_by_length(order, lengths, self._block, None if is_train else torch.Generator().manual_seed(0))

    def positions(self, split: Split) -> Sequence[int] | None:
        """See `Task.positions`."""
        return self._order(split) if split in self._data and split != "train" else None

    def unpadded(self, batch: Any) -> Any:
        """See `Task.unpadded`; one string of tokens and labels for each text."""
        if self._kind.name == "image":
            return batch
        lengths, labels = batch["attention_mask"].sum(dim=1).tolist(), batch["labels"].reshape(len(batch["labels"]), -1)
        rows = zip(batch["input_ids"].tolist(), lengths, labels.tolist(), strict=True)
        return [f"{ids[:n]} {[label for label in own if label != IGNORED]}" for ids, n, own in rows]

    def _batch(self, split: Split, chosen: Sequence[int]) -> Any:
        with translate_errors(self.source, f"{split} data"):
            return collated([self._example(split, i) for i in chosen], padding(self._processor))

    def _accuracy(self, model: nn.Module, batch: Any) -> Tensor:
        """Return whether the most probable class is the label [B], or the fraction of words where it is."""
        with translate_errors(self.source, "metric"):
            right, labels = (self._logits(model, batch).argmax(dim=-1) == batch["labels"]).float(), batch["labels"]
            return right if labels.ndim == 1 else right.sum(dim=1) / (labels != IGNORED).sum(dim=1)

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits [B, T, V] or [B, V]; encoder-decoder models derive the decoder inputs from the labels."""
        needs_labels = self._kind.name == "seq2seq"
        inputs = {name: tensor for name, tensor in batch.items() if needs_labels or name != "labels"}
        return self._shared(lambda: model(**inputs).logits)

    def _encoded(self, split: Split) -> list[Example]:
        """Return the tokenized examples of a text split, cached after the first call."""
        if split not in self._examples:
            data, columns, tokens = self._data[split], self._columns[split], self._tokens
            with translate_errors(self.source, f"{split} data"):
                encoded = [self._encode(data, i, columns) for i in range(len(data.rows))]
            self._examples[split] = [example for example in encoded if example is not None]
            longest = sum(len(example["input_ids"]) == tokens.limit for example in self._examples[split])
            if longest:
                self._full[split] = f"{longest} of {len(data.rows)} {split} texts"
                cut = f"texts are cut at {tokens.limit} tokens ({self._limited_by}), which"
                self.notes[:] = [f"{cut} {' and '.join(self._full.values())} reach; --max-length N sets another limit"]
            if not self._examples[split]:
                raise InputError("no text has a token to predict", path=data.path)
        return self._examples[split]

    def _encode(self, data: DataFile, i: int, columns: tuple[str, ...]) -> Example | None:
        tokens = self._tokens
        if columns[0] == "text":
            text = data.value(i, "text", str)
            if self._kind.name == "text":
                example = tokens.sequence(text, data.label(i, self._ids))
            else:
                example = tokens.masked(text) if self._kind.name == "masked" else tokens.text(text)
        elif columns[0] == "tokens":
            tags = data.tags(i, columns[1], self._ids)
            example = tokens.words(data.value(i, "tokens", list), tags)
        elif columns[0] == "messages":
            example = tokens.conversation(data.value(i, "messages", list))
        else:
            prompt, completion = data.value(i, "prompt", str), data.value(i, "completion", str)
            if self._kind.name == "seq2seq":
                example = tokens.translation(prompt, completion)
            else:
                example = tokens.completion(prompt, prompt + completion)
        if example is None and columns[0] not in ("text", "tokens"):
            raise InputError(f"`{columns[-1]}` has no token to predict", path=data.where(i))
        vocabulary = getattr(self._config.get_text_config(), "vocab_size", UNLIMITED)
        if example is not None and int(example["input_ids"].max()) >= vocabulary:
            raise TaskError("the tokenizer has more tokens than the model", path=self.source)
        return example

    def _example(self, split: Split, i: int) -> Example:
        if self._kind.name != "image":
            return self._encoded(split)[i]
        data, pixels = self._data[split], self._pixels.get((split, i))
        label = torch.tensor(data.label(i, self._ids))
        if pixels is None:
            image = data.image(i).convert("L" if getattr(self._config, "num_channels", 3) == 1 else "RGB")
            pixels = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
            if (len(self._pixels) + 1) * pixels.nbytes <= _MAX_CACHED:
                self._pixels[split, i] = pixels
        return {"pixel_values": pixels, "labels": label}

    def _class_ids(self, labels: str | None) -> Mapping[str, int]:
        """Return the class numbers by name: those of --labels, else those of the model's configuration."""
        known: Mapping[str, int] = self._config.label2id
        if labels is None:
            return known
        names = [name.strip() for name in labels.split(",")]
        if len(set(names)) != len(names) or len(names) != self._config.num_labels:
            message = f"--labels must be {self._config.num_labels} different names, one for each class of the model"
            raise UsageError(message, path=self.source)
        ids = {name: i for i, name in enumerate(names)}
        if set(ids) == set(known) and ids != known:
            order = ",".join(sorted(known, key=lambda name: known[name]))
            raise UsageError(f"--labels contradicts config.json, which has the order {order}", path=self.source)
        return ids

    def _matching_columns(self, data: DataFile) -> tuple[str, ...]:
        """Return the columns of ``data`` that this architecture learns from."""
        for columns in self._kind.columns:
            if set(columns) <= set(data.rows[0]):
                return columns
        available, needed = ", ".join(data.rows[0]), ", or ".join(map(" and ".join, self._kind.columns))
        message = f"has the columns {available or '(none)'}, but {self._folder.architecture} learns from {needed}"
        raise TaskError(message, path=data.path, hint=f"rename the columns, or {WRITE_ONE}")

"""Tokenization of texts into examples: input tokens and labels.

Shape suffixes: B = examples, T = tokens of a text, or of the longest text of a batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED: Final = -100  # the label of a token that is not predicted
MASKED: Final = 0.15  # fraction of the tokens of a text, as in the training of BERT
_SORTED: Final = 50  # batches
UNLIMITED: Final = 1 << 30  # tokenizers without a limit report more than this
# position ids of these models start at pad_token_id + 1, so that many fewer are usable
_OFFSET: Final = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "xmod")
Example = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Builder of examples of at most ``limit`` tokens: ``input_ids`` [T] and ``labels`` [T], `IGNORED` or predicted."""

    tokenizer: Any
    limit: int

    def text(self, text: str) -> Example | None:
        """Predict every token but the first; None for a text of fewer than two tokens."""
        ids = self._truncated(text)
        return _example(ids, ids) if len(ids) > 1 else None

    def sequence(self, text: str, label: int) -> Example | None:
        """Predict the class index, ``labels`` []; None if the text has no tokens."""
        ids = self._truncated(text)
        return {**_example(ids, ids), "labels": torch.tensor(label)} if ids else None

    def completion(self, prompt: str, whole: str, *, special: bool = True) -> Example | None:
        """Predict the tokens of ``whole`` from the first that differs from the prompt's; None if there are none.

        A completion that is too long is truncated at its end, then a prompt that is too long at its beginning.
        """
        options = {"verbose": False, "add_special_tokens": special}
        before, ids = (self.tokenizer(text, **options)["input_ids"] for text in (prompt, whole))
        start = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        stop = start + min(len(ids) - start, self.limit - 1)
        first = max(0, stop - self.limit)
        labels = [IGNORED] * (start - first) + ids[start:stop]
        return _example(ids[first:stop], labels) if any(label != IGNORED for label in labels[1:]) else None

    def conversation(self, messages: Any) -> Example | None:
        """Predict the last message, including the closing tokens of the chat template."""
        template = self.tokenizer.apply_chat_template
        before = template(messages[:-1], tokenize=False, add_generation_prompt=True)
        return self.completion(before, template(messages, tokenize=False), special=False)

    def translation(self, prompt: str, completion: str) -> Example | None:
        """Predict all tokens of the completion with a separate decoder; ``labels`` has the completion's length."""
        labels = self._truncated(text_target=completion) if completion else []
        ids = self._truncated(prompt)
        return _example(ids, labels) if ids and labels else None

    def masked(self, text: str) -> Example | None:
        """Mask and predict 15 % of the non-special tokens, at least one, by random draws seeded with the text."""
        ids = self._truncated(text)
        special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        plain = torch.tensor([i for i, is_special in enumerate(special) if not is_special])
        if not len(plain):
            return None
        digest = hashlib.blake2b(repr(ids).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        chosen = plain[torch.randperm(len(plain), generator=generator)[: max(1, round(MASKED * len(plain)))]]
        draw = torch.rand(len(chosen), generator=generator)
        replacement = torch.randint(len(self.tokenizer), (len(chosen),), generator=generator)
        example = _example(ids, [IGNORED] * len(ids))
        example["labels"][chosen] = example["input_ids"][chosen]
        example["input_ids"][chosen[draw < 0.8]] = self.tokenizer.mask_token_id
        example["input_ids"][chosen[draw >= 0.9]] = replacement[draw >= 0.9]
        return example

    def _truncated(self, text: str | None = None, **options: Any) -> list[int]:
        """Tokenize a text; the tokenizer itself truncates, so a closing special token is kept."""
        truncation = {"truncation": True, "max_length": self.limit} if self.limit < UNLIMITED else {}
        return self.tokenizer(text, verbose=False, **truncation, **options)["input_ids"]


def max_tokens(config: Any, tokenizer: Any) -> int:
    """Return the smaller token limit of the model's ``config`` and its tokenizer."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _OFFSET:
        positions -= config.pad_token_id + 1
    return min(n for n in (positions, tokenizer.model_max_length) if n and n > 0)


def padding(tokenizer: Any) -> int:
    """Return the padding token id, else the end token id, else 0 (such as for images)."""
    token_ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in token_ids if token is not None), 0)


def grouped_by_length(
    order: Sequence[int], lengths: Sequence[int], size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Return ``order`` in batches of ``size`` examples of similar lengths, of which the full ones are shuffled.

    Examples are sorted by length within every `_SORTED` batches, as by `group_by_length` of transformers' Trainer, so
    training data stay random. ``generator`` shuffles; None is torch's global one.
    """
    parts = (order[start : start + _SORTED * size] for start in range(0, len(order), _SORTED * size))
    by_length = [i for part in parts for i in sorted(part, key=lengths.__getitem__)]
    full = len(order) // size
    numbers = [*torch.randperm(full, generator=generator).tolist(), full]
    return [i for number in numbers for i in by_length[number * size : (number + 1) * size]]


def collated(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """Collate a batch [B, T], padded on the right: causal models ignore that padding and positions do not shift."""
    fill = {"input_ids": pad, "labels": IGNORED}
    batch: dict[str, Tensor] = {}
    for name, value in examples[0].items():
        rows = [example[name] for example in examples]
        batch[name] = torch.stack(rows) if value.ndim != 1 else pad_sequence(rows, True, fill.get(name, 0))
    return batch


def _example(ids: list[int], labels: list[int]) -> Example:
    mask = torch.ones(len(ids), dtype=torch.long)
    return {"input_ids": torch.tensor(ids), "attention_mask": mask, "labels": torch.tensor(labels)}

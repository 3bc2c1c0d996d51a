"""Texts as examples: the tokens a model reads and those it is to predict.

Shape suffixes: B = examples, T = tokens of a text, or of the longest of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED: Final = -100  # the label of a token that is not predicted
MASKED: Final = 0.15  # of the tokens of a text, as BERT was trained
UNLIMITED: Final = 1 << 30  # what tokenizers without a limit say is above this
# these number positions from pad_token_id + 1 on, so as many fewer can be used
_OFFSET: Final = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "xmod")
Example = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Texts as examples: ``input_ids`` [T] and, of those tokens that are predicted, ``labels`` [T].

    Attributes:
        tokenizer: of transformers.
        limit: tokens to cut a text to.
    """

    tokenizer: Any
    limit: int

    def ids(self, text: str | None = None, **options: Any) -> list[int]:
        """The tokens of a text, cut by the tokenizer's own rule, so that a closing token stays."""
        cut = {"truncation": True, "max_length": self.limit} if self.limit < UNLIMITED else {}
        return self._raw(text, **cut, **options)

    def text(self, text: str) -> Example | None:
        """Every token but the first is predicted; None where there is no other."""
        ids = self.ids(text)
        return _example(ids, ids) if len(ids) > 1 else None

    def sequence(self, text: str, label: int) -> Example | None:
        """A text and the number of its class, ``labels`` []; None if it has no tokens."""
        ids = self.ids(text)
        return {**_example(ids, ids), "labels": torch.tensor(label)} if ids else None

    def completion(self, prompt: str, whole: str, *, special: bool = True) -> Example | None:
        """The tokens of ``whole`` from the first that differs from the prompt's are predicted; None if there are none.

        Too long a completion loses its end, and then too long a prompt its beginning.
        """
        before, ids = (self._raw(text, add_special_tokens=special) for text in (prompt, whole))
        start = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        stop = start + min(len(ids) - start, self.limit - 1)
        first = max(0, stop - self.limit)
        labels = [IGNORED] * (start - first) + ids[start:stop]
        return _example(ids[first:stop], labels) if any(label != IGNORED for label in labels[1:]) else None

    def conversation(self, messages: Any) -> Example | None:
        """The last message is predicted, with what the chat template closes it with."""
        template = self.tokenizer.apply_chat_template
        before = template(messages[:-1], tokenize=False, add_generation_prompt=True)
        return self.completion(before, template(messages, tokenize=False), special=False)

    def translation(self, prompt: str, completion: str) -> Example | None:
        """All tokens of the completion are predicted, by a decoder of its own; ``labels`` has their number."""
        labels = self.ids(text_target=completion) if completion else []
        ids = self.ids(prompt)
        return _example(ids, labels) if ids and labels else None

    def masked(self, text: str) -> Example | None:
        """15 % of the tokens that are not special, at least one; which ones, and by what, follows from the text."""
        ids = self.ids(text)
        special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        plain = torch.tensor([i for i, is_special in enumerate(special) if not is_special])
        if not len(plain):
            return None
        digest = hashlib.blake2b(repr(ids).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        chosen = plain[torch.randperm(len(plain), generator=generator)[: max(1, round(MASKED * len(plain)))]]
        how = torch.rand(len(chosen), generator=generator)
        other = torch.randint(len(self.tokenizer), (len(chosen),), generator=generator)
        example = _example(ids, [IGNORED] * len(ids))
        example["labels"][chosen] = example["input_ids"][chosen]
        example["input_ids"][chosen[how < 0.8]] = self.tokenizer.mask_token_id
        example["input_ids"][chosen[how >= 0.9]] = other[how >= 0.9]
        return example

    def _raw(self, text: str | None, **options: Any) -> list[int]:
        return self.tokenizer(text, verbose=False, **options)["input_ids"]


def max_tokens(config: Any, tokenizer: Any, max_length: int | None) -> int:
    """The tokens that the model's ``config``, its tokenizer and the caller all allow a text."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in _OFFSET:
        positions -= config.pad_token_id + 1
    return min(n for n in (positions, tokenizer.model_max_length, max_length) if n and n > 0)


def padding(tokenizer: Any) -> int:
    """The token that fills a batch, or 0 where there is none, such as for images."""
    named = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((token for token in named if token is not None), 0)


def collated(examples: list[Example], pad: int) -> dict[str, Tensor]:
    """A batch [B, T], padded on the right, where a causal model does not see the padding and positions stay."""
    fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED}
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    return {
        name: pad_sequence(tensors, batch_first=True, padding_value=fill[name])
        if tensors[0].ndim == 1
        else torch.stack(tensors)
        for name, tensors in columns.items()
    }


def _example(ids: list[int], labels: list[int]) -> Example:
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(len(ids), dtype=torch.long),
        "labels": torch.tensor(labels),
    }

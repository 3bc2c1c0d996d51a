"""SpamAssassin's mails as inputs of MiniLM or of its last block, computed once and kept beside the data.

Shape suffixes: M = mails, B = of them, L = tokens, E = width.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from ckptavg.tasks.hugging_face.library import offline
from study.data import fetched
from study.domains import mails as reader

LABELS: Final = {"easy-ham": 0, "hard-ham": 1, "spam": 2}
_MIME: Final = re.compile(r"(?im)^(--|content-|\s*(boundary|charset|name)=|this is a multi-part message).*$")
_LETTERS: Final = 20  # at most so many are kept for a token: long mails would take long to cut into tokens


def inputs(length: int, *, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, attention mask [M, L] and labels [M] of all mails that differ in their first ``length`` tokens.

    The inputs are tokens [M, L], or if ``frozen`` those of the last block [M, L, E] as float16. They are mapped from a
    file, which the first call writes in some minutes.

    Raises:
        ValueError: if the data were not fetched, or a mail is of an unknown group.
    """
    base = fetched("minilm")
    kind = f"{'hidden' if frozen else 'tokens'}-{length}"
    path = base.parent / "spam-lora-cache" / f"{kind}-{_digest()}.pt"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        tokens_ML, mask_ML, labels_M = tokens(reader.mails(), base, length)
        first = hidden(tokens_ML, mask_ML, base) if frozen else tokens_ML
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")  # another training may write it at the same time
        torch.save((first, mask_ML, labels_M), unfinished)
        unfinished.replace(path)
        for outdated in set(path.parent.glob(f"{kind}-*.pt")) - {path}:
            outdated.unlink(missing_ok=True)
    return _mapped(path)


@cache
def _digest() -> str:
    """Return a key of the code, cached at the first call so that later edits do not change it."""
    sources = b"".join(Path(str(file)).read_bytes() for file in (__file__, reader.__file__))
    return hashlib.sha256(sources).hexdigest()[:12]


@cache
def _mapped(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    return torch.load(path, mmap=True)


def tokens(mails: Sequence[tuple[str, str]], base: Path, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, mask and labels of mails; of several with the same tokens only the first, and none of no tokens.

    Raises:
        ValueError: if a mail is of an unknown group.
    """
    groups = [group.rstrip("-0123456789") for group, _ in mails]
    if unknown := sorted(set(groups) - set(LABELS)):
        raise ValueError(f"{base.parent / 'spam-assassin'}: has mails of the unknown group {unknown[0]!r}")
    texts = [_clean(text)[: _LETTERS * length] for _, text in mails]
    with offline():
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
    found = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    tokens_ML, mask_ML = found["input_ids"], found["attention_mask"]
    last: dict[tuple[int, ...], int] = {tuple(row): i for i, row in reversed(list(enumerate(tokens_ML.tolist())))}
    kept = torch.tensor(sorted(i for i in last.values() if int(mask_ML[i].sum()) > 2))  # more than [CLS] and [SEP]
    return tokens_ML[kept], mask_ML[kept], torch.tensor([LABELS[group] for group in groups])[kept]


def _clean(text: str) -> str:
    return " ".join(html.unescape(_MIME.sub(" ", text)).split())


@torch.inference_mode()
def hidden(tokens_ML: Tensor, mask_ML: Tensor, base: Path) -> Tensor:
    """Return the outputs [M, L, E] of the last block but one, as float16."""
    with offline():
        model: Any = BertModel.from_pretrained(base).eval()
    model.encoder.layer = model.encoder.layer[:-1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    parts = [
        model(input_ids=tokens_BL.to(device), attention_mask=mask_BL.to(device)).last_hidden_state.half().cpu()
        for tokens_BL, mask_BL in zip(tokens_ML.split(64), mask_ML.split(64), strict=True)
    ]
    return torch.cat(parts)

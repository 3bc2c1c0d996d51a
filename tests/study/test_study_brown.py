"""The Brown corpus of the study, on small documents of the same format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from study.data import fetched
from study.domains import brown

LINES = "\n\n\t{0}/nn said/vbd ,/, ``/`` Mr./np Smith/np ''/'' (/( and/or/cc I/ppss )/) ./.\n\n\tNo/at ?/. ?/.\n"
TEXT = '{0} said, "Mr. Smith" (and/or I).\nNo??\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        (tmp_path / f"c{'abk'[i % 3]}{i:02}").write_text(LINES.format(f"{'abcdefghij'[i]}" * 60) * 4)
    for name in ("README", "cats.txt", "ca1", "ct01"):
        (tmp_path / name).write_text("no document")
    return tmp_path


def test_tags_are_stripped_and_punctuation_is_as_in_print(folder: Path):
    assert brown.read(folder / "ca00") == TEXT.format("a" * 60) * 4
    assert len(brown.documents(folder)) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"The/at end\n", "line 1: 'end' is not word/tag"),
        (b"\nThe/at end/\n", "line 2: '' is not word/tag"),
        (b"/nn\n", "line 1: 'nn' is not word/tag"),
        (b"caf\xe9/nn", "is not ASCII"),
        (b"\n \n", "has no words"),
    ],
)
def test_a_damaged_document_is_an_error_of_one_line_that_names_it(folder: Path, content: bytes, message: str):
    (folder / "ca00").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        brown.documents(folder)
    assert str(caught.value).startswith(str(folder / "ca00")) and "\n" not in str(caught.value)


def test_two_documents_are_too_few(tmp_path: Path):
    for name in ("ca01", "ca02"):
        (tmp_path / name).write_text("The/at")
    with pytest.raises(ValueError, match="2 documents"):
        brown.documents(tmp_path)


def test_each_document_is_in_one_part_and_no_passage_is_of_two(folder: Path):
    job = brown.job(0, folder)
    parts = [part.dataset.tensors[0] for part in (job.train, job.val, job.test)]  # pyright: ignore
    runs = {letter: letter.encode()[0] for letter in "abcdefghij"}
    found = [{letter for letter, code in runs.items() if ((part == code).sum(dim=1) > 20).any()} for part in parts]
    assert [len(letters) for letters in found] == [8, 1, 1] and set.union(*found) == set(runs)
    held = {tuple(brown.job(seed, folder).val.dataset.tensors[0].unique().tolist()) for seed in range(4)}  # pyright: ignore
    assert len(held) > 1
    texts = [bytes(passage.tolist()).decode() for part in parts for passage in part]
    whole = [brown.read(path) for path in folder.glob("c[abk]??")]
    assert all(any(text in document for document in whole) for text in texts)
    assert {len(text) for text in texts} == {brown.LENGTH + 1}


def test_the_loss_is_that_of_the_next_byte_and_the_model_does_not_see_it(folder: Path):
    torch.manual_seed(0)
    job = brown.job(0, folder)
    (passage,) = next(iter(job.val))
    model = job.model()
    logits = model(passage[:, :-1])
    expected = -logits.log_softmax(-1).gather(2, passage[:, 1:, None]).squeeze(2).mean(dim=1)
    torch.testing.assert_close(job.loss(model, [passage]), expected)
    changed = passage.clone()
    changed[:, 40] = ord("?")
    torch.testing.assert_close(model(changed[:, :-1])[:, :40], logits[:, :40])
    job.loss(model, [passage]).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_real_corpus_has_500_documents_of_2000_words():
    try:
        folder = fetched("brown")
    except ValueError as error:
        pytest.skip(str(error))
    texts = [bytes(text.tolist()).decode() for text in brown.documents(folder)]
    words = [len(text.split()) for text in texts]
    assert len(texts) == 500 and min(words) > 1900 and max(words) < 2600
    assert not any(mark in "".join(texts) for mark in ("``", "''", " ,", " ."))

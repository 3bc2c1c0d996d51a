"""The reader of SpamAssassin's mails, and the study's linear models of shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study.data
from study.domains.mails import mail, mails


def _write(folder: Path, name: str, group: str, text: str) -> Path:
    path = folder / group / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"id": name, "group": group, "text": text}))
    return path


def test_mails_have_neither_headers_nor_tags_and_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study.data, "ROOT", tmp_path)
    data = tmp_path / "spam-assassin" / "data"
    _write(data, "2", "spam-1", "From: a\nSubject: <b>free</b>\n\nBuy <b\nstyle='x'>now</b>!\n\nFrom: 1 < 2")
    _write(data, "1", "easy-ham-2", "Subject: no body\n")
    (data / "file_list.json").write_text("[]")
    assert mails() == [("easy-ham-2", ""), ("spam-1", "Buy  now !\n\nFrom: 1 < 2")]


@pytest.mark.parametrize("text", ["", "[", "[]", '{"group": "spam-1"}', '{"group": "spam-1", "text": 3}', "\xff"])
def test_a_file_that_is_no_mail_is_named(text: str, tmp_path: Path):
    path = tmp_path / "1.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^[^\n]*1\.json: [^\n]*$"):
        mail(path)


def test_missing_mails_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study.data, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"spam-assassin: is missing"):
        mails()
    (tmp_path / "spam-assassin" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no mails"):
        mails()

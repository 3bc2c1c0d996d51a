"""Runs of real frameworks, each made once per session."""

from __future__ import annotations

from pathlib import Path

import gpt2
import pytest


@pytest.fixture(scope="session")
def trainer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``run``, the output of transformers' Trainer, and ``val.jsonl`` and ``test.jsonl``."""
    folder = tmp_path_factory.mktemp("trainer")
    gpt2.train(folder)
    return folder

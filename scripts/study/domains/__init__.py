"""The kinds of training in the study: one file each, which defines ``DOMAIN = Domain(...)``."""

from __future__ import annotations

import importlib
from typing import Final

from study.job import Domain

DOMAINS: Final = ("digits-cnn", "digits-vit", "source-lines", "source-bytes", "cartpole", "logistic")
"""What `run.py` runs unless told otherwise."""

WITH_DATA: Final = ("cifar", "image-folder", "offline-rl")
"""What needs ``--data``, and wants a GPU."""


def domain(name: str) -> Domain:
    """Return the domain called ``name``.

    Raises:
        ValueError: if there is no such domain.
    """
    if name not in (*DOMAINS, *WITH_DATA):
        raise ValueError(f"there is no domain {name!r}; there are {', '.join((*DOMAINS, *WITH_DATA))}")
    return importlib.import_module(f"study.domains.{name.replace('-', '_')}").DOMAIN

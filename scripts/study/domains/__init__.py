"""The kinds of training in the study: a file each, which defines ``DOMAIN``, or name → Domain for several of a kind."""

from __future__ import annotations

import importlib
from typing import Final

from study.job import Domain

MODULES: Final = {
    # real data, of get_data.sh
    "umls-distmult": "knowledge_graph",
    "umls-complex": "knowledge_graph",
    "umls-keci": "knowledge_graph",
    "kinship-distmult": "knowledge_graph",
    "kinship-complex": "knowledge_graph",
    "kinship-keci": "knowledge_graph",
    "fashion": "fashion",
    "fashion-noise": "fashion",
    "fashion-imbalanced": "fashion",
    "spam-lora": "spam_lora",
    "lander": "expert",
    "walker": "expert",
    "brown": "brown",
    "spam-16": "spam_shards",
    "spam-64": "spam_shards",
    # toys, which need nothing
    "digits-cnn": "digits_cnn",
    "digits-vit": "digits_vit",
    "source-lines": "source_lines",
    "source-bytes": "source_bytes",
    "cartpole": "cartpole",
    "logistic": "logistic",
    # a GPU in practice
    "fashion-large": "fashion",
    "spam-lora-large": "spam_lora",
    # files of the user's, and a GPU in practice
    "cifar": "cifar",
    "image-folder": "image_folder",
    "offline-rl": "offline_rl",
}
"""Domain → its module."""

WITH_DATA: Final = ("cifar", "image-folder", "offline-rl")
"""Domains that need ``--data``."""

TOYS: Final = ("digits-cnn", "digits-vit", "source-lines", "source-bytes", "cartpole", "logistic")
"""Domains that need no data."""

LARGE: Final = ("fashion-large", "spam-lora-large")
"""Domains for which a CPU takes hours."""

DOMAINS: Final = tuple(name for name in MODULES if name not in (*WITH_DATA, *LARGE))
"""Domains that `run.py` runs unless told otherwise."""


def domain(name: str) -> Domain:
    """Return the domain called ``name``.

    Raises:
        ValueError: if there is no such domain.
    """
    if name not in MODULES:
        raise ValueError(f"there is no domain {name!r}; there are {', '.join(MODULES)}")
    found = importlib.import_module(f"study.domains.{MODULES[name]}").DOMAIN
    return found[name] if isinstance(found, dict) else found

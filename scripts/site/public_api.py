"""Griffe extension: the public names that the package makes at run time, for the site's page of the Python API.

The functions of the strategies get their own settings as parameters; the options that all of them share are
``**options``, which docs/reference/options.md lists.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import griffe

from ckptavg import callbacks
from ckptavg.declaration import Option, declared, docstring
from ckptavg.strategies import strategies


class PublicApi(griffe.Extension):
    """Adds ``ckptavg.sewa`` and its like, and the classes of ``ckptavg.callbacks``, which are made on first use."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Add the names to the package that griffe has read."""
        for name, strategy in strategies().items():
            pkg.set_member(name, function(name, inspect.cleandoc(strategy.__doc__ or ""), declared(strategy)))
        tree = ast.parse(Path(callbacks.__file__).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in dir(callbacks):
                made = griffe.Class(node.name)
                made.docstring = griffe.Docstring(ast.get_docstring(node) or "", parent=made)
                pkg["callbacks"].set_member(node.name, made)


def function(name: str, text: str, settings: tuple[Option, ...]) -> griffe.Function:
    """Return a strategy's function, with its settings as keywords."""
    kind = griffe.ParameterKind
    parameters = griffe.Parameters(
        griffe.Parameter("ckpts", kind=kind.positional_or_keyword),
        *(
            griffe.Parameter(
                one.name,
                annotation=inspect.formatannotation(one.hint).replace("typing.", ""),
                kind=kind.keyword_only,
                default=repr(one.default),
            )
            for one in settings
        ),
        griffe.Parameter("options", kind=kind.var_keyword, default="{}"),
    )
    made = griffe.Function(name, parameters=parameters, returns="Result")
    if settings:
        text += f"\n\n{docstring(settings)}"
    made.docstring = griffe.Docstring(text, parent=made)
    return made

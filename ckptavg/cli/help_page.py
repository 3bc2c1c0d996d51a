"""The layout of a command's help page: no type beside flags, and one panel where options are few."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

ONE_PANEL = 20  # options up to which a page is not divided into panels


def _laid_out(params: list[Any]) -> list[Any]:
    """Return the parameters of a command, prepared for its help page; parsing does not depend on the changes."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""  # Typer would print <bool>, though a flag takes no value
        if len(params) <= ONE_PANEL:
            param.rich_help_panel = None
    return params


class Command(TyperCommand):
    """A command with such a help page."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` included."""
        return _laid_out(super().get_params(ctx))


class Group(TyperGroup):
    """The application with such a help page."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` included."""
        return _laid_out(super().get_params(ctx))

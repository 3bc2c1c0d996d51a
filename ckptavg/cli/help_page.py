"""The layout of a command's help page: the options of its usual use, all of them with ``--help-all``."""

from copy import copy
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from ckptavg.declaration import PANELS

ONE_PANEL: Final = 20  # options up to which a page is not divided into panels, and has no short form
_ALL: Final = "ckptavg.all_options"  # of the context's values


def _show_all(ctx: typer.Context, _param: Any, requested: bool) -> None:
    if requested:
        ctx.meta[_ALL] = True
        ctx.get_help()  # prints it
        raise typer.Exit


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
        *params, help_option = _laid_out(super().get_params(ctx))
        help_all = copy(help_option)  # it is built otherwise in each version of Typer
        help_all.opts, help_all.name, help_all.help = ["--help-all"], "help_all", "Show all options."
        help_all.callback, help_all.hidden = _show_all, len(params) < ONE_PANEL
        return [*params, help_all, help_option]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page: without ``--help-all`` its own options and the main ones, and how to see the others."""
        panels = [f"Advanced: {panel}" for panel in PANELS if panel]
        left_out = [param for param in self.get_params(ctx) if getattr(param, "rich_help_panel", None) in panels]
        if not left_out or ctx.meta.get(_ALL):
            super().format_help(ctx, formatter)
            return
        for param in left_out:
            param.hidden = True
        self.epilog = f"{len(left_out)} more options: {ctx.command_path} --help-all"
        super().format_help(ctx, formatter)
        for param in left_out:
            param.hidden = False


class Group(TyperGroup):
    """The application with such a help page."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` included."""
        return _laid_out(super().get_params(ctx))

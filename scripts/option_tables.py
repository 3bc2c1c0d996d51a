"""Write the option tables of docs/reference/options.md from the declarations: ``python scripts/option_tables.py``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ckptavg.cli.options import PRINTING
from ckptavg.declaration import PANELS, Option, declared
from ckptavg.options import Options
from ckptavg.options.posterior import PosteriorOptions
from ckptavg.strategies import strategies

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "options.md"
BEGIN, END = "<!-- begin: made by scripts/option_tables.py -->\n", "<!-- end -->\n"


def main() -> None:
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """Return the page with current tables."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{settings()}\n{posterior()}\n{panels()}{END}{after}"


def settings() -> str:
    """Return the table of the strategies' settings."""
    owners: dict[tuple[str, ...], list[str]] = {}
    for name, strategy in strategies().items():
        for option in declared(strategy):
            owners.setdefault(cells(option), []).append(f"`{name}`")
    rows = [(flag, ", ".join(names), *rest) for (flag, *rest), names in owners.items()]
    return "### Settings of a strategy\n\n" + table(("option", "of", "default", "meaning"), rows)


def posterior() -> str:
    """Return the table of the options of ``swag``."""
    rows = map(cells, declared(PosteriorOptions))
    return "### Options of swag\n\n" + table(("option", "default", "meaning"), rows)


def panels() -> str:
    """Return one table for each panel of shared options."""
    options = (*declared(Options), *PRINTING)
    return "\n".join(
        f"### {f'Advanced: {panel}' if panel else 'Main options'}\n\n"
        + table(("option", "default", "meaning"), (cells(o) for o in options if o.help.panel == panel))
        for panel in PANELS
    )


def cells(option: Option) -> tuple[str, str, str]:
    """Return the flags, the default and the meaning of an option."""
    flags = [option.help.short or (f"-{option.name}" if len(option.name) == 1 else ""), option.flag]
    if option.default is True:
        flags.append(f"--no-{option.flag[2:]}")
    default = "none" if option.default in (None, ()) else f"`{option.default}`"
    if isinstance(option.default, bool):
        default = "on" if option.default else "off"
    meaning = f"{option.help.text} {option.help.more}".strip()
    if not all(str(choice) in meaning for choice in option.choices):
        meaning += f" One of {', '.join(f'`{choice}`' for choice in option.choices)}."
    return ", ".join(f"`{flag}`" for flag in flags if flag), default, meaning.replace("|", "\\|")


def table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (f"| {' | '.join(row)} |" for row in (heading, *rows))
    first = next(lines)
    return "\n".join([first, "|" + "---|" * len(heading), *lines]) + "\n"


if __name__ == "__main__":
    main()

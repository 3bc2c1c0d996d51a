"""The page from top to bottom, from the templates."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ckptavg.errors import printable
from ckptavg.report.page import reliability, scores, search, strategies, terrain, weights
from ckptavg.report.page.figure import Plot, Table
from ckptavg.report.page.numbers import Report, cell
from ckptavg.report.page.summary import (
    candidates,
    cost,
    differing,
    files,
    left_out,
    output,
    scores_table,
    settings,
    side_by_side,
)
from ckptavg.report.page.verdict import Answer, answer, name_of

_FOLDER: Final = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with plots, tables, lists and lines below it; `anchor` is its id."""

    anchor: str
    title: str
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    pairs: Sequence[tuple[str, str]] = ()
    lines: Sequence[str] = ()
    commands: Sequence[tuple[str, str]] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it."""
        return not (self.plots or self.tables or self.folded or self.pairs or self.lines or self.commands)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One report of the page: its answer and its sections."""

    name: str
    answer: Answer
    sections: Sequence[Section] = field(default_factory=list[Section])


def document(reports: Sequence[Report]) -> str:
    """Return the text of the page."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_final, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style, script = (Markup((_FOLDER / name).read_text(encoding="utf-8")) for name in ("style.css", "copy.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = [_run(report, f"r{number}") for number, report in enumerate(reports, 1)]
    several = len(runs) > 1
    title = f"{len(runs)} runs of ckptavg side by side" if several else f"ckptavg: {runs[0].answer.sentence}"
    return environment.get_template("page.html.jinja").render(
        title=title, runs=runs, style=style, script=script, policy=Markup(_policy(digest)),
        overview=side_by_side(reports) if several else None, differing=differing(reports) if several else None,
        version=reports[0].get("version") or (reports[0].get("run") or {}).get("versions", {}).get("ckptavg", ""),
    )  # fmt: skip


def _policy(digest: str) -> str:
    """Return a policy under which the page runs its own script only, and loads nothing."""
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _final(value: Any) -> Any:
    """Return what Jinja escapes: texts have control characters and marks of direction as backslash escapes."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _run(report: Report, key: str) -> Run:
    sections = [
        *_results(report, key),
        Section(
            anchor=f"{key}-left-out", title="Left out, and remarks", tables=left_out(report),
            lines=[str(line) for line in report.get("warnings", ())],
        ),
        Section(anchor=f"{key}-cost", title="Cost", pairs=cost(report)),
        Section(anchor=f"{key}-output", title="The written file", pairs=output(report)),
        _reproduce(report, key),
    ]  # fmt: skip
    name = name_of(report) if report.get("strategy") else report["kind"]
    return Run(name=name, answer=answer(report), sections=[section for section in sections if not section.empty])


def _results(report: Report, key: str) -> list[Section]:
    compared = strategies.plots(report, f"{key}-compare")
    predictions = reliability.tables(report)
    by_step, by_weight = scores.plots(report, f"{key}-scores"), weights.plots(report, f"{key}-weights")
    listed = candidates(report)
    return [
        Section(
            anchor=f"{key}-strategies", title="Strategies", plots=compared,
            tables=[strategies.table(report)] if compared else [],
        ),
        Section(
            anchor=f"{key}-predictions", title="Averaged predictions", tables=predictions,
            plots=reliability.plots(report, f"{key}-reliability"),
        ),
        Section(anchor=f"{key}-scores", title="Scores", plots=by_step, tables=scores_table(report)),
        Section(anchor=f"{key}-coefficients", title="Coefficients", plots=by_weight),
        Section(anchor=f"{key}-candidates", title="Candidates", folded=[listed] if listed else []),
        Section(
            anchor=f"{key}-search", title="The search", plots=search.plots(report, f"{key}-search"),
            tables=search.tables(report),
        ),
        Section(anchor=f"{key}-landscape", title="Landscape", plots=terrain.plots(report, f"{key}-terrain")),
        Section(anchor=f"{key}-files", title="Files", tables=files(report)),
    ]  # fmt: skip


def _reproduce(report: Report, key: str) -> Section:
    run: Mapping[str, Any] = report.get("run") or {}
    steps: Mapping[str, str] = report.get("next_steps") or {}
    commands = [("Run it again", run["command"])] if run else []
    commands += [("Load the file", steps["load"])] if steps.get("load") else []
    commands += [("Verify it from its sources", steps["verify"])] if steps.get("verify") else []
    pairs = [(f"option {name}", str(value)) for name, value in run.get("configuration", {}).items()]
    pairs += [("processes", cell(run["processes"]))] if run.get("processes", 1) > 1 else []
    pairs += [(name, number) for name, number in run.get("versions", {}).items()]
    if "strategy" in report:
        pairs += [("ckptavg", report["version"])] if not run else []
        pairs += [("seed", str(report["seed"])), ("settings", settings(report))]
    digests = ((report.get("output") or {}).get("source_digests") or {}).items()
    table = Table(
        title="Digests of the averaged files", headings=["file", "digest"], rows=[[*pair] for pair in digests]
    )
    lines = [] if run else ["The run was a call from Python; its settings are below."]
    return Section(
        anchor=f"{key}-reproduce", title="How to reproduce", commands=commands, pairs=pairs, lines=lines,
        folded=[table] if table.rows else [],
    )  # fmt: skip

"""Write the study's Markdown and figures from the recorded results: ``python -m study.report build/study/full``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from study import figures
from study.claims import claims
from study.domains import DOMAINS
from study.plan import PLANS
from study.record import Failure, Record, read
from study.setting import Setting, settings
from study.tables import domain_table, overview, table

NAME = "study.md"


def write(results: Path, out: Path) -> None:
    """Write ``study.md`` and a figure for each domain into ``out``."""
    known = read(results)
    latest = {one.domain: one.digest for one in known}  # the last record of each cell counts
    shown = [one for one in known if one.digest == latest[one.domain]]
    records = [one for one in shown if isinstance(one, Record)]
    failures = [one for one in shown if isinstance(one, Failure)]
    order = [*DOMAINS, *dict.fromkeys(one.domain for one in records if one.domain not in DOMAINS)]
    records.sort(key=lambda one: (order.index(one.domain), one.schedule, one.seed))
    found = settings(records)
    drawn = figures.draw(found, out)
    text = document(found, failures, drawn, others=len(known) - len(shown))
    (out / NAME).write_text(text, encoding="utf-8")


def document(found: Sequence[Setting], failures: Sequence[Failure], drawn: Sequence[str], others: int) -> str:
    """Return the whole text.

    Args:
        found: the results.
        failures: trainings that could not be measured.
        drawn: domains that have a figure.
        others: number of results in the same file that were made with other settings, and are left out.
    """
    parts = ["# Which averaging strategy is worth running?", *_about(found)]
    if others:
        parts.append(f"{others} results in the same file have other settings or strategies and are not shown.")
    if failures:
        rows = [[one.domain, str(one.seed), one.schedule, one.error.splitlines()[0]] for one in failures]
        parts += ["## Trainings that failed", table(["domain", "seed", "schedule", "error"], rows)]
    if found:
        parts += ["## All settings together", *overview(found)]
        for name in dict.fromkeys(one.name for one in found):
            mine = [one for one in found if one.name == name]
            parts += [f"## {mine[0].domain.title}", mine[0].domain.about]
            if name in drawn:
                parts.append(f"![Differences from SWA, and SeWA and LAWA by K]({name}.svg)")
            for one in mine:
                parts += [f"### {one.title}", domain_table(one)]
        parts += claims(found)
    return "\n\n".join(parts) + "\n"


def _about(found: Sequence[Setting]) -> list[str]:
    if not found:
        return ["Nothing has been measured."]
    records = [record for one in found for record in one.records]
    first = records[0]
    machines = "; ".join(dict.fromkeys(record.machine for record in records))
    skipped = list(dict.fromkeys(spec for record in records for spec in record.skipped))
    text = [
        f"    {_command(found)}",
        f"{machines}; one thread per training. {len(records)} trainings: {len(found)} settings (domain and learning "
        f"rate schedule) with {_counts([len(one.records) for one in found])} seeds each. A seed determines the initial "
        "weights, the order of the batches, the split of the data and its noise.",
        f"Candidates are the last {first.n} checkpoints of each training. Strategies see training and validation data; "
        "test figures are computed only after every choice is made. `best`, soup and ASWA use the validation metric "
        "where the domain has one; SeWA, TWA and blend the loss, or the metric where the loss does not rank mixtures "
        "like it (`--select-by auto`). `compare's pick` is what `ckptavg compare` of all of them would write. Figures "
        "are means over seeds; larger is better. Differences "
        "are paired by seed; ± is the half-width of a 95 % t-interval over seeds, bold where the interval excludes "
        "zero (and there are at least three seeds): of so many intervals, one in twenty would do so by chance. *rank* "
        f"is the rank of a uniform average of {first.k} by validation loss among all {first.subsets} such averages "
        "(median, and range). Cost is that of the search and one score of its result, as if each strategy ran alone: "
        "in *epochs* of training (a backward pass counts as two forward passes), in seconds, and in percent of the "
        "seconds of the training.",
    ]
    if skipped:
        text.append("Not supported by this ckptavg, and not run: " + ", ".join(f"`{spec}`" for spec in skipped))
    specs = dict.fromkeys((row.label, row.spec) for record in records for row in record.rows)
    text.append("Specifications: " + "; ".join(f"{label} `{spec}`" for label, spec in specs) + ".")
    return text


def _command(found: Sequence[Setting]) -> str:
    plan = PLANS.get(found[0].records[0].plan)
    words = ["./scripts/study/run.sh"]
    if plan is not None and plan.name != "full":
        words.append(f"--{plan.name}")
    names = list(dict.fromkeys(one.name for one in found))
    if names != list(DOMAINS):
        words += ["--domains", ",".join(names)]
        words += ["--data", "PATH"] if any(one.domain.needs_data for one in found) else []
    seeds = max(len(one.records) for one in found)
    if plan is not None and seeds != plan.seeds:
        words += ["--seeds", str(seeds)]
    return " ".join(words)


def _counts(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder / "results.jsonl", folder)

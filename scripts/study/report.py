"""Write the study's Markdown and pictures from recorded results.

python -m study.report build/study/full/results.jsonl build/study/full
python -m study.report docs/study/results.jsonl.gz docs study     # pictures below docs/study
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from study import calibration_results, figures, recipe_results
from study.answer import answer
from study.claims import claims
from study.domains import DOMAINS
from study.plan import PLANS
from study.record import Failure, Record, read
from study.setting import Setting, settings
from study.tables import agreement, folded, overview, setting_table, table

NAME = "study.md"


def write(results: Path, out: Path, pictures: str = ".") -> None:
    """Write ``study.md`` into ``out``, and its pictures into the folder ``pictures`` below it."""
    known = read(results)
    latest = {one.domain: one.digest for one in known}  # the last record of each cell counts
    kept = [one for one in known if one.digest == latest[one.domain]]
    records = [one for one in kept if isinstance(one, Record)]
    failures = [one for one in kept if isinstance(one, Failure)]
    order = [*DOMAINS, *dict.fromkeys(one.domain for one in records if one.domain not in DOMAINS)]
    records.sort(key=lambda one: (order.index(one.domain), one.schedule, one.seed))
    found = settings(records)
    folder = out / pictures
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: str(Path(pictures, f"{name}.svg")) for name in figures.draw(found, folder)}
    recipes = recipe_results.section(recipe_results.read(results.with_name(recipe_results.NAME)))
    calibration = calibration_results.read(results.with_name(calibration_results.NAME))
    more = [*recipes, *calibration_results.section(calibration, out, pictures)]
    text = document(found, failures, drawn, others=len(known) - len(kept), more=more)
    (out / NAME).write_text(text, encoding="utf-8")


def document(
    found: Sequence[Setting],
    failures: Sequence[Failure],
    drawn: dict[str, str],
    others: int,
    more: Sequence[str] = (),
) -> str:
    """Return the whole text.

    Args:
        found: the results.
        failures: trainings that could not be measured.
        drawn: domains that have a picture → its path.
        others: number of results in the same file that were made with other settings, and are left out.
        more: sections on other questions.
    """
    parts = ["# Which averaging strategy is worth running?"]
    real, toys = [one for one in found if one.domain.area], [one for one in found if not one.domain.area]
    main = real or toys
    parts += [*answer(main), overview(main), _picture("Mean place of each strategy, by area", drawn, figures.OVERVIEW)]
    parts += ["## How it was measured", *_method(found)] if found else ["Nothing has been measured."]
    if others:
        parts.append(f"{others} results in the same file have other settings or strategies and are not shown.")
    if failures:
        rows = [[one.domain, str(one.seed), one.schedule, one.error.splitlines()[0]] for one in failures]
        parts += ["## Trainings that failed", table(["domain", "seed", "schedule", "error"], rows)]
    for area in dict.fromkeys(one.domain.area for one in real):
        parts += [f"## {area}", *_domains([one for one in real if one.domain.area == area], drawn)]
    if found:
        parts += [*claims(found), *agreement(found)]
    parts += more
    if real and toys:
        about = "Six trainings of seconds each, without data from elsewhere; here every average of five was scored."
        parts += ["## Appendix: toys", about, *answer(toys), overview(toys)]
    parts += _domains(toys, drawn)
    return "\n\n".join(filter(None, parts)) + "\n"


def _domains(found: Sequence[Setting], drawn: dict[str, str]) -> list[str]:
    parts: list[str] = []
    told = ""
    for name in dict.fromkeys(one.name for one in found):
        mine = [one for one in found if one.name == name]
        about, told = mine[0].domain.about.removeprefix(told), mine[0].domain.about
        parts += [f"### {mine[0].domain.title}", f"{about} {_sizes(mine)}".strip(), f"    {_command(mine)}"]
        parts.append(_picture("Differences of the test figure from SWA", drawn, name))
        parts += [folded(f"{one.title}: all strategies", setting_table(one)) for one in mine]
    return parts


def _picture(caption: str, drawn: dict[str, str], name: str) -> str:
    return f"![{caption}]({drawn[name]})" if name in drawn else ""


def _sizes(mine: Sequence[Setting]) -> str:
    record = mine[0].records[0]
    counts = _counts([len(one.records) for one in mine])
    text = f"{record.n} candidates; {counts} seeds of each; K = {record.k}."
    if not mine[0].domain.ordered:
        return text
    seconds = fmean(record.seconds for one in mine for record in one.records)
    return f"{text} A training has {record.epochs:.3g} epochs and takes {seconds:.3g} s."


def _method(found: Sequence[Setting]) -> list[str]:
    records = [record for one in found for record in one.records]
    machines = "; ".join(dict.fromkeys(record.machine for record in records))
    skipped = list(dict.fromkeys(spec for record in records for spec in record.skipped))
    names = list(dict.fromkeys(one.name for one in found))
    text = [
        f"    {_command(found)}",
        f"{machines}; one thread per training. {len(records)} trainings: {len(found)} settings (domain and learning "
        f"rate schedule) of {len(names)} domains, {_counts([len(one.records) for one in found])} seeds of each (fewer "
        "where a training takes long: each section says how many, and the command that makes them). A seed determines "
        "the initial weights, the order of the batches, the split of the data and its noise.",
        "Candidates are the last checkpoints of each training. Strategies see training and validation data; test "
        "figures are computed only after every choice is made. `best`, soup and ASWA use the validation metric where "
        "the domain has one; SeWA, TWA and blend the loss, or the metric where the loss does not rank mixtures like "
        "it (`--select-by auto`). `compare's pick` is what `ckptavg compare` of all of them would write; rows without "
        "cost are other tools' averages.",
        "*Mean place* is the position by test figure among the strategies, averaged over seeds, the settings of an "
        "area, and then the areas (ties share a place); *by test loss* the one by that. Figures are means over seeds; "
        "larger is better. Differences are paired by seed; ± is the half-width of a 95 % t-interval over seeds, bold "
        "where the interval excludes zero (and there are at least three seeds). The columns *SWA*, *last* and *best* "
        "(the best single checkpoint by validation) count the settings in which it lies above / below: by chance, one "
        "in forty each. Differences of the test loss are in percent of that of SWA. *Cost* is that of the search and "
        "one score of its result, as if each strategy ran alone, in *passes* over the training data (a backward pass "
        "counts as two forward passes) and in seconds, in percent of those of the training. Of losses and costs the "
        "first table has the median over the trainings of an area, averaged over areas, and the area that is worst.",
    ]
    if skipped:
        text.append("Not supported by this ckptavg, and not run: " + ", ".join(f"`{spec}`" for spec in skipped))
    specs: dict[str, dict[str, None]] = {}
    for row in (row for record in records for row in record.rows):
        specs.setdefault(row.label, {})[row.spec] = None
    named = (f"{label} {' or '.join(f'`{spec}`' for spec in each)}" for label, each in specs.items())
    text.append(f"Specifications: {'; '.join(named)}.")
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
    write(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])

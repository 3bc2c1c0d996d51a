"""Section of a model card: what was averaged, how it scored, how to load and to rebuild it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptavg.errors import counted
from ckptavg.report.markdown_tables import score_table
from ckptavg.report.markup import block, code, details, escaped, table
from ckptavg.score import DATA

_FEW: Final = 12  # sources that are shown unfolded


@dataclass(frozen=True, kw_only=True)
class Source:
    """An averaged checkpoint: its name below the directory of the candidates, and the digest of each of its files."""

    name: str
    step: int
    coefficients: Sequence[float]
    digests: Mapping[str, str]


def section(report: Mapping[str, Any], sources: Sequence[Source], rebuild: Sequence[str], load: str) -> str:
    """Return the Markdown of the section, which the same inputs make the same: without times, hosts and directories.

    Args:
        report: as `ckptavg.report.as_json.to_dict` returns it.
        rebuild: the commands that make the model again and verify it.
        load: Python code that loads the model.
    """
    return "\n\n".join([*_averaged(report, sources), *_scores(report), *_use(sources, rebuild, load)]) + "\n"


def _averaged(report: Mapping[str, Any], sources: Sequence[Source]) -> Iterator[str]:
    n, output = len(report["candidates"]), report["output"]
    yield "## Checkpoint averaging"
    by = f"`ckptavg {report['strategy']}` (ckptavg {report['version']})"
    if report["replaced"]:
        yield f"This is the best single one of {counted(n, 'checkpoint')}: it scored higher than the selection of {by}."
    elif len(sources) == 1:
        yield f"This is one of {counted(n, 'checkpoint')}, chosen by {by}."
    else:
        how = "each weight is a sum in float64 over the checkpoints, rounded once"
        yield (
            f"This model is an average of {len(sources):,} of {counted(n, 'checkpoint')}, with coefficients chosen by "
            f"{by}; {how} to {escaped(output['dtype'])}."
        )
    rows = [
        [code(source.name, cell=True), str(source.step), _range(source.coefficients)] for source in sources
    ]  # fmt: skip
    text = table(["checkpoint", "step", "coefficient"], rows)
    yield text if len(sources) <= _FEW else details(counted(len(sources), "averaged checkpoint"), text)
    texts = {
        "recomputed": "BatchNorm's statistics were recomputed from data",
        "not_averaged": "not averaged, but copied from the last of these checkpoints",
    }
    for key, text in texts.items():
        if names := output[key]:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            yield f"{text}: {', '.join(map(code, names[:2]))}{more}."


def _range(coefficients: Sequence[float]) -> str:
    low, high = min(coefficients), max(coefficients)
    return f"{low:.6g}" if len(coefficients) == 1 else f"{low:.6g} … {high:.6g}"


def _scores(report: Mapping[str, Any]) -> Iterator[str]:
    yield "### Scores"
    if not report["scores"]:
        yield "It was not scored."
        return
    yield f"**{escaped(report['verdict'])}**"
    yield score_table(report)
    split = report["scored_on"]
    examples = ", ".join(
        f"{counted(score['examples'], 'example')} of {DATA[name]} data"
        for name, score in report["scores"].items()
        if score["examples"] is not None
    )
    held = report["holdout"]
    kept = f" test: {held:.0%} of the validation data, kept out of the search." if held is not None else ""
    yield f"{f'Measured on {examples}. ' if examples else ''}{split}: the data that choices were made on.{kept}"


def _use(sources: Sequence[Source], rebuild: Sequence[str], load: str) -> Iterator[str]:
    yield f"### Loading\n\n{block(load, 'python')}"
    yield "### Rebuilding"
    yield f"`CKPTS` is the directory of the checkpoints:\n\n{block(chr(10).join(rebuild), 'sh')}"
    rows = [
        [code(source.name if len(source.digests) == 1 else f"{source.name}: {name}", cell=True), code(digest)]
        for source in sources
        for name, digest in source.digests.items()
    ]
    if rows:
        yield details("digests of the averaged files", table(["file", "digest"], rows, left=2))

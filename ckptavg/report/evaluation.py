"""Scores of files as a table: a row per file."""

from ckptavg.report.digits import ERROR, figure_column
from ckptavg.report.layout import FittedTable
from ckptavg.report.result import Evaluation


def scores_table(evaluation: Evaluation) -> FittedTable:
    """Return the table of the figures of every file."""
    columns = {
        f"{split} {name}": figure_column([file.scores.get(split) for file in evaluation.files], name)
        for split, score in evaluation.files[0].scores.items() for name in score.figures
    }  # fmt: skip
    rows = [[str(file.path), *(cells[i] for cells, _ in columns.values())] for i, file in enumerate(evaluation.files)]
    foot = [ERROR, *(error for _, error in columns.values())]
    return FittedTable(title="", headings=["file", *columns], rows=rows, foot=foot)

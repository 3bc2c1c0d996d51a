"""Scores of files as a table: a row per file."""

from ckptavg.errors import decimal
from ckptavg.report.layout import FittedTable
from ckptavg.report.result import Evaluation


def scores_table(evaluation: Evaluation) -> FittedTable:
    """Return the table of the figures of every file."""
    columns = [f"{split} {name}" for split, score in evaluation.files[0].scores.items() for name in score.figures]
    rows = [
        [str(file.path), *(decimal(value) for score in file.scores.values() for value in score.figures.values())]
        for file in evaluation.files
    ]
    return FittedTable(title="", headings=["file", *columns], rows=rows)

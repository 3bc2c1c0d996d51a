"""Scores of files as a table: a row per file, or per split where there are many figures."""

from typing import Final

from rich.table import Table
from rich.text import Text

from ckptavg.errors import printable
from ckptavg.report.result import Evaluation

_MOST: Final = 5  # columns of figures; more are divided into a row for each split


def scores_table(evaluation: Evaluation) -> Table:
    """Return the table of the figures of every file."""
    scored = evaluation.files
    columns = [(split, name) for split, score in scored[0].scores.items() for name in score.figures]
    split_rows = len(columns) > _MOST
    headings = list(dict.fromkeys(name for _, name in columns)) if split_rows else [" ".join(pair) for pair in columns]
    table = Table(box=None, pad_edge=False)
    for heading in ("file", *(["data"] if split_rows else [])):
        table.add_column(heading)
    for heading in headings:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for file in scored:
        cells = {split: [f"{value:.4f}" for value in score.figures.values()] for split, score in file.scores.items()}
        whole = [figure for figures in cells.values() for figure in figures]
        for row in [[split, *figures] for split, figures in cells.items()] if split_rows else [whole]:
            table.add_row(Text(printable(str(file.path))), *row)
    return table

"""Display of a report object: `Report` is the base of the classes that a run returns."""

import io
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rich.console import Console, RenderableType

from ckptavg.errors import UsageError

if TYPE_CHECKING:
    from pandas import DataFrame

_NARROWEST: Final = 80  # columns of a text
_HTML: Final = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


class Report:
    """Result of a run: ``print`` shows the verdict and a small table, a notebook the whole report.

    Attributes:
        kind: the kind of report, as in its JSON.
    """

    kind: ClassVar[str]

    def __rich__(self) -> RenderableType:
        from ckptavg.report import table

        return table.render(self)

    def __str__(self) -> str:
        from ckptavg.report import table

        console = Console(file=io.StringIO(), highlight=False, force_jupyter=False, color_system=None)
        console.width = max(console.width, _NARROWEST)
        with console.capture() as capture:
            console.print(table.summary(self))
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")

    def __repr__(self) -> str:
        winner = getattr(self, "winner", "") or getattr(self, "strategy", "")
        output = getattr(self, "output", None)
        parts = (type(self).__name__, winner, str(output.path) if output else "")
        return f"<{' '.join(filter(None, parts))}>"

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), highlight=False, force_jupyter=False, record=True, width=120)
        console.print(self)
        return console.export_html(inline_styles=True, code_format=_HTML)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report as a dictionary."""
        from ckptavg.report import as_json

        return as_json.to_dict(self)

    def to_json(self) -> str:
        """Return the JSON report, which ``--report`` writes."""
        from ckptavg.report import as_json

        return as_json.to_json(self)

    def to_pandas(self) -> "DataFrame":
        """Return the report's rows (strategies, candidates, files or random mixtures), with a dot in nested names.

        Raises:
            UsageError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError("to_pandas() needs pandas", hint="pip install pandas") from error
        data = self.to_dict()
        if "predicted" in data:
            return pandas.DataFrame({name: data[name] for name in ("predicted", "measured")})
        rows = next((data[name] for name in ("strategies", "candidates", "files") if name in data), data)
        return pandas.json_normalize(rows)

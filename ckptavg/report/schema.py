"""The published JSON Schema of reports, and the check of a file that is to be one."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ckptavg.errors import InputError, UsageError
from ckptavg.report.as_json import SCHEMA_VERSION


def schema() -> dict[str, Any]:
    """Return ``report.schema.json``: JSON Schema, draft 2020-12."""
    return json.loads(resources.files("ckptavg.report").joinpath("report.schema.json").read_text(encoding="utf-8"))


def check(report: Any, path: Path) -> None:
    """Check a report that was read from ``path``.

    Raises:
        InputError: naming the key that is wrong; or if a newer version of ckptavg wrote the report.
        UsageError: if the package jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
    except ImportError as error:
        raise UsageError("reading a report needs jsonschema", hint="pip install 'ckptavg[plot]'") from error
    if not isinstance(report, dict) or "schema_version" not in report:
        raise InputError("is no report of ckptavg", path=path, hint="--report run.json writes one")
    if report["schema_version"] is True or report["schema_version"] != SCHEMA_VERSION:
        message = f"is a report of schema version {report['schema_version']!r}; this ckptavg reads {SCHEMA_VERSION}"
        raise InputError(message, path=path, hint="install the version of ckptavg that wrote it, or a newer one")
    error = best_match(Draft202012Validator(schema()).iter_errors(report))
    if error is not None:
        raise InputError(f"is no report of ckptavg: {error.json_path}: {error.message}", path=path)

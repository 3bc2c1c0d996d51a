"""Data files as rows: JSON lines, JSON, CSV, Parquet, a saved `datasets` directory, a folder of images.

Nothing is written anywhere, and nothing but the named path is read.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import InputError, UsageError

IMAGES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_KINDS: Final = "known are .jsonl, .json, .csv, .parquet, a directory of save_to_disk() and a folder of images"
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """The examples of one split.

    Attributes:
        path: the file or directory.
        rows: column → value, one an example.
        lines: the line of the file on which each row is, or empty where it has none.
        classes: the names of the classes in the order of their numbers, where a label is such a number; else empty.
    """

    path: Path
    rows: Sequence[Row]
    lines: Sequence[int] = ()
    classes: Sequence[str] = ()

    def where(self, i: int) -> str:
        """Row ``i`` as an error names it."""
        return f"{self.path}:{self.lines[i]}" if self.lines else f"{self.path}: row {i + 1}"

    def value(self, i: int, column: str, kind: type) -> Any:
        """What row ``i`` has in a column.

        Raises:
            InputError: if it has none, or it is not of this kind.
        """
        value = self.rows[i].get(column)
        if not isinstance(value, kind):
            found = "nothing" if value is None else f"a {type(value).__name__}"
            raise InputError(f"`{column}` must be a {kind.__name__}, here is {found}", path=self.where(i))
        return value

    def label(self, i: int, ids: Mapping[str, int]) -> int:
        """The class of row ``i`` by the model's own numbers.

        A name is looked up in ``ids``; a number is taken as it is, also where it is written as text. Of a file that
        names its classes the name counts, and the number only where the model's names are LABEL_0, LABEL_1, ….

        Args:
            i: the row.
            ids: ``label2id`` of the model's configuration.
        Raises:
            InputError: if the model has no such class.
        """
        label = self.rows[i].get("label")
        if self.classes and isinstance(label, int) and 0 <= label < len(self.classes):
            nameless = set(ids) == {f"LABEL_{n}" for n in range(len(ids))}
            label = label if nameless else self.classes[label]
        if isinstance(label, str):
            label = ids.get(label, int(label) if label.isdecimal() and label.isascii() else label)
        if isinstance(label, int) and 0 <= label < len(ids):
            return int(label)
        known = ", ".join(list(ids)[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise InputError(
            f"unknown label {label!r}; config.json knows {known}",
            path=self.where(i),
            hint="`label2id` in config.json names the classes",
        )


def read(path: Path) -> DataFile:
    """The rows of a file or directory, whose kind its name or contents tell.

    Raises:
        UsageError: if there is no such file, or its kind is unknown.
        InputError: if it is damaged or empty.
    """
    if not os.path.lexists(path):
        raise UsageError("no such data file", path=path, hint="--val, --train and --test name files or directories")
    try:
        data = _read(path)
    except OSError as error:
        raise InputError(error.strerror or str(error), path=path) from error
    if not len(data.rows):
        raise InputError("is empty", path=path, hint="there must be at least one example")
    if isinstance(data.rows, list):
        for i, row in enumerate(data.rows):
            if not isinstance(row, dict):
                what = f"is a JSON {type(row).__name__}, not an object"
                raise InputError(what, path=data.where(i), hint='such as {"text": "…"}')
    return data


def _read(path: Path) -> DataFile:
    suffix = path.suffix.lower()
    if path.is_dir():
        saved = any((path / name).exists() for name in ("state.json", "dataset_info.json", "dataset_dict.json"))
        return _saved(path) if saved else _image_folder(path)
    if suffix in (".jsonl", ".ndjson"):
        return _table(path, _json_lines(path))
    if suffix == ".json":
        return _json(path)
    if suffix == ".csv":
        return _table(path, _csv_lines(path))
    if suffix == ".parquet":
        return _parquet(path)
    raise UsageError("is of an unknown kind", path=path, hint=_KINDS)


def _table(path: Path, rows: Iterator[tuple[int, Row]]) -> DataFile:
    found = list(rows)
    return DataFile(path=path, rows=[row for _, row in found], lines=[line for line, _ in found])


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parsed(line, f"{path}:{number}")


def _json(path: Path) -> DataFile:
    """A list of objects; or JSON lines, which often have this name too."""
    content = path.read_bytes()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _table(path, _json_lines(path))
    return DataFile(path=path, rows=_parsed(content, str(path)))


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text: {error.reason}", path=where, hint="save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"is no JSON: {error}", path=where, hint="every line of a .jsonl file is an object") from error


def _csv_lines(path: Path) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of a cell; the usual 128 KiB is less than a document
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    many = f"{'more' if None in row else 'fewer'} cells than the first"
                    raise InputError(f"this line has {many}", path=f"{path}:{reader.line_num}")
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        hint = "save it as UTF-8, with a line of names first"
        raise InputError(f"is no CSV: {error}", path=path, hint=hint) from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> DataFile:
    datasets = _datasets()
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    try:
        with path.open("rb") as file:
            table = parquet.read_table(file)
        return _arrow(path, datasets.Dataset(table, fingerprint="none"))  # without one, all of it is hashed
    except pyarrow.ArrowException as error:
        raise InputError(f"is no Parquet file: {error}", path=path) from error


def _saved(path: Path) -> DataFile:
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UsageError("holds several splits", path=path, hint=f"name one: {path / (splits or ['train'])[0]}")
    datasets = _datasets()
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return _arrow(path, datasets.load_from_disk(str(path)))
    except Exception as error:  # the boundary to code that is not ours: it raises Arrow's errors, KeyError, ValueError
        raise InputError(f"is no directory that save_to_disk() wrote: {error}", path=path, hint=_KINDS) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _arrow(path: Path, rows: Any) -> DataFile:
    return DataFile(path=path, rows=rows, classes=tuple(getattr(rows.features.get("label"), "names", None) or ()))


def _image_folder(path: Path) -> DataFile:
    """A subdirectory a class, numbered in the order of their names, as `datasets` does."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    rows = [
        {"image": str(image.relative_to(path)), "label": i}
        for i, folder in enumerate(folders)
        for image in sorted(folder.rglob("*"))
        if image.suffix.lower() in IMAGES
    ]
    if not rows:
        raise InputError("has no subdirectories with images", path=path, hint=_KINDS)
    return DataFile(path=path, rows=rows, classes=tuple(folder.name for folder in folders))


def _datasets() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("this kind of data needs `datasets`", hint="pip install 'ckptavg[hf]'") from error
    return datasets

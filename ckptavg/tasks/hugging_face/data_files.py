"""Data files as rows: JSON lines, JSON, CSV, Parquet, a saved `datasets` directory, a folder of images.

Nothing is written, and only the given path is read.
"""

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckptavg.errors import InputError, UsageError
from ckptavg.filesystem.regular_file import is_folder
from ckptavg.tasks.hugging_face.library import imported

IMAGES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_KINDS: Final = "supported are .jsonl, .json, .csv, .parquet, a directory of save_to_disk() and a folder of images"
LABELS: Final = ("label", "ner_tags", "labels")  # columns of class names or numbers
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """The examples of one split."""

    path: Path
    rows: Sequence[Row]  # column → value, one mapping per example
    lines: Sequence[int] = ()  # the line number of each row; empty if the format has no lines
    classes: Sequence[str] = ()  # class names in the order of their indices, if labels are such indices; else empty

    def where(self, i: int) -> str:
        """Return the location of row ``i`` for errors."""
        return f"{self.path}:{self.lines[i]}" if self.lines else f"{self.path}: row {i + 1}"

    def value(self, i: int, column: str, kind: type) -> Any:
        """Return the value of row ``i`` in ``column``; InputError if it is missing or not of type ``kind``."""
        value = self.rows[i].get(column)
        if not isinstance(value, kind):
            actual = "nothing" if value is None else f"a {type(value).__name__}"
            raise InputError(f"`{column}` must be a {kind.__name__}, not {actual}", path=self.where(i))
        return value

    def image(self, i: int) -> Any:
        """Return the PIL image of row ``i``, else an InputError; a path is relative to the data file."""
        from PIL import Image

        image = self.rows[i]["image"]
        if isinstance(image, str):
            path = (self.path if is_folder(self.path) else self.path.parent) / image
            try:
                image = Image.open(path)
                image.load()
            except OSError as error:
                raise InputError(f"cannot be read as an image: {error}", path=path) from error
        if not isinstance(image, Image.Image):
            raise InputError("`image` must be an image or the path of one", path=self.where(i))
        return image

    def label(self, i: int, ids: Mapping[str, int]) -> int:
        """Return the class index of row ``i``; see `_class_index`."""
        return self._class_index(self.rows[i].get("label"), i, ids)

    def tags(self, i: int, column: str, ids: Mapping[str, int]) -> list[int]:
        """Return the class indices of the words of row ``i``, one for each of its tokens; see `_class_index`."""
        words, tags = self.value(i, "tokens", list), self.value(i, column, list)
        if len(words) != len(tags) or not all(isinstance(word, str) for word in words):
            message = f"`tokens` must be words, each with one of `{column}`: {len(words)} and {len(tags)}"
            raise InputError(message, path=self.where(i))
        return [self._class_index(tag, i, ids) for tag in tags]

    def _class_index(self, label: Any, i: int, ids: Mapping[str, int]) -> int:
        """Return the model's number of a label in row ``i``.

        A name is looked up in ``ids``; a number, even as text, is used as is. If the file names its classes, the name
        is looked up instead of the number, unless the model's names are the default LABEL_0, LABEL_1, ….

        Raises:
            InputError: if the model has no such class, or only default names.
        """
        is_default = set(ids) == {f"LABEL_{n}" for n in range(len(ids))}
        if self.classes and isinstance(label, int) and 0 <= label < len(self.classes):
            label = label if is_default else self.classes[label]
        if isinstance(label, str):
            label = ids.get(label, int(label) if label.isdecimal() and label.isascii() else label)
        if isinstance(label, int) and 0 <= label < len(ids):
            return int(label)
        if is_default and isinstance(label, str):
            names = self._names()
            example = ",".join(names if len(names) == len(ids) else ["NAME"] * min(len(ids), 3))
            message = f"its labels are names, {_listed(names)}, and nothing says which of {len(ids)} classes each is"
            hint = f"give the names in the order of the class numbers in training, such as --labels {example}"
            raise InputError(message, path=self.path, hint=hint)
        hint = "--labels NAME,NAME gives the names in the order of the class numbers in training"
        raise InputError(f"unknown label {label!r}; the model has {_listed(list(ids))}", path=self.where(i), hint=hint)

    def _names(self) -> list[str]:
        """Return the labels that are names, in alphabetical order."""
        values = (row.get(column) for row in self.rows for column in LABELS)
        flat = (one for value in values for one in (value if isinstance(value, list) else [value]))
        return sorted({name for name in flat if isinstance(name, str)})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read(path: Path) -> DataFile:
    """Read a file or directory into rows, detecting its format from its name or contents.

    Raises:
        UsageError: if there is no such file, or its format is not supported.
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
    for i, row in enumerate(data.rows if isinstance(data.rows, list) else ()):
        if not isinstance(row, dict):
            message = f"is a JSON {type(row).__name__}, not an object"
            raise InputError(message, path=data.where(i), hint='write objects such as {"text": "…"}')
    return data


def _read(path: Path) -> DataFile:
    if path.is_dir():
        saved = any((path / name).exists() for name in ("state.json", "dataset_info.json", "dataset_dict.json"))
        return _saved(path) if saved else _image_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".json":  # a list of objects, or JSON lines, which often have this suffix too
        content = path.read_bytes()
        if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return DataFile(path=path, rows=_parsed(content, str(path)))
    if suffix not in (".jsonl", ".ndjson", ".json", ".csv"):
        raise UsageError("is not of a supported format", path=path, hint=_KINDS)
    if suffix == ".csv":
        numbered = list(_csv_lines(path))
    else:
        with path.open("rb") as file:
            numbered = [(i, _parsed(line, f"{path}:{i}")) for i, line in enumerate(file, 1) if line.strip()]
    return DataFile(path=path, rows=[row for _, row in numbered], lines=[line for line, _ in numbered])


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text: {error.reason}", path=where, hint="save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        hint = "every line of a .jsonl file is an object"
        raise InputError(f"is not JSON: {error}", path=where, hint=hint) from error


def _csv_lines(path: Path) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # of a cell; the default of 128 KiB is too short
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    count = f"{'more' if None in row else 'fewer'} cells than the first"
                    raise InputError(f"this line has {count}", path=f"{path}:{reader.line_num}")
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        hint = "save it as UTF-8, with a header line of column names"
        raise InputError(f"is not CSV: {error}", path=path, hint=hint) from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> DataFile:
    datasets = imported("datasets")
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    try:
        with path.open("rb") as file:
            table = parquet.read_table(file)
        return _arrow(path, datasets.Dataset(table, fingerprint="none"))  # without one, the whole table is hashed
    except pyarrow.ArrowException as error:
        raise InputError(f"is not a Parquet file: {error}", path=path) from error


def _saved(path: Path) -> DataFile:
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UsageError("holds several splits", path=path, hint=f"name one: {path / (splits or ['train'])[0]}")
    datasets = imported("datasets")
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return _arrow(path, datasets.load_from_disk(str(path)))
    except Exception as error:  # boundary to third-party code: Arrow errors, KeyError, ValueError
        raise InputError(f"is not a directory written by save_to_disk(): {error}", path=path, hint=_KINDS) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _arrow(path: Path, rows: Any) -> DataFile:
    columns = (rows.features.get(name) for name in LABELS)
    kinds = (getattr(column, "feature", column) for column in columns)  # of a list, its elements
    return DataFile(path=path, rows=rows, classes=tuple(next((k.names for k in kinds if hasattr(k, "names")), ())))


def _image_folder(path: Path) -> DataFile:
    """Read one class per subdirectory, numbered in name order as `datasets` does."""
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

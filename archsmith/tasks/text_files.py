"""Labelled texts out of files: CSV, TSV and JSON lines, plain or compressed by gzip or xz.

A file has a header line (CSV, TSV) or one object per line with a text (``text`` or ``sentence``) and a ``label``. TSV
is read without quoting: a tab separates, a line ends a row. Empty lines between rows are skipped; a row without a text
or a label is an error that names its line.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsmith.core.errors import Shown, UserError

TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMN = "label"
SUFFIXES = (".tsv", ".csv", ".jsonl")

PARTS = {"train": ("train", "train10k"), "valid": ("valid", "validation", "val"), "test": ("test",)}
"""File names without their endings by part."""


@dataclass(frozen=True)
class LabelledTexts:
    """Rows of one file.

    Attributes:
        path: Where they come from.
        texts: Without spaces around them.
        labels: As they are written.
        lines: Line of each row, from 1.
    """

    path: Path
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    lines: tuple[int, ...]


def find_parts(path: Path, names: Mapping[str, Sequence[str]] | None = None) -> dict[str, Path]:
    """Return the file of every part of a folder, or a single file as the training part.

    Args:
        path: File or folder.
        names: File names without endings by part; ``PARTS`` if None.

    Raises:
        UserError: There is no training file, or a part has two.
    """
    if path.is_file():
        return {"train": path}
    found: dict[str, Path] = {}
    for part, stems in (names or PARTS).items():
        there = [file for stem in stems for file in sorted(path.glob(f"{stem}.*")) if _kind(file)]
        if len(there) > 1:
            raise UserError(
                "data", Shown(f"{' and '.join(file.name for file in there)} in {path}"), allowed=f"one {part} file"
            )
        if there:
            found[part] = there[0]
    if "train" not in found:
        kinds = ", ".join(SUFFIXES)
        raise UserError(
            "data",
            Shown(f"{path}, where there is no training file"),
            allowed=f"a file of texts with labels, or a folder with train.*, maybe valid.*, test.* ({kinds}; .gz, .xz)",
        )
    return found


def read_texts(path: Path) -> LabelledTexts:
    """Return the rows of a file.

    Raises:
        UserError: The file cannot be read, has other columns, no rows, or a row without a text or a label.
    """
    kind = _kind(path)
    if not kind:
        raise UserError("data", str(path), allowed=f"a file that ends in {', '.join(SUFFIXES)}, maybe with .gz or .xz")
    try:
        rows = list(_rows(path, kind))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            "data", Shown(f"{path}, which cannot be read: {error}"), allowed="a text file in UTF-8"
        ) from error
    if not rows:
        raise UserError("data", Shown(f"{path} without any row"), allowed="at least one text with its label")
    texts, labels, lines = [], [], []
    for line, row in rows:
        text = next((row[name] for name in TEXT_COLUMNS if row.get(name) is not None), None)
        label = row.get(LABEL_COLUMN)
        if text is None or label is None:
            named = ", ".join(str(name) for name in row if name is not None)
            raise UserError(
                "data",
                Shown(f"columns {named or 'without names'} in {path}, line {line}"),
                allowed=f"a text ({' or '.join(TEXT_COLUMNS)}) and a {LABEL_COLUMN} in every row",
            )
        if not str(text).strip() or not str(label).strip():
            missing = "text" if not str(text).strip() else "label"
            raise UserError(
                "data", Shown(f"an empty {missing} in {path}, line {line}"), allowed="a text and a label in every row"
            )
        texts.append(str(text).strip())
        labels.append(str(label).strip())
        lines.append(line)
    return LabelledTexts(path, tuple(texts), tuple(labels), tuple(lines))


def class_numbers(rows: LabelledTexts, classes: Sequence[str]) -> list[int]:
    """Return the number of every row's class.

    Args:
        rows: What was read.
        classes: Labels as files write them, in the order of their numbers.

    Raises:
        UserError: A row has another label.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    for label, line in zip(rows.labels, rows.lines, strict=True):
        if label not in numbers:
            shown = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise UserError(
                "data", Shown(f"the label {label!r} in {rows.path}, line {line}"), allowed=f"one of {shown}"
            )
    return [numbers[label] for label in rows.labels]


def classes_of(rows: LabelledTexts) -> tuple[str, ...]:
    """Return the distinct labels, whole numbers by their value and others in alphabetical order.

    Raises:
        UserError: There is one only.
    """
    distinct = set(rows.labels)
    if len(distinct) < 2:
        raise UserError("data", Shown(f"one label, {rows.labels[0]!r}, in {rows.path}"), allowed="at least two classes")
    if all(label.lstrip("-").isdecimal() for label in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


def _kind(path: Path) -> str:
    """Return the ending that says how rows are written, empty for none of ours."""
    plain = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
    return plain.suffix if plain.suffix in SUFFIXES else ""


def _rows(path: Path, kind: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "rt", encoding="utf-8-sig", newline=None if kind != ".csv" else "") as stream:
        if kind == ".csv":
            reader = csv.DictReader(stream)
            for row in reader:
                yield reader.line_num, row
            return
        header: list[str] | None = None
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            if kind == ".jsonl":
                yield number, _object(path, number, line)
            elif header is None:
                header = line.rstrip("\n").split("\t")
            else:
                yield number, dict(zip(header, line.rstrip("\n").split("\t"), strict=False))


def _object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError("data", Shown(f"no JSON in {path}, line {number}"), allowed="one object per line") from error
    if not isinstance(row, dict):
        raise UserError(
            "data", Shown(f"a {type(row).__name__} in {path}, line {number}"), allowed="one object per line"
        )
    return row

"""Columns of a benchmark table: read from .npz (numpy alone) or .parquet (extra ``tables``), or mapped from a folder.

Files are recognised by their SHA-256, so that a damaged file or another edition of a table is refused before it gives a
number. Nothing is downloaded and nothing is written, except a folder of ``.npy`` columns where the user asks for one
(``cache=``): it is memory-mapped, opens at once, and processes share its pages.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.core.files import read_json, sha256_file, storage_errors, write_atomic, write_json

FORMAT_VERSION = 1
"""Of a folder of columns."""

MANIFEST = "columns.json"

Columns = dict[str, np.ndarray]


def read_columns(
    field: str,
    path: str | Path,
    files: Mapping[str, str],
    *,
    checksum: bool = True,
    cache: str | Path | None = None,
) -> Columns:
    """Return the columns of a table file.

    Args:
        field: What the user knows the path by, for errors.
        path: The file, or a folder that holds it under one of its usual names.
        files: Usual file name → SHA-256; the first that exists in a folder is taken.
        checksum: Whether the content must have one of these digests; if not, any file with the right columns is read.
        cache: Folder of ``.npy`` columns: read if it was made from the same file, made otherwise. None for reading into
            memory.

    Raises:
        UserError: No such file, a digest that is none of the known ones, a file that cannot be read as a table.
        MissingExtra: A parquet file, and pyarrow is not installed.
    """
    file = _located(field, Path(path), files)
    digest = sha256_file(file)
    if checksum and digest not in files.values():
        known = " or ".join(f"{name} with sha256 {digest}" for name, digest in files.items())
        raise UserError(
            field,
            Shown(f"{file} with sha256 {digest}"),
            allowed=known,
            hint="It is damaged or another edition of the table: copy it again. checksum=False reads it as it is.",
        )
    if cache is None:
        return _read(field, file)
    folder = Path(cache)
    if not _made_from(folder, digest):
        _write(folder, _read(field, file), digest)
    return _mapped(folder)


def checked_columns(field: str, columns: Columns, needed: Mapping[str, str]) -> int:
    """Check that the needed columns are there, of the right kind and equally long; return the number of rows.

    Args:
        field: What the user knows the table by.
        columns: As read.
        needed: Column name → numpy kinds that will do ("iu" for integers, "f" for floats, "U" for text).

    Raises:
        UserError: Names the first column that is wrong.
    """
    lengths = {len(column) for column in columns.values()}
    for name, kinds in needed.items():
        if name not in columns:
            raise UserError(field, Shown(f"columns {sorted(columns)[:6]} ..."), allowed=f"a table with column {name!r}")
        if columns[name].dtype.kind not in kinds:
            raise UserError(f"{field}.{name}", str(columns[name].dtype), allowed=f"a column of kind {kinds!r}")
    if len(lengths) != 1 or lengths == {0}:
        raise UserError(field, sorted(lengths), allowed="columns of one length, at least 1")
    return lengths.pop()


def _located(field: str, path: Path, files: Mapping[str, str]) -> Path:
    candidates = [path / name for name in files] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(
        field,
        Shown(f"{path} ({'no table in this folder' if path.is_dir() else 'no such file'})"),
        allowed=f"the path of {' or '.join(files)}, or of the folder that holds it",
        hint="docs/guide/tables.md says what it is and where it comes from; archsmith never downloads on its own.",
    )


def _read(field: str, file: Path) -> Columns:
    try:
        with open(file, "rb") as stream:
            magic = stream.read(4)
        if magic == b"PK\x03\x04":
            with np.load(file) as archive:
                return {name: archive[name] for name in archive.files}
        if magic == b"PAR1":
            return _from_parquet(file)
    except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise _unreadable(field, file, f"{type(error).__name__}: {error}") from error
    raise _unreadable(field, file, "it starts like neither of them")


def _unreadable(field: str, file: Path, why: str) -> UserError:
    return UserError(field, Shown(str(file)), allowed="an .npz or .parquet file that is whole", hint=f"Reading: {why}.")


def _from_parquet(file: Path) -> Columns:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "tables", f"reading {file.name}") from error
    try:
        table = parquet.read_table(file)
    except arrow.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return {name: _plain(table.column(name)) for name in table.column_names}


def _plain(column: Any) -> np.ndarray:
    """Return an Arrow column as numbers or fixed-width text; lists of numbers as rows padded with NaN."""
    import pyarrow.types as kinds

    kind = column.type.value_type if kinds.is_dictionary(column.type) else column.type
    if kinds.is_list(kind) or kinds.is_large_list(kind):
        rows = column.to_pylist()
        padded = np.full((len(rows), max(map(len, rows), default=0)), np.nan, dtype=np.float32)
        for row, values in zip(padded, rows, strict=True):
            row[: len(values)] = values
        return padded
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=np.str_)
    return np.ascontiguousarray(column.to_numpy())


def _made_from(folder: Path, digest: str) -> bool:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        found = read_json(manifest)
        return bool(found["format_version"] == FORMAT_VERSION and found["source_sha256"] == digest)
    except (ValueError, KeyError, TypeError):
        return False


def _write(folder: Path, columns: Columns, digest: str) -> None:
    """Write the columns, the manifest last: a folder without it was not finished."""
    with storage_errors("cache", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for name, column in columns.items():
            buffer = io.BytesIO()
            np.save(buffer, column)
            write_atomic(folder / f"{name}.npy", buffer.getvalue())
        body = {"format_version": FORMAT_VERSION, "source_sha256": digest, "columns": list(columns)}
        write_json(folder / MANIFEST, body)


def _mapped(folder: Path) -> Columns:
    """Return views of the mapped files; plain views, because indexing ``numpy.memmap`` itself is slow."""
    columns: Columns = {}
    for name in read_json(folder / MANIFEST)["columns"]:
        try:
            columns[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise UserError(
                "cache",
                Shown(str(folder / f"{name}.npy")),
                allowed="the columns that archsmith wrote there",
                hint="Delete this folder; it is made again.",
            ) from error
    return columns

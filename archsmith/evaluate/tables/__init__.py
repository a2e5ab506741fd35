"""Benchmark tables: real results of thousands of trained networks, one file of code per benchmark.

A file that offers tables has a literal ``TABLES`` (per table a dictionary: name, title, rows, space, datasets,
fidelities, files with their SHA-256) that can be read without importing it, and a function
``open_table(name, path, **options)``. Tables are data of their authors: docs/guide/tables.md says where they come from.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.table import Reading, Table, TableEvaluator

__all__ = ["Reading", "Table", "TableEvaluator", "open_table", "table_catalogue"]


def table_catalogue() -> list[dict[str, Any]]:
    """Return one row per table, sorted by name, without importing any.

    Returns:
        The fields of ``TABLES`` (name, title, rows, space, datasets, fidelities as numbers or "1 to 50", files: file
        name → SHA-256, for some ``beside``: files with further columns) and ``module``.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TABLES" and node.value is not None:
                rows += [{**row, "module": path.stem} for row in ast.literal_eval(node.value)]
    return sorted(rows, key=lambda row: str(row["name"]))


def open_table(name: str, path: str | Path, **options: Any) -> Table:
    """Open a benchmark table.

    Args:
        name: One of ``table_catalogue()``.
        path: Its file, or the folder that holds it; nothing is downloaded.
        options: ``checksum=False`` reads other editions, ``cache=<folder>`` maps columns from disk; further ones of the
            table's own ``open_table``.

    Raises:
        UserError: Unknown name or option; a file that is missing, damaged or of another edition.
        MissingExtra: A parquet file, and pyarrow is not installed.

    Example:
        >>> table = open_table("nas-bench-201", "data/nas-bench-201.npz")  # doctest: +SKIP
        >>> table.values("test_accuracy", dataset="cifar100").argmax()  # doctest: +SKIP
        9930
    """
    homes = {str(row["name"]): str(row["module"]) for row in table_catalogue()}
    if name not in homes:
        raise UserError("table name", name, allowed=", ".join(homes))
    module = import_module(f"archsmith.evaluate.tables.{homes[name]}")
    try:
        table: Table = module.open_table(name, path, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        known = [each for each in module.open_table.__annotations__ if each not in ("name", "path", "return")]
        raise UserError("options", sorted(options), allowed=f"for {name}: {known}") from error
    return table

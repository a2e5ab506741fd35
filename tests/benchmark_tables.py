"""The real benchmark tables of the tests, opened once per process; skipped when the data is absent."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from shared_data import shared_data

from archsmith.evaluate.tables import Table, open_table, table_catalogue


def table_folder() -> Path:
    """Return the folder of the tables; skip when absent."""
    return shared_data("nas-benchmarks")


@cache
def real_table(name: str, *beside: str) -> Table:
    """Return a table; ``beside`` are names of further files in the folder."""
    file = next(iter(next(row for row in table_catalogue() if row["name"] == name)["files"]))
    folder = table_folder()
    options = {"beside": tuple(folder / each for each in beside)} if beside else {}
    return open_table(name, folder / file, **options)

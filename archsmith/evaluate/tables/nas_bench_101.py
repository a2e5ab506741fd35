"""NAS-Bench-101: 423,624 networks on CIFAR-10, mean test accuracy of three 108-epoch trainings, trainable parameters.

The table has neither validation accuracy nor training time: results have "test_accuracy" alone, and 0 seconds. Every
numbering of a network finds its row.

Source: arXiv 1902.09635.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.columns import checked_columns, read_columns
from archsmith.evaluate.tables.table import Reading, Table
from archsmith.families.graph_cells import GraphCellSpace, nas_bench_101_space
from archsmith.space import Architecture

TABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "nas-bench-101",
        "title": "NAS-Bench-101: 423,624 graph cells on CIFAR-10",
        "rows": 423624,
        "space": "nas-bench-101",
        "datasets": ("cifar10",),
        "fidelities": (108,),
        "files": {
            "nas-bench-101.npz": "3ebb97f05e3db6fe48dd7d8b834cfd61408fd69b0b1f20946ee83dca0361f31e",
            "nas-bench-101.parquet": "e75469d6cf99df2f5734a82f13ead143874e49d4f1b5b6b6f2b86940f8c0eed2",
        },
    },
)


class GraphIndex:
    """Labelled cell ↔ row of its network."""

    def __init__(self, space: GraphCellSpace, numbers: np.ndarray) -> None:
        self._space = space
        self._numbers = numbers
        row_of_class = np.full(space.size, -1, dtype=np.int32)
        row_of_class[space.classes[numbers]] = np.arange(len(numbers))
        self._rows = row_of_class[space.classes]

    def row(self, architecture: Architecture) -> int | None:
        """Return the row of the network."""
        row = int(self._rows[self._space.index(architecture)])
        return None if row < 0 else row

    def architecture(self, row: int) -> Architecture:
        """Return the network in the table's own numbering."""
        return self._space.at(int(self._numbers[row]))


def open_table(name: str, path: str | Path, *, checksum: bool = True, cache: str | Path | None = None) -> Table:
    """Open NAS-Bench-101.

    Args:
        name: "nas-bench-101".
        path: The .npz or .parquet file, or its folder.
        checksum: Whether the file must be a known edition.
        cache: Folder for memory-mapped columns, None for memory.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: A parquet file without pyarrow.
    """
    columns = read_columns("table", path, TABLES[0]["files"], checksum=checksum, cache=cache)
    if "op_code" not in columns and "ops" in columns:
        columns["op_code"] = np.array([int(digits, 3) if digits else 0 for digits in columns["ops"].tolist()])
    needed = {"n_vertices": "iu", "adj_bits": "iu", "op_code": "iu", "trainable_params": "iu", "test_acc_108ep": "f"}
    rows = checked_columns("table", columns, needed)
    space = nas_bench_101_space()
    numbers = space.indices(columns["n_vertices"], columns["adj_bits"], columns["op_code"])
    if (numbers < 0).any():
        row = int(np.flatnonzero(numbers < 0)[0])
        raise UserError(
            "table.adj_bits", f"row {row}", allowed="cells of at most 7 vertices and 9 edges, none to spare"
        )
    reading = Reading({"test_accuracy": 100 * columns["test_acc_108ep"].astype(np.float64)})
    costs = {"cifar10": {"params": columns["trainable_params"]}}
    index = GraphIndex(space, numbers)
    return Table(name, space, index, rows=rows, readings={"cifar10": {108.0: reading}}, costs=costs, columns=columns)

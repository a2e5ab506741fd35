"""NAS-Bench-Graph: 26,206 graph networks on eight data sets, and 2,021 of fewer operations on "proteins".

Two tables of one file, because their spaces differ. Accuracies are in percent, the recorded latency is
``latency_recorded`` in ms. The table has full trainings alone (fidelity 1) and does not record their time: 0 seconds.

Source: arXiv 2206.09166.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.columns import checked_columns, read_columns
from archsmith.evaluate.tables.table import Reading, Table
from archsmith.families.table_spaces import (
    GRAPH_LINKS,
    GRAPH_OPERATIONS,
    Tree,
    graph_tree,
    nas_bench_graph_proteins_space,
    nas_bench_graph_space,
)
from archsmith.space import Architecture, ProductSpace

TABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "nas-bench-graph",
        "title": "NAS-Bench-Graph: 26,206 graph networks on eight data sets",
        "rows": 26206,
        "space": "nas-bench-graph",
        "datasets": ("cora", "citeseer", "pubmed", "cs", "physics", "photo", "computers", "arxiv"),
        "fidelities": (1,),
        "files": {"nas-bench-graph.parquet": "f5830cf02deb212bb35936e66f6ffc9021f60db0d79d9e027c3151f781c46b42"},
    },
    {
        "name": "nas-bench-graph-proteins",
        "title": "NAS-Bench-Graph: 2,021 graph networks on proteins",
        "rows": 2021,
        "space": "nas-bench-graph-proteins",
        "datasets": ("proteins",),
        "fidelities": (1,),
        "files": {"nas-bench-graph.parquet": "f5830cf02deb212bb35936e66f6ffc9021f60db0d79d9e027c3151f781c46b42"},
    },
)

_CODE_OF: dict[Any, int] = {operation: code for code, operation in enumerate(GRAPH_OPERATIONS)}
_LINK_OF: dict[Any, int] = {links: code for code, links in enumerate(GRAPH_LINKS)}
_UNKNOWN = -2


class TreeIndex:
    """Network ↔ row; the table names one of several equal networks, all of them find it."""

    def __init__(self, space: ProductSpace, names: np.ndarray) -> None:
        self._space = space
        self._names: list[int] = names.tolist()
        self._rows = np.full(10**5, _UNKNOWN, dtype=np.int64)
        self._rows[names] = np.arange(len(names))

    @cached_property
    def _row_of_tree(self) -> dict[Tree, int]:
        return {graph_tree(self.architecture(row)): row for row in range(len(self._names))}

    def row(self, architecture: Architecture) -> int | None:
        """Return the row of a network or of an equal one; what equals what is worked out when first asked."""
        decisions = architecture.decisions
        if len(decisions) != 5:
            raise KeyError("not links and four operations")
        code = _LINK_OF[decisions["links"]]
        for node in (1, 2, 3, 4):
            code = 10 * code + _CODE_OF[decisions[f"op/{node}"]]
        row = int(self._rows[code])
        if row == _UNKNOWN:
            self._space.validate(architecture)
            row = self._row_of_tree.get(graph_tree(architecture), -1)
            self._rows[code] = row
        return None if row < 0 else row

    def architecture(self, row: int) -> Architecture:
        """Return the network that the table names."""
        links, digits = divmod(self._names[row], 10**4)
        ops = {f"op/{node}": GRAPH_OPERATIONS[int(digit)] for node, digit in enumerate(f"{digits:04d}", 1)}
        return self._space.validate({"links": GRAPH_LINKS[links], **ops})


def open_table(name: str, path: str | Path, *, checksum: bool = True, cache: str | Path | None = None) -> Table:
    """Open NAS-Bench-Graph.

    Args:
        name: "nas-bench-graph" or "nas-bench-graph-proteins".
        path: The .parquet file, or its folder.
        checksum: Whether the file must be the known edition.
        cache: Folder for memory-mapped columns, None for memory.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: pyarrow is not installed.
    """
    row = next(row for row in TABLES if row["name"] == name)
    columns = read_columns("table", path, row["files"], checksum=checksum, cache=cache)
    numbers = ("valid_perf", "test_perf", "latency", "params_m")
    checked_columns("table", columns, {"dataset": "U", "hash": "iu", **dict.fromkeys(numbers, "f")})
    names = np.unique(columns["hash"][columns["dataset"] == row["datasets"][0]])
    readings, costs = {}, {}
    for dataset in row["datasets"]:
        here = np.flatnonzero(columns["dataset"] == dataset)
        here = here[np.argsort(columns["hash"][here], kind="stable")]
        if not np.array_equal(columns["hash"][here], names) or not len(names):
            raise UserError("table.hash", dataset, allowed="the same networks on every data set, each once")
        found = {number: columns[number][here].astype(np.float64) for number in numbers}
        metrics = {"valid_accuracy": 100 * found["valid_perf"], "test_accuracy": 100 * found["test_perf"]}
        readings[dataset] = {1.0: Reading(metrics)}
        params = np.round(1e6 * found["params_m"]).astype(np.int64)
        costs[dataset] = {"params": params, "latency_recorded": 1e3 * found["latency"]}
    proteins = name == "nas-bench-graph-proteins"
    space = nas_bench_graph_proteins_space() if proteins else nas_bench_graph_space()
    index = TreeIndex(space, names)
    return Table(name, space, index, rows=len(names), readings=readings, costs=costs, columns=columns)

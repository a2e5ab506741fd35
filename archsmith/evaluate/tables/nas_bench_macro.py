"""NAS-Bench-Macro: all 6,561 networks of eight layers on CIFAR-10, three trainings each, parameters and FLOPs.

The table has test accuracies of full trainings alone (fidelity 1): the mean of three trainings, or one of them with
``repeat="seeded"``. Its "FLOPs" are given as ``macs_paper``: the benchmark does not say what they count.

Source: arXiv 2103.11922.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.columns import checked_columns, read_columns
from archsmith.evaluate.tables.table import Reading, Table
from archsmith.families.table_spaces import MACRO_LAYERS, MACRO_OPERATIONS, nas_bench_macro_space
from archsmith.space import Architecture

TABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "nas-bench-macro",
        "title": "NAS-Bench-Macro: 6,561 networks of eight layers on CIFAR-10",
        "rows": 6561,
        "space": "nas-bench-macro",
        "datasets": ("cifar10",),
        "fidelities": (1,),
        "files": {"nas-bench-macro.parquet": "9f61dbebedfc7fb7377fa08cfca8ddd41937906db13ec89a59479582ab7e4483"},
    },
)


class LayerIndex:
    """Eight layers ↔ row, by base-3 numbers."""

    def __init__(self, codes: np.ndarray) -> None:
        self._space = nas_bench_macro_space()
        self._codes = codes
        rows = np.full(3**MACRO_LAYERS, -1, dtype=np.int64)
        rows[codes @ 3 ** np.arange(MACRO_LAYERS - 1, -1, -1)] = np.arange(len(codes))
        self._rows: list[int] = rows.tolist()

    def row(self, architecture: Architecture) -> int:
        """Return the row of a network."""
        if len(decisions := architecture.decisions) != MACRO_LAYERS:
            raise KeyError("not the eight layers")
        code = 0
        for layer in range(MACRO_LAYERS):
            code = 3 * code + _CODE_OF[decisions[f"layer/{layer}"]]  # type: ignore[index]
        return self._rows[code]

    def architecture(self, row: int) -> Architecture:
        """Return the network of a row."""
        names = {f"layer/{layer}": MACRO_OPERATIONS[int(code)] for layer, code in enumerate(self._codes[row])}
        return self._space.validate(names)


_CODE_OF = {operation: code for code, operation in enumerate(MACRO_OPERATIONS)}


def open_table(name: str, path: str | Path, *, checksum: bool = True, cache: str | Path | None = None) -> Table:
    """Open NAS-Bench-Macro.

    Args:
        name: "nas-bench-macro".
        path: The .parquet file, or its folder.
        checksum: Whether the file must be the known edition.
        cache: Folder for memory-mapped columns, None for memory.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: pyarrow is not installed.
    """
    columns = read_columns("table", path, TABLES[0]["files"], checksum=checksum, cache=cache)
    runs = [f"test_acc_run{i}" for i in range(3)]
    needed = {"arch": "U", "mean_acc": "f", "params": "iu", "flops": "iu", **dict.fromkeys(runs, "f")}
    rows = checked_columns("table", columns, needed)
    digits = columns["arch"].tolist()
    if len(set(digits)) != 3**MACRO_LAYERS or any(
        len(text) != MACRO_LAYERS or set(text) - set("012") for text in digits
    ):
        raise UserError(
            "table.arch", f"{len(set(digits))} networks", allowed="each of the 6,561 once, eight digits 0 to 2"
        )
    codes = np.array([[int(digit) for digit in text] for text in digits])
    reading = Reading(
        {"test_accuracy": columns["mean_acc"]},
        repeats={"test_accuracy": np.stack([columns[run] for run in runs], axis=1)},
    )
    costs = {"cifar10": {"params": columns["params"], "macs_paper": columns["flops"]}}
    space, readings = nas_bench_macro_space(), {"cifar10": {1.0: reading}}
    return Table(name, space, LayerIndex(codes), rows=rows, readings=readings, costs=costs, columns=columns)

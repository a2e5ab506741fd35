"""NAS-Bench-201: all 15,625 cells on three data sets, 12- and 200-epoch trainings, costs, latencies, zero-cost scores.

Fidelity 200 is the full training, 12 a *separate* short one with its own schedule (not epoch 12 of the long one).
Validation accuracy on CIFAR-10 is of networks trained on half of the training set, test accuracy of networks trained on
all of it. One query costs the share of the recorded training time: ``epochs / 200`` of the 200-epoch time; the time of
validating is not recorded, so it is not added.

Rows are in the official order (a fixed permutation that comes with the table): row numbers are the published indices.

Source: arXiv 2001.00326, 2009.00437. Latencies: HELP (arXiv 2106.08630) and OneProxy (arXiv 2111.01203).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.columns import Columns, checked_columns, read_columns
from archsmith.evaluate.tables.table import Reading, Table
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, NB201_PATHS, nas_bench_201_space
from archsmith.space import Architecture

TABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "nas-bench-201",
        "title": "NAS-Bench-201: 15,625 cells on CIFAR-10, CIFAR-100 and ImageNet16-120",
        "rows": 15625,
        "space": "nas-bench-201",
        "datasets": ("cifar10", "cifar100", "imagenet16_120"),
        "fidelities": (12, 200),
        "files": {
            "nas-bench-201.npz": "86dad8cc1f03d2e9315abc6f5abedcc6a1e51bf577695af8a618ef49b0415563",
            "nas-bench-201.parquet": "e963a1e272e058d62b99bc967844156d9c186689e159a79059e572dc666362f3",
        },
        "beside": {
            "nas-bench-201-latency-help.parquet": "53510d318bb29c95b8096da586ee18235316e5ef3684f4ca8c00bea1bdc23ef1",
            "nas-bench-201-latency-oneproxy.parquet": (
                "420561d9c6bf8c5b9fc9c01e45605966b8f337ca3e7e890368877772fa837b5e"
            ),
            "nas-bench-201-zero-cost.parquet": "43175eb976f9653bd37631ce4c0e37f29dee382b0f651ac27e7788ed998246d7",
        },
    },
)

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet16_120": 120}

SHORT, FULL = 12, 200
"""Fidelities in epochs."""

_SCORES = ("naswot", "synflow", "logsynflow", "nregions")


class CellIndex:
    """Operation codes ↔ official row."""

    def __init__(self, ops: np.ndarray) -> None:
        self._space = nas_bench_201_space()
        self._ops = ops
        weights = 5 ** np.arange(5, -1, -1)
        self._places = tuple(
            (path, {operation: int(code * weight) for code, operation in enumerate(NB201_OPERATIONS)})
            for path, weight in zip(NB201_PATHS, weights, strict=True)
        )
        rows = np.full(5**6, -1, dtype=np.int64)
        rows[ops.astype(np.int64) @ weights] = np.arange(len(ops))
        self._rows: list[int] = rows.tolist()

    def row(self, architecture: Architecture) -> int:
        """Return the official index of a cell."""
        decisions = architecture.decisions
        if len(decisions) != len(self._places):
            raise KeyError("not the six edges")
        code = 0
        for path, codes in self._places:
            code += codes[decisions[path]]  # type: ignore[index]
        return self._rows[code]

    def architecture(self, row: int) -> Architecture:
        """Return the cell of an official index."""
        names = {path: NB201_OPERATIONS[int(code)] for path, code in zip(NB201_PATHS, self._ops[row], strict=True)}
        return Architecture.of_valid(dict(names), space=self._space.name, canonical=self._space.canonical)


def open_table(
    name: str,
    path: str | Path,
    *,
    beside: Sequence[str | Path] = (),
    checksum: bool = True,
    cache: str | Path | None = None,
) -> Table:
    """Open NAS-Bench-201.

    Args:
        name: "nas-bench-201".
        path: The .npz or .parquet file, or its folder.
        beside: Files to take columns from by official index: the two latency tables (costs ``latency_<device>`` in ms)
            and the zero-cost scores (columns ``naswot_cifar10`` ...).
        checksum: Whether the files must be the known editions.
        cache: Folder for memory-mapped columns of the main file, None for memory.

    Raises:
        UserError: Missing, damaged or other files.
        MissingExtra: A parquet file without pyarrow.
    """
    files, known_beside = TABLES[0]["files"], TABLES[0]["beside"]
    columns = read_columns("table", path, files, checksum=checksum, cache=cache)
    if "ops" not in columns and all(f"op_e{a}{b}" in columns for a, b in NB201_EDGES):
        columns["ops"] = np.stack([columns[f"op_e{a}{b}"] for a, b in NB201_EDGES], axis=1)
    needed = {"ops": "iu", **{f"{cost}_{d}": "iu" for cost in ("params", "flops") for d in CLASSES}}
    needed |= {f"{part}_acc_{e}ep_{d}": "f" for part in ("val", "test") for e in (SHORT, FULL) for d in CLASSES}
    rows = checked_columns("table", columns, needed | {f"train_time_s_200ep_{d}": "f" for d in CLASSES})
    _check_cells(columns["ops"], rows)
    latency: dict[str, np.ndarray] = {}
    for each in beside:
        extra = read_columns("beside", each, known_beside, checksum=checksum)
        for column, values in _by_index(extra, rows).items():
            score = column.split("_")[0] in _SCORES
            columns[column if score else f"latency_{column}"] = values
            latency |= {} if score else {f"latency_{column}": values}
    readings = {
        dataset: {float(epochs): _reading(columns, dataset, epochs) for epochs in (SHORT, FULL)} for dataset in CLASSES
    }
    costs = {dataset: _costs(columns, dataset) | latency for dataset in CLASSES}
    space = nas_bench_201_space()
    return Table(name, space, CellIndex(columns["ops"]), rows=rows, readings=readings, costs=costs, columns=columns)


def _check_cells(ops: np.ndarray, rows: int) -> None:
    codes = ops.astype(np.int64) @ 5 ** np.arange(5, -1, -1) if ops.shape == (rows, 6) else np.zeros(0, np.int64)
    if rows != 5**6 or ops.min() < 0 or ops.max() > 4 or len(np.unique(codes)) != rows:
        raise UserError("table.ops", f"shape {ops.shape}", allowed="each of the 15,625 cells once, codes 0 to 4")


def _by_index(extra: Columns, rows: int) -> Columns:
    """Spread columns over the official rows; NaN where they have no value."""
    count = checked_columns("beside", extra, {"index": "iu"})
    index = extra["index"]
    if len(np.unique(index)) != count or index.min() < 0 or index.max() >= rows:
        raise UserError("beside.index", f"{count} rows", allowed=f"official indices from 0 to {rows - 1}, each once")
    spread: Columns = {}
    for name, values in extra.items():
        if name != "index":
            spread[name] = np.full(rows, np.nan)
            spread[name][index] = values
    return spread


def _reading(columns: Columns, dataset: str, epochs: int) -> Reading:
    metrics = {
        "valid_accuracy": columns[f"val_acc_{epochs}ep_{dataset}"],
        "test_accuracy": columns[f"test_acc_{epochs}ep_{dataset}"],
    }
    trainings = [columns.get(f"val_acc_{epochs}ep_{dataset}_trial{i}") for i in range(3)]
    recorded = [each for each in trainings if each is not None]
    repeats = {"valid_accuracy": np.stack(recorded, axis=1)} if recorded else {}
    seconds = columns[f"train_time_s_200ep_{dataset}"].astype(np.float64) * (epochs / FULL)
    return Reading(metrics, seconds, repeats)


def _costs(columns: Columns, dataset: str) -> dict[str, np.ndarray]:
    """Return the costs; the benchmark's FLOPs are MACs plus one per bias element of the classifier."""
    paper = columns[f"flops_{dataset}"]
    costs = {"params": columns[f"params_{dataset}"], "macs": paper - CLASSES[dataset], "macs_paper": paper}
    one_gpu = columns.get(f"latency_s_1gpu_{dataset}")
    return costs if one_gpu is None else costs | {"latency_1gpu": 1e3 * one_gpu.astype(np.float64)}

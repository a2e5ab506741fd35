"""Latency tables without accuracies: FBNet, Once-for-All (MobileNetV3) and the transformers of HAT on real devices.

FBNet and Once-for-All: 5,000 measured networks each out of far more; an architecture that was not measured is a failed
result, ``Table.sample`` draws measured ones. What the depth of a Once-for-All network leaves out does not count: of
rows that agree in the rest the first is taken. HAT's rows are averages over layers, from which no network can be
rebuilt, so they are a space of row numbers, one per setting (its data sets here), with the features as columns.

Everything is a cost, ``latency_<device>`` in ms; results have no metrics and take no time.

Sources: HELP, arXiv 2106.08630 (FBNet, Once-for-All); Hardware-Aware Transformers, arXiv 2005.14187.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.columns import Columns, checked_columns, read_columns
from archsmith.evaluate.tables.table import Reading, RowIndex, Table
from archsmith.families.table_spaces import (
    FBNET_LAYERS,
    FBNET_OPERATIONS,
    fbnet_space,
    ofa_mobilenet_space,
    row_space,
)
from archsmith.space import Architecture, ProductSpace, Value

TABLES: tuple[dict[str, Any], ...] = (
    {
        "name": "fbnet-latency",
        "title": "Latency of 5,000 FBNet networks on 27 device settings",
        "rows": 5000,
        "space": "fbnet",
        "datasets": ("latency",),
        "fidelities": (1,),
        "files": {"fbnet-latency-help.parquet": "0ebcc045ba8364da027219afd88ca27742e6fd9fd1812b80d843a2532dfff384"},
    },
    {
        "name": "ofa-mobilenet-latency",
        "title": "Latency of 5,000 Once-for-All MobileNetV3 sub-networks on 12 GPU settings",
        "rows": 5000,
        "space": "ofa-mobilenet-v3",
        "datasets": ("latency",),
        "fidelities": (1,),
        "files": {"ofa-mbv3-latency-help.parquet": "0e13eeb021d16aac6f3b0a85e2d8bb7298193668af4add4199b15bfc6a8b0fe8"},
    },
    {
        "name": "hat-transformer-latency",
        "title": "Latency of 2,000 transformers in each of 8 settings of task and device, by row",
        "rows": 2000,
        "space": "hat-transformer-latency",
        "datasets": (
            "iwslt14deen_gpu_titanxp",
            "wmt14ende_cpu_raspberrypi",
            "wmt14ende_cpu_xeon",
            "wmt14ende_gpu_titanxp",
            "wmt14enfr_cpu_raspberrypi",
            "wmt14enfr_cpu_xeon",
            "wmt14enfr_gpu_titanxp",
            "wmt19ende_gpu_titanxp",
        ),
        "fidelities": (1,),
        "files": {
            "hat-transformer-latency.parquet": "c820dfc77ed2b4c4a6b900072629c9ced88cba5c4da0d84728b7697af78ab7b4"
        },
    },
)

HAT_FEATURES = (
    "encoder_embed_dim",
    "encoder_layer_num",
    "encoder_ffn_embed_dim_avg",
    "encoder_self_attention_heads_avg",
    "decoder_embed_dim",
    "decoder_layer_num",
    "decoder_ffn_embed_dim_avg",
    "decoder_self_attention_heads_avg",
    "decoder_ende_attention_heads_avg",
    "decoder_arbitrary_ende_attn_avg",
)
"""Feature columns of the transformers, in the order of the file; ``Table.columns`` has them per setting."""

Decisions = Mapping[str, Value]


class MeasuredIndex:
    """Architecture ↔ row of those that were measured, the first of equal ones."""

    def __init__(self, space: ProductSpace, decisions_of: Callable[[int], dict[str, Value]], rows: int) -> None:
        self._space = space
        self._decisions_of = decisions_of
        self._rows: dict[tuple[Value, ...], int] = {}
        for row in range(rows):
            self._rows.setdefault(self._key(decisions_of(row)), row)

    def _key(self, architecture: Decisions) -> tuple[Value, ...]:
        return tuple(architecture.get(path) for path in self._space.paths)

    def row(self, architecture: Architecture) -> int | None:
        """Return the row of an architecture, None when it was not measured."""
        row = self._rows.get(self._key(architecture.decisions))
        if row is None or len(architecture) != len(self.architecture(row)):
            self._space.validate(architecture)
        return row

    def architecture(self, row: int) -> Architecture:
        """Return the architecture of a row."""
        decisions = self._decisions_of(row)
        return Architecture.of_valid(decisions, space=self._space.name, canonical=self._space.canonical)


def open_table(name: str, path: str | Path, *, checksum: bool = True, cache: str | Path | None = None) -> Table:
    """Open a latency table.

    Args:
        name: "fbnet-latency", "ofa-mobilenet-latency" or "hat-transformer-latency".
        path: The .parquet file, or its folder.
        checksum: Whether the file must be the known edition.
        cache: Folder for memory-mapped columns, None for memory.

    Raises:
        UserError: A missing, damaged or other file.
        MissingExtra: pyarrow is not installed.
    """
    row = next(row for row in TABLES if row["name"] == name)
    columns = read_columns("table", path, row["files"], checksum=checksum, cache=cache)
    if name == "hat-transformer-latency":
        return _open_transformers(name, columns, row["datasets"])
    decisions_of, space = (_fbnet if name == "fbnet-latency" else _ofa)(columns)
    rows = checked_columns("table", columns, {})
    latency = {f"latency_{c.removeprefix('lat_')}": v for c, v in columns.items() if c.startswith("lat_")}
    readings = {"latency": {1.0: Reading({})}}
    index = MeasuredIndex(space, decisions_of, rows)
    return Table(name, space, index, rows=rows, readings=readings, costs={"latency": latency}, columns=columns)


def _fbnet(columns: Columns) -> tuple[Callable[[int], dict[str, Value]], ProductSpace]:
    names = [f"b{layer:02d}" for layer in range(FBNET_LAYERS)]
    checked_columns("table", columns, dict.fromkeys(names, "iu"))
    _check_options(columns, dict.fromkeys(names, range(len(FBNET_OPERATIONS))))
    codes = np.stack([columns[name] for name in names], axis=1)

    return partial(_fbnet_decisions, codes), fbnet_space()


def _fbnet_decisions(codes: np.ndarray, row: int) -> dict[str, Value]:
    return {f"layer/{layer}": FBNET_OPERATIONS[int(code)] for layer, code in enumerate(codes[row])}


def _ofa(columns: Columns) -> tuple[Callable[[int], dict[str, Value]], ProductSpace]:
    names = [f"{kind}{i:02d}" for kind, many in (("ks", 20), ("e", 20), ("d", 5)) for i in range(many)] + ["r"]
    checked_columns("table", columns, dict.fromkeys(names, "iu"))
    options = {"k": (3, 5, 7), "e": (3, 4, 6), "d": (2, 3, 4), "r": range(128, 225, 4)}
    _check_options(columns, {name: options[name[0]] for name in names})

    return partial(_ofa_decisions, {name: columns[name] for name in names}), ofa_mobilenet_space()


def _ofa_decisions(columns: Columns, row: int) -> dict[str, Value]:
    found: dict[str, Value] = {"resolution": int(columns["r"][row])}
    for stage in range(5):
        found[f"stage/{stage}/depth"] = depth = int(columns[f"d{stage:02d}"][row])
        for layer in range(depth):
            at = f"{4 * stage + layer:02d}"
            found[f"stage/{stage}/{layer}/kernel"] = int(columns[f"ks{at}"][row])
            found[f"stage/{stage}/{layer}/expand"] = int(columns[f"e{at}"][row])
    return found


def _check_options(columns: Columns, allowed: Mapping[str, Sequence[int]]) -> None:
    for name, options in allowed.items():
        if not np.isin(columns[name], options).all():
            raise UserError(f"table.{name}", sorted(set(columns[name].tolist())), allowed=f"values of {list(options)}")


def _open_transformers(name: str, columns: Columns, settings: tuple[str, ...]) -> Table:
    numbers = [
        *HAT_FEATURES,
        *(f"latency_{kind}_{part}" for kind in ("mean", "std") for part in ("encoder", "decoder")),
    ]
    checked_columns("table", columns, {"setting": "U", **dict.fromkeys(numbers, "f")})
    costs: dict[str, dict[str, np.ndarray]] = {}
    kept: Columns = {}
    for setting in settings:
        here = np.flatnonzero(columns["setting"] == setting)
        kept |= {f"{setting}/{number}": columns[number][here] for number in numbers}
        costs[setting] = {f"latency_{p}": kept[f"{setting}/latency_mean_{p}"] for p in ("encoder", "decoder")}
        costs[setting]["latency_total"] = costs[setting]["latency_encoder"] + costs[setting]["latency_decoder"]
    rows = checked_columns("table", kept, {})
    readings = {setting: {1.0: Reading({})} for setting in settings}
    space = row_space(name, rows)
    return Table(name, space, RowIndex(space), rows=rows, readings=readings, costs=costs, columns=kept)

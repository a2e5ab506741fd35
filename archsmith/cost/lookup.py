"""Look-up tables of measured operators: the cost of a network is the sum of its rows.

That is an assumption, not a law: parts measured alone do not add up to the whole when a runtime fuses across their
borders, runs branches side by side, or has a fixed cost per call. So a table has an overhead that is added once, and
``fitted`` puts scale and overhead right with whole networks that were measured; what is left over is for
``archsmith.methods.hw_nas_survey.cost_model_report`` to say.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from archsmith.core.errors import UserError


@dataclass(frozen=True)
class Row:
    """One measured operator.

    Attributes:
        mean: Its cost, not negative.
        std: Standard deviation over the measurements; NaN when it was not recorded.
        count: Number of measurements; 0 when it was not recorded.
    """

    mean: float
    std: float = math.nan
    count: int = 0


@dataclass(frozen=True)
class LookupTable:
    """Costs of operators by key; a network's cost is ``scale * (sum of its rows) + overhead``.

    Args:
        rows: Key → row. What a key says (operator, shapes, stride) is the table's own convention.
        device: Where it was measured.
        unit: Of the costs.
        scale: Factor of the sum, positive.
        overhead: Added once for each network, finite.

    Raises:
        UserError: No row, a cost that is negative or not finite, a scale that is not positive.

    Example:
        >>> table = LookupTable({"conv": Row(2.0), "pool": Row(0.5)}, device="phone")
        >>> table.cost(["conv", "conv", "pool"])
        4.5
    """

    rows: Mapping[str, Row]
    device: str
    unit: str = "ms"
    scale: float = 1.0
    overhead: float = 0.0
    _sorted: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError("rows", {}, allowed="at least one row")
        for key, row in self.rows.items():
            if not math.isfinite(row.mean) or row.mean < 0:
                raise UserError(f"row {key!r}", row.mean, allowed="a cost that is finite and not negative")
        if not math.isfinite(self.scale) or self.scale <= 0 or not math.isfinite(self.overhead):
            raise UserError("scale, overhead", (self.scale, self.overhead), allowed="a positive and a finite number")
        object.__setattr__(self, "_sorted", tuple(sorted(self.rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, key: str) -> Row:
        """Return the row of an operator.

        Raises:
            UserError: It was not measured. Nothing is guessed in its place.
        """
        if (found := self.rows.get(key)) is None:
            near = difflib.get_close_matches(key, self._sorted, n=3, cutoff=0.0)
            raise UserError(
                "operator",
                key,
                allowed=f"one of the {len(self.rows)} measured on {self.device}",
                hint=f"Nearest: {near}",
            )
        return found

    def cost(self, keys: Iterable[str]) -> float:
        """Return the cost of a stack of operators that run one after the other, in ``unit``.

        Args:
            keys: One for each operator, repeated where it occurs twice. Branches that run side by side cannot be told:
                their costs are added too.

        Raises:
            UserError: One of them was not measured.
        """
        return self.scale * math.fsum(self.row(key).mean for key in keys) + self.overhead

    def std(self, keys: Sequence[str]) -> float:
        """Return the standard deviation of ``cost`` if the rows vary independently; NaN where one was not recorded.

        Raises:
            UserError: One of them was not measured.
        """
        return self.scale * math.sqrt(math.fsum(self.row(key).std ** 2 for key in keys))

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain JSON values; ``from_json`` is the way back."""
        rows = {
            key: {"mean": row.mean, "std": None if math.isnan(row.std) else row.std, "count": row.count}
            for key, row in self.rows.items()
        }
        return {
            "device": self.device,
            "unit": self.unit,
            "scale": self.scale,
            "overhead": self.overhead,
            "entries": rows,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LookupTable:
        """Return the table that ``to_json`` described."""
        rows = {
            key: Row(float(row["mean"]), math.nan if row["std"] is None else float(row["std"]), int(row["count"]))
            for key, row in data["entries"].items()
        }
        return cls(rows, data["device"], data["unit"], float(data["scale"]), float(data["overhead"]))

    def fitted(self, networks: Sequence[Sequence[str]], measured: Sequence[float]) -> LookupTable:
        """Return the table with scale and overhead by least squares on whole networks that were measured.

        Args:
            networks: Keys of each network.
            measured: Its measured cost, in ``unit``.

        Raises:
            UserError: Fewer than two networks, sums that do not differ, or a fit whose scale is not positive.
        """
        sums = np.array([math.fsum(self.row(key).mean for key in keys) for keys in networks])
        if len(sums) != len(measured) or len(sums) < 2 or np.ptp(sums) == 0:
            raise UserError("networks", len(sums), allowed="at least two with different sums, one measurement for each")
        slope, intercept = (float(each) for each in np.polyfit(sums, np.asarray(measured, dtype=np.float64), 1))
        if not slope > 0:
            raise UserError(
                "measured", f"scale {slope:.4g}", allowed="costs that grow with the sums: the table says nothing else"
            )
        return replace(self, scale=slope, overhead=intercept)


def read_lookup_table(path: str | Path, *, device: str, part: str | None = None, unit: str = "ms") -> LookupTable:
    """Read a table from JSON.

    Args:
        path: A file ``{"entries": {key: {"mean", "var" or "std", "count"}}}``, or ``{"tables": {part: {key: ...}}}``.
        device: Where it was measured; files do not say it in a fixed place.
        part: Which of several tables, by its name in the file (an input resolution, say); None for a file with one.
        unit: Of the costs.

    Raises:
        UserError: No such file or part, or a file of another form.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("table", str(path), allowed="a readable JSON file", hint=str(error)) from error
    entries = data.get("entries") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(data.get("tables"), dict):
        if part not in data["tables"]:
            raise UserError("part", part, allowed=f"one of {sorted(data['tables'])}")
        entries = data["tables"][part]
    elif part is not None:
        raise UserError("part", part, allowed="None: the file has a single table")
    if not isinstance(entries, dict) or not all(isinstance(row, dict) and "mean" in row for row in entries.values()):
        raise UserError("table", str(path), allowed="'entries', or 'tables', with a mean for each key")
    return LookupTable({key: _row(row) for key, row in entries.items()}, device=device, unit=unit)


def _row(entry: Mapping[str, Any]) -> Row:
    std = math.sqrt(entry["var"]) if "var" in entry else entry.get("std", math.nan)
    return Row(float(entry["mean"]), float(std), int(entry.get("count", 0)))

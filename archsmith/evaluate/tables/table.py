"""A table of known results, and the evaluator that looks trials up in it instead of training.

A table says what was measured: per data set and fidelity the metrics (accuracies in percent) and how long it took, per
data set the costs. The evaluator turns that into results with a simulated clock, so that a search over GPU-days replays
in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from archsmith.core.errors import UserError
from archsmith.evaluate.base import WeightStore
from archsmith.evaluate.tables.columns import Columns
from archsmith.space import Architecture, ProductSpace, Result, Space, Trial


class Index(Protocol):
    """Connects the architectures of a space with the rows of a table."""

    def row(self, architecture: Architecture) -> int | None:
        """Return the row of a valid architecture, None where the table has none; KeyError where it is not valid."""
        ...

    def architecture(self, row: int) -> Architecture:
        """Return the architecture of a row."""
        ...


class RowIndex:
    """For spaces whose only decision is the number of the row."""

    def __init__(self, space: ProductSpace) -> None:
        self._space = space

    def row(self, architecture: Architecture) -> int:
        """Return the row."""
        row = self._space.validate(architecture)["row"]
        assert isinstance(row, int)
        return row

    def architecture(self, row: int) -> Architecture:
        """Return the architecture that names a row."""
        return Architecture.of_valid({"row": row}, space=self._space.name, canonical=None)


@dataclass(frozen=True)
class Reading:
    """What a table says at one fidelity.

    Attributes:
        metrics: One number per row, by name; NaN where the training diverged or is not recorded.
        seconds: Simulated seconds of one evaluation per row; None when the table does not say (then 0).
        repeats: Columns of the separate trainings behind a metric, (rows, trainings), NaN where there are fewer.
    """

    metrics: Mapping[str, np.ndarray]
    seconds: np.ndarray | None = None
    repeats: Mapping[str, np.ndarray] = field(default_factory=dict)


class Table:
    """A benchmark table in memory or mapped from disk.

    Args:
        name: Its name in ``table_catalogue()``.
        space: Space of its architectures.
        index: Architecture ↔ row.
        rows: Number of rows.
        readings: Data set → fidelity (in the table's unit, epochs) → what is known there.
        costs: Data set → cost → one number per row; ``latency_<device>`` in ms.
        columns: Everything the file holds, by its own column names.

    Attributes:
        datasets: Names of the data sets, the first is the usual one.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        index: Index,
        *,
        rows: int,
        readings: Mapping[str, Mapping[float, Reading]],
        costs: Mapping[str, Mapping[str, np.ndarray]],
        columns: Columns,
    ) -> None:
        self.name, self.space, self.index, self.rows = name, space, index, rows
        self.readings, self.costs, self.columns = readings, costs, columns
        self.datasets = tuple(readings)

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"Table({self.name!r}, {self.rows:,} rows)"

    def row(self, architecture: Architecture) -> int | None:
        """Return the row of an architecture, None when it is valid but was never measured.

        Raises:
            UserError: It is not an architecture of the table's space.
        """
        if architecture.space != self.space.name:
            raise UserError(
                "architecture.space", architecture.space, allowed=f"{self.space.name!r}, the space of {self.name}"
            )
        try:
            return self.index.row(architecture)
        except (KeyError, TypeError):  # a decision that is missing or unknown: the space says which
            return self.index.row(self.space.validate(architecture))

    def architecture(self, row: int) -> Architecture:
        """Return the architecture of a row.

        Raises:
            UserError: No such row.
        """
        if not isinstance(row, int | np.integer) or not 0 <= row < self.rows:
            raise UserError("row", row, allowed=f"an integer from 0 to {self.rows - 1}")
        return self.index.architecture(int(row))

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return the architecture of a row drawn uniformly (which need not be uniform over the space)."""
        return self.architecture(int(rng.integers(self.rows)))

    def fidelities(self, dataset: str | None = None) -> tuple[float, ...]:
        """Return the fidelities of a data set, ascending; the last is the full evaluation.

        Raises:
            UserError: No such data set.
        """
        return tuple(sorted(self.readings[self.dataset(dataset)]))

    def dataset(self, name: str | None) -> str:
        """Return ``name``, or the first data set for None.

        Raises:
            UserError: No such data set.
        """
        if name is None:
            return self.datasets[0]
        if name not in self.readings:
            raise UserError("dataset", name, allowed=f"one of {list(self.datasets)}")
        return name

    def values(self, metric: str, *, dataset: str | None = None, fidelity: float | None = None) -> np.ndarray:
        """Return a metric, or a cost, of every row (float64 for metrics), read only.

        Args:
            metric: Name of a metric at this fidelity, or of a cost.
            dataset: Name of the data set, the first for None.
            fidelity: One of ``fidelities``, the full one for None.

        Raises:
            UserError: No such data set, fidelity or metric.
        """
        name = self.dataset(dataset)
        reading = self.reading(name, fidelity)
        found = reading.metrics.get(metric, self.costs.get(name, {}).get(metric))
        if found is None:
            known = [*reading.metrics, *self.costs.get(name, {})]
            raise UserError("metric", metric, allowed=f"one of {known}")
        view = np.asarray(found, dtype=np.float64).view() if metric in reading.metrics else found.view()
        view.flags.writeable = False
        return view

    def reading(self, dataset: str | None, fidelity: float | None) -> Reading:
        """Return what is known at a fidelity, the full one for None.

        Raises:
            UserError: No such data set or fidelity.
        """
        name = self.dataset(dataset)
        known = self.readings[name]
        if fidelity is None:
            return known[max(known)]
        if fidelity not in known:
            raise UserError(
                "fidelity", fidelity, allowed=f"None for full ({max(known):g}), or one of {self.fidelities(name)}"
            )
        return known[fidelity]


class TableEvaluator:
    """Looks trials up in a table. Accuracies are in percent; ``seconds`` is the simulated time of the evaluation.

    Args:
        table: The table.
        dataset: Which of its data sets, the first for None.
        fidelity: What a trial without a fidelity gets: the full evaluation for None, or one of the table's.
        devices: Latencies to put into the costs, as ``latency_<device>`` in ms; a single one is ``latency`` as well, so
            that a budget ("latency<=5ms") can be held.
        repeat: "mean" of the recorded trainings; or "seeded": where the trainings behind a metric are recorded one by
            one, the trial's seed picks one of them (what training once would have shown).

    A valid architecture that the table does not have, or whose training diverged, is a failed result.

    Raises:
        UserError: No such data set, fidelity or device.
    """

    def __init__(
        self,
        table: Table,
        *,
        dataset: str | None = None,
        fidelity: float | None = None,
        devices: Sequence[str] = (),
        repeat: str = "mean",
    ) -> None:
        self.table = table
        self.dataset = table.dataset(dataset)
        if repeat not in ("mean", "seeded"):
            raise UserError("repeat", repeat, allowed="'mean' or 'seeded'")
        self.repeat = repeat
        self._default = table.reading(self.dataset, fidelity)
        self.fidelity = max(table.fidelities(self.dataset)) if fidelity is None else fidelity
        self._costs = self._chosen_costs(table.costs.get(self.dataset, {}), tuple(devices))

    @staticmethod
    def _chosen_costs(costs: Mapping[str, np.ndarray], devices: tuple[str, ...]) -> dict[str, np.ndarray]:
        chosen = {name: column for name, column in costs.items() if not name.startswith("latency_")}
        for device in devices:
            if (name := f"latency_{device}") not in costs:
                known = [each.removeprefix("latency_") for each in costs if each.startswith("latency_")]
                raise UserError("devices", device, allowed=f"devices of the table: {known}")
            chosen[name] = costs[name]
        return chosen | ({"latency": chosen[f"latency_{devices[0]}"]} if len(devices) == 1 else {})

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Look one trial up; nothing is trained and ``weights`` is not used.

        Raises:
            UserError: The architecture is not of the table's space, or the table has no such fidelity.
        """
        row = self.table.row(trial.architecture)
        if row is None:
            return Result.failed(f"{self.table.name} holds no measurement of this architecture")
        reading = self._default
        if trial.fidelity is not None:
            reading = self.table.reading(self.dataset, trial.fidelity)
        metrics = {name: float(column[row]) for name, column in reading.metrics.items()}
        if self.repeat == "seeded":
            for name, trainings in reading.repeats.items():
                known = trainings[row][np.isfinite(trainings[row])]
                metrics[name] = float(known[trial.seed % len(known)]) if len(known) else math.nan
        seconds = 0.0 if reading.seconds is None else float(reading.seconds[row])
        if metrics and all(map(math.isnan, metrics.values())):
            return Result.failed("the recorded training diverged or was not finished", seconds=seconds)
        return Result(metrics=metrics, costs={n: c[row].item() for n, c in self._costs.items()}, seconds=seconds)

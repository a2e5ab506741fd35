"""What a strategy asks for and what it is told: Trial, Result, Objective. Frozen, exact in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.architecture import Architecture
from archsmith.space.values import FrozenDict, frozen_value, number_from_json, number_to_json

Status = Literal["ok", "failed", "infeasible"]
Direction = Literal["maximize", "minimize"]

_STATUSES = get_args(Status)


def _insist(condition: bool, name: str, given: object, allowed: str) -> None:
    if not condition:
        raise UserError(name, given, allowed=allowed)


def _is_number(value: object) -> bool:
    return type(value) in (float, int) or (isinstance(value, int | float) and not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One request of a strategy.

    Args:
        id: Number of the trial, unique in its run, from 0.
        architecture: What to evaluate.
        fidelity: How much of a full evaluation, in the evaluator's unit (epochs, say); ``None`` for full.
        parent: Id of the trial that this one continues or inherits from.
        seed: Seed of everything random in the evaluation.
        info: The strategy's own notes (log-probabilities, transformation): plain finite JSON, kept exactly.
    """

    id: int
    architecture: Architecture
    fidelity: float | None = None
    parent: int | None = None
    seed: int = 0
    info: Mapping[str, Any] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        for name in ("id", "parent", "seed"):
            value = getattr(self, name)
            optional = name == "parent" and value is None
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            _insist(
                optional or (whole and (name == "seed" or value >= 0)), f"Trial.{name}", value, "an integer, ids from 0"
            )
            object.__setattr__(self, name, value if optional else int(value))
        if self.fidelity is not None:
            fidelity = frozen_value(self.fidelity, "Trial.fidelity")
            _insist(_is_number(fidelity), "Trial.fidelity", fidelity, "a finite number, or None for full")
            object.__setattr__(self, "fidelity", fidelity)
        _insist(isinstance(self.architecture, Architecture), "Trial.architecture", self.architecture, "an Architecture")
        _refuse_non_finite(self.info, "Trial.info")
        object.__setattr__(self, "info", FrozenDict(self.info))

    def to_json(self) -> dict[str, Any]:
        """Return the trial as a JSON object; ``from_json`` restores it exactly."""
        return {
            "id": self.id,
            "architecture": self.architecture.to_json(),
            "fidelity": self.fidelity,
            "parent": self.parent,
            "seed": self.seed,
            "info": _thawed(self.info),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Return the trial that ``to_json`` wrote.

        Raises:
            UserError: A field is missing, unknown or of the wrong kind.
        """
        fields = _fields(data, "trial", ("id", "architecture", "fidelity", "parent", "seed", "info"))
        return cls(**{**fields, "architecture": Architecture.from_json(fields["architecture"])})


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a trial. A failure is a result too.

    Args:
        status: ``"ok"``; ``"failed"`` (crashed, diverged, timed out); ``"infeasible"`` (breaks the budget).
        reason: Why, for all but ``"ok"``.
        metrics: Number per name. NaN and infinities may stand here: they are kept, and no front admits a NaN.
        costs: Exact and measured costs in the stored units of ``Budget``, plain numbers as well.
        seconds: Time spent on it, finite and not negative.
        weights: Key of the trained weights in the weight store, if any.
    """

    status: Status = "ok"
    reason: str | None = None
    metrics: Mapping[str, float] = field(default_factory=FrozenDict)
    costs: Mapping[str, float] = field(default_factory=FrozenDict)
    seconds: float = 0.0
    weights: str | None = None

    def __post_init__(self) -> None:
        # Conditions before the texts of their errors: tables make results by the ten thousand.
        if self.status not in _STATUSES:
            raise UserError("Result.status", self.status, allowed=f"one of {list(_STATUSES)}")
        if bool(self.reason) == (self.status == "ok"):
            raise UserError("Result.reason", self.reason, allowed="a text when the status is not 'ok', else None")
        for name in ("metrics", "costs"):
            numbers = FrozenDict(getattr(self, name))
            if not all(map(_is_number, numbers.values())):
                bad = {key: value for key, value in numbers.items() if not _is_number(value)}
                raise UserError(f"Result.{name}", bad, allowed="numbers only")
            object.__setattr__(self, name, numbers)
        seconds = frozen_value(self.seconds, "Result.seconds")
        if not isinstance(seconds, int | float) or not _is_number(seconds) or seconds < 0:
            raise UserError("Result.seconds", seconds, allowed=">= 0")
        object.__setattr__(self, "seconds", seconds)

    @classmethod
    def failed(cls, reason: str, *, seconds: float = 0.0) -> Result:
        """Return the result of a trial that could not be evaluated."""
        return cls(status="failed", reason=reason, seconds=seconds)

    @classmethod
    def infeasible(cls, reason: str, *, costs: Mapping[str, float] | None = None) -> Result:
        """Return the result of a trial that was refused for its costs, before any training."""
        return cls(status="infeasible", reason=reason, costs=costs or {})

    def to_json(self) -> dict[str, Any]:
        """Return the result as strict JSON; non-finite metrics and costs become "NaN", "Infinity", "-Infinity"."""
        return {
            "status": self.status,
            "reason": self.reason,
            "metrics": {name: number_to_json(value) for name, value in self.metrics.items()},
            "costs": {name: number_to_json(value) for name, value in self.costs.items()},
            "seconds": self.seconds,
            "weights": self.weights,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """Return the result that ``to_json`` wrote.

        Raises:
            UserError: A field is missing, unknown or of the wrong kind.
        """
        fields = _fields(data, "result", ("status", "reason", "metrics", "costs", "seconds", "weights"))
        for name in ("metrics", "costs"):
            fields[name] = {key: number_from_json(value, f"Result.{name}") for key, value in fields[name].items()}
        return cls(**fields)


@dataclass(frozen=True)
class Objective:
    """What a search improves.

    Args:
        metric: Name of a metric, or else of a cost, of a result.
        direction: ``"maximize"`` or ``"minimize"``.
        reference: Worst value that counts (for hypervolumes and plots), finite, or ``None``.
    """

    metric: str
    direction: Direction = "maximize"
    reference: float | None = None

    def __post_init__(self) -> None:
        _insist(
            isinstance(self.metric, str) and bool(self.metric), "Objective.metric", self.metric, "the name of a metric"
        )
        directions = list(get_args(Direction))
        _insist(self.direction in directions, "Objective.direction", self.direction, f"one of {directions}")
        if self.reference is not None:
            reference = frozen_value(self.reference, "Objective.reference")
            _insist(_is_number(reference), "Objective.reference", reference, "a finite number or None")
            object.__setattr__(self, "reference", reference)

    def value(self, result: Result) -> float:
        """Return the metric, or the cost of that name; NaN when the result is not ok or has neither."""
        if result.status != "ok":
            return math.nan
        return float(result.metrics.get(self.metric, result.costs.get(self.metric, math.nan)))

    def is_better(self, first: float, second: float) -> bool:
        """Return whether ``first`` is strictly better; any number is better than NaN."""
        if math.isnan(first) or math.isnan(second):
            return math.isnan(second) and not math.isnan(first)
        return first > second if self.direction == "maximize" else first < second

    def to_json(self) -> dict[str, Any]:
        """Return the objective as a JSON object; ``from_json`` restores it exactly."""
        return {"metric": self.metric, "direction": self.direction, "reference": self.reference}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Objective:
        """Return the objective that ``to_json`` wrote.

        Raises:
            UserError: A field is missing, unknown or of the wrong kind.
        """
        return cls(**_fields(data, "objective", ("metric", "direction", "reference")))


def _fields(data: Any, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, Mapping) or set(data) != set(names):
        raise UserError(what, data, allowed=f"an object with exactly the fields {list(names)}")
    return dict(data)


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _thawed(item) for name, item in value.items()}
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def _refuse_non_finite(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_non_finite(item, name)
    elif isinstance(value, float):
        _insist(math.isfinite(value), name, value, "finite numbers (JSON has no others)")

"""Latency of networks that were not measured, learned from those that were.

A predictor of one device, backend, precision and input shape: it keeps the protocol it was measured with, because
numbers of another protocol are other quantities. It learns the latency or its logarithm, whichever predicts left-out
examples better, from the masked one-hot encoding, in which decisions of absent layers are zero. (Latencies of a chain
of blocks add up; widths and resolutions multiply.)

``next_networks`` chooses what to measure: first the corners of the space (every decision at its first, middle or last
option), then random networks, and where a front is known, networks near it. A predictor answers for the region it has
seen: winners of a search are to be measured again before they are reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.predictors.base import Prediction, Predictor
from archsmith.predictors.linear import Ridge, SupportVectors
from archsmith.predictors.trees import Boosting
from archsmith.space import Architecture, Interval, Space
from archsmith.space.deciders import DeadEnd, Mask
from archsmith.space.options import Options, draw
from archsmith.space.values import Value

FORMAT_VERSION = 1

LatencyModel = Literal["ridge", "svr", "boosting"]

_MODELS: Mapping[str, Callable[[int], Predictor]] = {
    "ridge": lambda seed: Ridge(seed=seed),
    "svr": lambda seed: SupportVectors(seed=seed),
    "boosting": lambda seed: Boosting(seed=seed),
}

_ATTEMPTS = 1_000


class LatencyPredictor:
    """Predicts milliseconds of architectures of one space.

    Args:
        space: Space of the architectures; anything with a one-hot encoding.
        model: "ridge", "svr" or "boosting"; "auto" takes the one with the least error on examples left out in turn.
        provenance: Device, threads, precision, versions (``Latency.to_dict()["provenance"]``); any plain JSON.
        seed: Of the models and folds.

    Attributes:
        chosen: The model in use after ``fit``.
        logarithmic: Whether it learned the logarithm.
        errors: Median relative error on examples left out in turn, by model.

    Raises:
        UserError: Unknown model.
    """

    def __init__(
        self,
        space: Space,
        *,
        model: LatencyModel | Literal["auto"] = "auto",
        provenance: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if model not in (*get_args(LatencyModel), "auto"):
            raise UserError("model", model, allowed=", ".join((*get_args(LatencyModel), "auto")))
        self.space, self.model, self.seed = space, model, seed
        self.provenance = dict(provenance or {})
        self.chosen: str | None = None
        self.logarithmic = False
        self.errors: dict[str, float] = {}
        self._examples: list[tuple[Architecture, float]] = []
        self._predictor: Predictor | None = None

    def fit(self, architectures: Sequence[Architecture], latencies_ms: Sequence[float]) -> None:
        """Learn from measured networks, replacing what was learned before.

        Raises:
            UserError: Fewer than five examples, or a latency that is not a positive number.
        """
        times = [float(each) for each in latencies_ms]
        if len(architectures) != len(times) or len(times) < 5:
            raise UserError("latencies_ms", len(times), allowed="at least 5, one for each architecture")
        if wrong := [each for each in times if not (math.isfinite(each) and each > 0)]:
            raise UserError("latencies_ms", wrong[0], allowed="positive numbers of milliseconds")
        self._examples = list(zip(architectures, times, strict=True))
        features, targets = self._features(architectures), np.array(times)
        names = get_args(LatencyModel) if self.model == "auto" else (self.model,)
        errors = {
            (name, logarithmic): self._error_left_out(name, features, targets, logarithmic)
            for name in names
            for logarithmic in (False, True)
        }
        self.errors = {name: min(errors[name, False], errors[name, True]) for name in names}
        self.chosen, self.logarithmic = min(errors, key=lambda pair: errors[pair])
        self._predictor = _MODELS[self.chosen](self.seed)
        self._predictor.fit(features, np.log(targets) if self.logarithmic else targets)

    def predict(self, architectures: Sequence[Architecture]) -> Prediction:
        """Return milliseconds, not negative, and their standard deviation.

        Raises:
            UserError: Nothing was fitted yet.
        """
        if self._predictor is None:
            raise UserError("predict", Shown("a call before fit"), allowed="after fit(architectures, latencies_ms)")
        found = self._predictor.predict(self._features(architectures))
        if not self.logarithmic:
            return Prediction(np.maximum(found.mean, 0.0), found.std)
        mean = np.exp(found.mean)
        return Prediction(mean, mean * found.std)  # of the logarithm, times the mean

    def to_json(self) -> dict[str, Any]:
        """Return everything that ``from_json`` needs: the examples, not the fitted numbers."""
        return {
            "format_version": FORMAT_VERSION,
            "space": self.space.name,
            "model": self.model,
            "seed": self.seed,
            "provenance": self.provenance,
            "errors": self.errors,
            "examples": [[architecture.to_json(), time] for architecture, time in self._examples],
        }

    def save(self, path: str | Path) -> None:
        """Write ``to_json`` to a file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    @classmethod
    def from_json(cls, data: Mapping[str, Any], space: Space) -> LatencyPredictor:
        """Return the predictor that ``to_json`` described, fitted again.

        Args:
            data: What ``to_json`` returned.
            space: The space of its architectures.

        Raises:
            UserError: Another format or space, or an architecture that is not in it.
        """
        if data.get("format_version") != FORMAT_VERSION or data.get("space") != space.name:
            given = {key: data.get(key) for key in ("format_version", "space")}
            raise UserError("latency predictor", given, allowed=f"format_version {FORMAT_VERSION} of {space.name!r}")
        found = cls(space, model=data["model"], provenance=data["provenance"], seed=int(data["seed"]))
        if data["examples"]:
            rows = [(space.validate(Architecture.from_json(row)), time) for row, time in data["examples"]]
            found.fit([architecture for architecture, _ in rows], [time for _, time in rows])
        return found

    @classmethod
    def load(cls, path: str | Path, space: Space) -> LatencyPredictor:
        """Return the predictor that ``save`` wrote.

        Raises:
            UserError: No such file, not JSON, or what ``from_json`` refuses.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError("latency predictor", str(path), allowed="a readable JSON file", hint=str(error)) from error
        return cls.from_json(data, space)

    def _features(self, architectures: Sequence[Architecture]) -> np.ndarray:
        return np.stack([self.space.encode(each, "one-hot") for each in architectures])

    def _error_left_out(self, name: str, features: np.ndarray, times: np.ndarray, logarithmic: bool) -> float:
        """Return the median relative error over five folds."""
        order = np.random.default_rng(self.seed).permutation(len(times))
        errors = np.zeros(len(times))
        targets = np.log(times) if logarithmic else times
        for part in np.array_split(order, 5):
            rest = np.setdiff1d(order, part)
            predictor = _MODELS[name](self.seed)
            predictor.fit(features[rest], targets[rest])
            found = predictor.predict(features[part]).mean
            errors[part] = np.abs((np.exp(found) if logarithmic else found) - times[part]) / times[part]
        return float(np.median(errors))


def corners(space: Space) -> list[Architecture]:
    """Return the uniform settings: every decision at its first, last and middle option, where that is valid."""
    found: dict[str, Architecture] = {}
    for share in (0.0, 1.0, 0.5):

        def decide(path: str, options: Options, mask: Mask, group: str, share: float = share) -> Value:
            if isinstance(options, Interval):
                return options.low + share * (options.high - options.low)
            allowed = range(len(options)) if mask is None else np.flatnonzero(mask)
            return options[int(allowed[round(share * (len(allowed) - 1))])]

        try:
            architecture = space.walk(decide)
        except DeadEnd:  # this uniform setting breaks a constraint
            continue
        found.setdefault(architecture.network_digest, architecture)
    return list(found.values())


def next_networks(
    space: Space,
    n: int,
    rng: np.random.Generator,
    *,
    known: Sequence[Architecture] = (),
    front: Sequence[Architecture] = (),
    near: float = 0.5,
) -> list[Architecture]:
    """Return networks to measure next: corners first, then mutations of the front, then random ones; none twice.

    Args:
        space: Where they come from.
        n: How many; fewer where the space has no more.
        rng: Stream of the draws.
        known: Networks that were measured already.
        front: Networks on the predicted front.
        near: Share of the places behind the corners that go to mutations of ``front``, where there is one.

    Random networks are drawn decision by decision, so that every depth and every width is as frequent as any other.

    Raises:
        UserError: ``n`` is not positive.
    """
    if n < 1:
        raise UserError("n", n, allowed="an integer from 1")
    digests = {each.network_digest for each in known}
    found: list[Architecture] = []

    def add(architecture: Architecture) -> None:
        if architecture.network_digest not in digests and len(found) < n:
            digests.add(architecture.network_digest)
            found.append(architecture)

    for each in corners(space):
        add(each)
    wanted = len(found) + (round(near * (n - len(found))) if front else 0)
    for _ in range(_ATTEMPTS):
        if len(found) >= wanted:
            break
        child = front[int(rng.integers(len(front)))]
        for _ in range(1 + int(rng.integers(2))):
            child = space.mutate(child, rng)
        add(child)
    for _ in range(_ATTEMPTS + n):
        if len(found) >= n:
            break
        try:
            add(space.walk(lambda path, options, mask, group: draw(options, mask, rng)))
        except DeadEnd:
            continue
    return found

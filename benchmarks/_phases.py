"""Where the time of a search goes: every moment belongs to exactly one phase, the innermost that is open."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from archsmith import api
from archsmith.atoms.penalty import ScalePenalty
from archsmith.layers.mobile import MobileNet
from archsmith.methods import atomnas
from archsmith.run import drive
from archsmith.run.checkpoints import CheckpointStore
from archsmith.run.directory import Run
from archsmith.run.scalars import Scalars
from archsmith.tasks import classification
from archsmith.tasks.vision import ImageClassification
from archsmith.train.average import MovingAverage
from archsmith.train.optim import RMSprop

WORK = ("forward and loss", "backward", "optimiser", "validation and test", "recalibration")
"""What a training run does anyway; everything else is the library's overhead, data and augmentation included."""

_WHOLE = {"validation and test", "recalibration", "export and check", "latency measurement"}
"""Phases that keep what happens inside them: the batches and forward passes of a validation are validation."""


class Phases:
    """Exclusive time by phase, on any clock."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock
        self._open = ["the rest"]
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``, except inside of a phase that keeps its own."""
        self._switch([*self._open, self._open[-1] if self._open[-1] in _WHOLE else name])
        try:
            yield
        finally:
            self._switch(self._open[:-1])

    def close(self) -> dict[str, float]:
        """Return the seconds of all phases; together they are the time since the construction."""
        self._switch(self._open)
        return dict(self.seconds)

    def _switch(self, stack: list[str]) -> None:
        now = self._clock()
        self.seconds[self._open[-1]] += now - self._since
        self._open, self._since = stack, now

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with its time counted as ``name``."""

        def timed(*args: Any, **settings: Any) -> Any:
            with self.phase(name):
                return function(*args, **settings)

        return timed

    def around_batches(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function like ``function``, which returns an iterator, with the time of each item counted."""

        def timed(*args: Any, **settings: Any) -> Iterator[Any]:
            batches = function(*args, **settings)
            while True:
                with self.phase("data: batches"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

        return timed


_TIMED: tuple[tuple[str, object, str], ...] = (
    ("forward and loss", MobileNet, "forward"),
    ("forward and loss", classification, "smoothed_cross_entropy"),
    ("backward", torch.Tensor, "backward"),
    ("optimiser", RMSprop, "step"),
    ("optimiser", RMSprop, "zero_grad"),
    ("validation and test", ImageClassification, "evaluate"),
    ("recalibration", atomnas, "recalibrate"),
    ("data: augmentation", classification, "augmented"),
    ("penalty", ScalePenalty, "add_gradient_"),
    ("moving average", MovingAverage, "update"),
    ("moving average", MovingAverage, "averaged_copy"),
    ("budget: is it met, steering", atomnas.Searcher, "_alive"),
    ("budget: is it met, steering", atomnas.Searcher, "_within_budget"),
    ("budget: is it met, steering", atomnas.Searcher, "_steer"),
    ("shrinking", atomnas.Searcher, "_shrink"),
    ("journal", Run, "record"),
    ("checkpoints", CheckpointStore, "save"),
    ("step: the rest", atomnas, "train_epoch"),
    ("epoch end: the rest", atomnas.Searcher, "_end_epoch"),
    ("scalars for TensorBoard", Scalars, "add"),
    ("preparation", api, "open_task"),
    ("preparation", api, "prepare"),
    ("preparation", api, "check_room"),
    ("preparation", api, "record_environment"),
    ("delivery: the rest", drive, "finish"),
    ("delivery: the rest", atomnas.Searcher, "deliver"),
    ("export and check", drive, "export_network"),
    ("latency measurement", drive, "measure_latency"),
    ("report", api, "_write_report"),
)


@contextmanager
def timed_phases(clock: Callable[[], float] = time.perf_counter) -> Iterator[Phases]:
    """Time the library's own functions while the block runs; nothing in the library knows of it."""
    phases = Phases(clock)
    with ExitStack() as stack:
        for name, owner, attribute in _TIMED:
            function = phases.around(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, function))
        batches = phases.around_batches(ImageClassification.batches)
        stack.enter_context(patch.object(ImageClassification, "batches", batches))
        yield phases

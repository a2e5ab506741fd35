"""Searches small enough for tests: real digits, a small supernet, a strong penalty."""

from __future__ import annotations

from typing import Any, Literal

import torch
from mobile_samples import small_family
from torch import Tensor

from archsmith.families.mobile import MobileFamily
from archsmith.methods.atomnas import Searcher, Settings
from archsmith.run.costs import CostModel
from archsmith.space import Budget
from archsmith.tasks import open_task
from archsmith.tasks.base import Task

QUICK = {
    "epochs": 6,
    "batch_size": 32,
    "schedule": "linear",
    "lr": 0.03,
    "lr_warmup_epochs": 0.5,
    "rho": 0.02,
    "warmup_epochs": 1.0,
    "threshold": 0.1,
    "shrink_fraction": 0.0,
    "ema_decay": 0.7,
    "ema_reference_batch": 32,
    "recalibration_batches": 2,
    "recalibration_batch_size": 64,
}
"""Two thirds of the atoms die within six epochs of five steps."""


class Notes:
    """A journal in memory."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def record(self, kind: str, **fields: Any) -> None:
        self.entries.append({"kind": kind, **fields})

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if kind in (None, entry["kind"])]


class Watch:
    """A monitor that asks to stop after some numbers of steps, once each."""

    def __init__(self, *stops: int) -> None:
        self.stops, self.total = set(stops), 0

    def step(self, total: int, **figures: float) -> None:
        self.total = total

    def should_stop(self) -> bool:
        if self.total in self.stops:
            self.stops.remove(self.total)
            return True
        return False


def digits(limit: int | None = 20) -> Task:
    return open_task("digits", limit=limit, label_smoothing=0.1)


def search(
    task: Task,
    *,
    family: MobileFamily | None = None,
    budget: str | None = None,
    seed: int = 0,
    memory_format: Literal["channels_last", "contiguous"] = "channels_last",
    **settings: Any,
) -> Searcher:
    """Return a fresh search; ``settings`` change the quick ones."""
    family = family or small_family(num_classes=10)
    costs = CostModel(family, Budget.parse(budget) if budget else None, Notes())
    chosen = Settings(**(QUICK | settings))
    return Searcher(family=family, task=task, settings=chosen, costs=costs, seed=seed, memory_format=memory_format)


def finish(searcher: Searcher, watch: Watch | None = None) -> list[dict[str, Any]]:
    """Run to the end and return the figures of all epochs."""
    figures = []
    watch = watch or Watch()
    while not searcher.done:
        figures.append(searcher.advance(watch))
    return [f for f in figures if f is not None]


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as a file would hold them: plain and contiguous."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}

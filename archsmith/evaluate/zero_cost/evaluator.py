"""Zero-cost scores as an evaluator: one network built, all scores taken from it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import seed_of
from archsmith.evaluate.base import WeightStore
from archsmith.evaluate.zero_cost.base import SCORES, TEXT_SCORES, Batch
from archsmith.space import Result, Space, Trial

SHAPE_BATCH = 16
"""Images of zeros that stand for a batch where no score looks at more than the shape."""


class BuildingFamily(Protocol):
    """What is asked of a family here."""

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""

    @property
    def space(self) -> Space:
        """The space whose points it builds."""

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
        """Return the network of an architecture, initialised from ``seed``."""


class ZeroCostEvaluator:
    """Scores architectures without training them.

    Args:
        family: Builds the networks.
        batch: The images and labels that scores look at; may be None when all ``scores`` need the shape only.
        scores: Names from ``archsmith.evaluate.zero_cost.SCORES`` or, for networks of text, ``TEXT_SCORES``, each once.

    The network is initialised from the trial's seed, and all scores are taken from this one build. ``metrics`` holds
    the scores by name; ``params`` and ``macs``, where asked for, are in ``costs`` as well. Scores may be infinite or
    NaN: that is what they say of such a network. ``seconds`` is the time for building and scoring. Weights of a weight
    store are neither read nor kept.

    Raises:
        UserError: An unknown score, one named twice, none, or one that needs a batch that is not there.
    """

    def __init__(self, family: BuildingFamily, batch: Batch | None = None, *, scores: Sequence[str]) -> None:
        names = tuple(scores)
        listed = {**SCORES, **TEXT_SCORES}
        unknown = [name for name in names if name not in listed]
        if unknown or not names or len(set(names)) < len(names):
            raise UserError("scores", list(names), allowed=f"some of {', '.join(listed)}, each once")
        if batch is None and (hungry := [name for name in names if listed[name].needs != "shape"]):
            raise UserError("batch", None, allowed=f"a Batch, because {', '.join(hungry)} look at images or labels")
        if batch is not None and tuple(batch.images.shape[1:]) != tuple(family.image):
            raise UserError(
                "batch",
                Shown(f"images of shape {tuple(batch.images.shape[1:])}"),
                allowed=f"images of shape {tuple(family.image)}, which the family is for",
            )
        self.family = family
        self.batch = batch
        self.scores = names
        self._listed = listed

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Score one trial.

        Args:
            trial: What to score; its seed gives the initial weights and the scores' own random numbers.
            weights: Not used.

        Returns:
            A result whose metrics are the scores, or a failed one that names the score and the error.

        Raises:
            UserError: The architecture is not of the family's space, or a fidelity is asked for; there is only one.
        """
        architecture = self.family.space.validate(trial.architecture)
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: a zero-cost score has no fidelity")
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        doing = "building the network"
        try:
            network = self.family.build(architecture, seed=seed_of(trial.seed, "weights"))
            batch = self.batch or _zeros(self.family.image)
            for doing in self.scores:
                generator = torch.Generator().manual_seed(seed_of(trial.seed, "score", doing))
                metrics[doing] = self._listed[doing].function(network, batch, generator)
        except Exception as error:  # whatever a candidate does is a result, see Evaluator
            return Result.failed(f"{doing}: {type(error).__name__}: {error}", seconds=time.perf_counter() - start)
        costs = {name: value for name, value in metrics.items() if name in ("params", "macs")}
        return Result(metrics=metrics, costs=costs, seconds=time.perf_counter() - start)


def _zeros(image: tuple[int, int, int]) -> Batch:
    return Batch(torch.zeros(SHAPE_BATCH, *image), torch.zeros(SHAPE_BATCH, dtype=torch.int64))

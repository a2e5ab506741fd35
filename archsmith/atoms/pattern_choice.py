"""What of convolutions stays under kernel and pattern pruning, chosen once from the importance of their weights.

In every layer the least important kernels go, ranked over the layer, or, for one ratio over the whole network, ranked
over all layers; in every 3x3 kernel the best of a pool of shared patterns of four weights stays.

Source: ClickTrain, arXiv 2011.10170.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from archsmith.atoms.pattern_file import KernelChoice
from archsmith.atoms.prunable import convolutions
from archsmith.atoms.weight_masks import Kernels, Patterns, Pool, pattern_pool, percents_by_ranking

_KEPT = 4
"""Weights that a pattern keeps of nine."""


class PatternSettings(Protocol):
    """What decides a choice; ``archsmith.methods.clicktrain.Settings`` says what each means."""

    @property
    def kernels(self) -> float | dict[str, float] | None:
        """Percent of the kernels that go."""

    @property
    def patterns(self) -> int:
        """Patterns of the pool."""

    @property
    def pool(self) -> Literal["fixed", "frequent"]:
        """Where the patterns come from."""

    @property
    def centre(self) -> bool:
        """Whether patterns keep the centre."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What stays, chosen once.

    Attributes:
        pool: The patterns.
        percent: Percent of the kernels that go, by layer.
        choices: Which kernels stay and which pattern each has, by layer.
    """

    pool: Pool
    percent: dict[str, float]
    choices: dict[str, KernelChoice]


def choose(scores: Mapping[str, Tensor], settings: PatternSettings, *, budget: int | None = None) -> Decision:
    """Choose kernels and patterns of all layers from the importance of their weights.

    Args:
        scores: ``importance`` of each layer's weight, by name.
        settings: Percentages, pool, patterns.
        budget: With ``settings.ratio``: weights that these layers may keep.
    """
    pool = pattern_pool(settings.pool, settings.patterns, scores=_of_3x3(scores), centre=settings.centre)
    if budget is not None:
        percent = percents_by_ranking(scores, {name: weights_per_kernel(s.shape) for name, s in scores.items()}, budget)
    else:
        percent = percents_of(settings, scores)
    choices = {}
    for name, score in scores.items():
        # Every kernel gets a pattern, the removed ones too: their lasso counts both.
        patterns = Patterns(pool).choose_ids(score).to(torch.uint8) if score.shape[2:] == (3, 3) else None
        choices[name] = KernelChoice(Kernels(percent[name]).choose_kernels(score), patterns)
    return Decision(pool, percent, choices)


def masks_of(weight: Tensor, choice: KernelChoice, pool: Pool) -> list[Tensor]:
    """Return the masks of one layer, of the weight's shape: kernels, and patterns where it has them; both must hold."""
    masks = [choice.kept[:, :, None, None].expand(weight.shape).clone()]
    if choice.patterns is not None:
        masks.append(Patterns(pool).mask_of(choice.patterns.long()))
    return masks


def percents_of(settings: PatternSettings, layers: Iterable[str]) -> dict[str, float]:
    """Return the percent of kernels that go, by layer."""
    if isinstance(settings.kernels, dict):
        return {name: settings.kernels[name] for name in layers}
    assert settings.kernels is not None
    return dict.fromkeys(layers, settings.kernels)


def weights_per_kernel(shape: torch.Size | tuple[int, ...]) -> int:
    """Return how many weights stay in a kernel that stays: four of 3x3, all of other sizes."""
    return _KEPT if tuple(shape[2:]) == (3, 3) else shape[2] * shape[3]


def _of_3x3(scores: Mapping[str, Tensor]) -> list[Tensor]:
    return [score for score in scores.values() if score.shape[2:] == (3, 3)]


def weight_budget(model: nn.Module, layers: Mapping[str, nn.Conv2d], ratio: float | None) -> int | None:
    """Return how many weights the pruned layers may keep, so that all convolutions together reach the ratio."""
    if ratio is None:
        return None
    every = sum(one.module.weight.numel() for one in convolutions(model))
    whole = every - sum(module.weight.numel() for module in layers.values())
    budget = int(every / ratio) - whole
    zeros = {name: torch.zeros(module.weight.shape) for name, module in layers.items()}
    per_kernel = {name: weights_per_kernel(module.weight.shape) for name, module in layers.items()}
    percents_by_ranking(zeros, per_kernel, budget)  # raises when it is out of reach, before anything is trained
    return budget


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return weights, those that are not zero, and their ratios: over all, without shortcuts, over pruned layers alone.

    Args:
        rows: "weights", "nonzero" and "kept" (why a layer stays whole, empty for pruned ones) of every convolution.
    """

    def ratio(some: list[Mapping[str, Any]]) -> float:
        nonzero = sum(row["nonzero"] for row in some)
        return sum(row["weights"] for row in some) / nonzero if nonzero else float("inf")

    every = list(rows.values())
    return {
        "weights": sum(row["weights"] for row in every),
        "nonzero": sum(row["nonzero"] for row in every),
        "ratio": ratio(every),
        "ratio_without_shortcuts": ratio([row for row in every if "shortcut" not in row["kept"]]),
        "ratio_pruned": ratio([row for row in every if not row["kept"]]),
    }

"""How much a unit matters: one number for each unit of each group, the smallest go first.

All scores read the slices that ``UnitGroup.places`` names, and nothing else, so that they work for any network:

========  ===============================================================================================
scale     mean magnitude of the normalisation scales of a unit (network slimming, arXiv 1708.06519)
l1, l2    norm over all weights of a unit, biases and scales left out (arXiv 1608.08710)
taylor    ``sum over its tensors of |sum of w * gradient|``, mean over the observed steps (arXiv 1906.10771)
gate      keep probability or magnitude of a gate that somebody trains (FiGS, arXiv 2006.09581)
random    uniform from a generator of its own: what every other score must beat
========  ===============================================================================================

Across groups. The planner's default order looks at parts of a group's total score and needs no common unit of measure.
For the other orders ``normalised`` divides scores by the mean of their group ("mean"): an average unit of every group
then has score 1, and what is compared is how far a unit falls below its own group. "max" divides by the largest, "rank"
keeps the order within a group alone (0 to 1), "none" compares the raw numbers: right for gates and for scales that one
penalty pushes, which are meant to be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from archsmith.atoms.groups import tensors_of
from archsmith.atoms.units import Place, UnitGroup
from archsmith.core.errors import UserError
from archsmith.cost.counts import is_normalisation

FloatArray = npt.NDArray[np.float64]
Scores = dict[str, FloatArray]
"""One float64 array (size,) by group name."""

ScoreName = Literal["scale", "l1", "l2", "taylor", "random"]
Normalisation = Literal["none", "mean", "max", "rank"]
Reduction = Literal["mean", "max"]


def per_position(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the sums of ``values`` over everything but the (flattened) ``axes``, float64 on the CPU."""
    front = values.detach().double().movedim(axes, tuple(range(len(axes))))
    return front.reshape(front.shape[: len(axes)].numel(), -1).sum(dim=1).cpu()


def per_unit(values: Tensor, place: Place) -> FloatArray:
    """Return the sum of ``values`` over the slice of each unit, (units,)."""
    sums: FloatArray = per_position(values, place.axes).numpy()[place.index].sum(axis=1)
    return sums


def scale_names(model: nn.Module) -> set[str]:
    """Return the names of the scale vectors of all normalisation layers."""
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if is_normalisation(module)
        and isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.dim() == 1
    }


def scale_places(model: nn.Module, groups: Sequence[UnitGroup]) -> dict[str, list[Place]]:
    """Return for each group its places in normalisation scales; an empty list where it has none."""
    names = scale_names(model)
    return {group.name: [place for place in group.places if place.tensor in names] for group in groups}


def scale_scores(model: nn.Module, groups: Sequence[UnitGroup], *, reduction: Reduction = "mean") -> Scores:
    """Return the magnitude of the normalisation scales of every unit.

    Args:
        model: The network, read only.
        groups: Groups with at least one normalisation scale each.
        reduction: Over the scales of one unit (several layers, several channels of a head): "mean", or "max", which is
            zero only when all of them are.

    Raises:
        UserError: A group has no normalisation scale.
    """
    tensors, places, scores = tensors_of(model), scale_places(model, groups), Scores()
    for group in groups:
        if not places[group.name]:
            raise UserError(
                "score",
                "scale",
                allowed="for groups with a normalisation scale",
                hint=f"{group.name} has none: use 'l2' or 'taylor', or leave it to gates.",
            )
        values = [tensors[p.tensor].detach().abs().double().cpu().numpy()[p.index] for p in places[group.name]]
        joined = np.concatenate(values, axis=1)
        scores[group.name] = joined.mean(axis=1) if reduction == "mean" else joined.max(axis=1)
    return scores


def weight_scores(model: nn.Module, groups: Sequence[UnitGroup], *, p: int = 2) -> Scores:
    """Return the ``p``-norm over all weights of every unit: its slices of parameters with two or more axes.

    Args:
        model: The network, read only.
        groups: The groups. One that owns nothing but vectors (a learned scale per channel) is scored by these.
        p: 1 or 2.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    powers: dict[tuple[str, tuple[int, ...]], FloatArray] = {}
    scores = Scores()
    for group in groups:
        own = [place for place in group.places if place.tensor in parameters]
        matrices = [place for place in own if parameters[place.tensor].dim() > 1] or own
        total = np.zeros(group.size)
        for place in matrices:
            key = (place.tensor, place.axes)
            if key not in powers:  # several groups lie on one axis of a concatenation
                powers[key] = per_position(parameters[place.tensor].detach().double().abs() ** p, place.axes).numpy()
            total += powers[key][place.index].sum(axis=1)
        scores[group.name] = total ** (1.0 / p)
    return scores


def random_scores(groups: Sequence[UnitGroup], rng: np.random.Generator) -> Scores:
    """Return uniform numbers in [0, 1) for every unit, group after group."""
    return {group.name: rng.random(group.size) for group in groups}


class TaylorScores:
    """First-order change of the loss when a unit goes, accumulated over steps.

    ``observe`` is called when gradients are complete: after the last backward pass of a step and before the optimiser
    takes it. Under gradient accumulation that is once per optimiser step, on the summed gradient.

    Attributes:
        steps: Observations so far.
        sums: Accumulated ``sum over tensors |sum of w * gradient|`` by group name.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.sums: Scores = {}

    def observe(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Add the present gradients; parameters without one count as zero."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        products: dict[tuple[str, tuple[int, ...]], FloatArray] = {}
        for group in groups:
            total = self.sums.setdefault(group.name, np.zeros(group.size))
            for place in group.places:
                parameter = parameters.get(place.tensor)
                if parameter is None or parameter.grad is None:
                    continue
                key = (place.tensor, place.axes)
                if key not in products:
                    products[key] = per_position(parameter.detach() * parameter.grad, place.axes).numpy()
                total += np.abs(products[key][place.index].sum(axis=1))
        self.steps += 1

    def scores(self, groups: Sequence[UnitGroup]) -> Scores:
        """Return the means over the observations.

        Raises:
            UserError: Nothing was observed.
        """
        if not self.steps:
            raise UserError(
                "score", "taylor", allowed="after at least one optimiser step with gradients since the start"
            )
        return {group.name: self.sums[group.name] / self.steps for group in groups}

    def keep(self, kept: Mapping[str, npt.NDArray[np.int64]]) -> None:
        """Follow a cut: ``kept`` are the surviving positions by group name; the mean starts anew.

        The first observation after a cut sees another network, so what was observed before is dropped.
        """
        self.steps = 0
        self.sums = {name: np.zeros(len(units)) for name, units in kept.items()}


def normalised(scores: Mapping[str, FloatArray], how: Normalisation = "mean") -> Scores:
    """Return scores that can be compared across groups; see the table of this module.

    Args:
        scores: Non-negative scores by group name.
        how: "none", "mean", "max" or "rank". A group of zeros stays zero.

    Raises:
        UserError: Unknown ``how``.
    """
    if how not in get_args(Normalisation):
        raise UserError("normalise", how, allowed=", ".join(get_args(Normalisation)))
    if how == "none":
        return dict(scores)
    result = Scores()
    for name, values in scores.items():
        if how == "rank":
            order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
            result[name] = order / max(1, len(values) - 1)
        else:
            unit = values.mean() if how == "mean" else values.max(initial=0.0)
            result[name] = values / unit if unit > 0 else values.copy()
    return result

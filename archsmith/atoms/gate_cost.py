"""The resources of a gated network, and the regulariser that presses on gates by what their units cost *now*.

For an operator ``v`` that multiplies inputs with outputs: ``cost(v) = k_v * alive_in * alive_out`` and
``reg(v) = k_v * (alive_in * R_out + alive_out * R_in)``, where ``R`` is the sum of a group's regularisation vector and
``alive`` a count without gradient. So the pressure on a channel falls when its neighbours shrink. A depthwise operator
has ``cost = k_v * alive`` and ``reg = k_v * (R_in + R_out)``, twice the same gate. Groups without gates count whole and
have ``R = 0``. Products of activations (attention) have three or four factors; the rule is the same, factor by factor.

Source: FiGS (arXiv 2006.09581) and MorphNet (arXiv 1711.06798) for the bilinear form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from archsmith.atoms.unit_costs import CompiledPolynomial, FloatArray, Polynomial, ProductCost, UnitCosts, plus, scaled
from archsmith.core.errors import UserError

Resource = Literal["flops", "params", "activations", "latency"]
"""FLOPs are two for each MAC. "params" are the weights of convolutions and matrix products."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device of the roofline form of latency: an operator takes ``max(FLOPs / peak, bytes / bandwidth)``.

    Attributes:
        peak: FLOPs per second.
        bandwidth: Bytes per second.
        width: Bytes of a number.
    """

    peak: float
    bandwidth: float
    width: int = 4


DEVICES = {
    "p100": Device(peak=9.3e12, bandwidth=732e9),
    "v100": Device(peak=14e12, bandwidth=900e9),
    "a100": Device(peak=19.5e12, bandwidth=1555e9),
    "h100": Device(peak=51e12, bandwidth=2000e9),
}
"""Single-precision peaks and bandwidths of the PCIe cards, as their makers state them."""


class GateCost:
    """A resource of a network whose units have gates.

    Args:
        costs: Its cost polynomials.
        resource: What is charged.
        device: Name in ``DEVICES``, or a device of your own; for "latency" alone.

    Raises:
        UserError: An unknown resource or device, or "latency" without a device.
    """

    def __init__(self, costs: UnitCosts, resource: Resource = "flops", device: str | Device | None = None) -> None:
        if resource not in get_args(Resource):
            raise UserError("resource", resource, allowed=", ".join(get_args(Resource)))
        if (resource == "latency") != (device is not None):
            raise UserError("device", device, allowed="a device for the resource 'latency', none for the others")
        if isinstance(device, str) and device not in DEVICES:
            raise UserError("device", device, allowed=f"{', '.join(DEVICES)}, or a Device of your own")
        self.names = costs.names
        self._costs = costs
        self._device = DEVICES[device] if isinstance(device, str) else device
        sides = [self._sides(each, resource) for each in costs.products]
        self._cost = [[costs.compile(side) for side in pair] for pair in sides]
        doubled = [
            [
                scaled(side, 2) if each.product.kind == "depthwise" and resource != "activations" else side
                for side in pair
            ]
            for each, pair in zip(costs.products, sides, strict=True)
        ]
        self._pressure = [[costs.compile(side) for side in pair] for pair in doubled]
        # With one side everything is one polynomial, and a step costs one evaluation.
        self._total: tuple[CompiledPolynomial, CompiledPolynomial] | None = None
        if resource != "latency":
            self._total = (
                costs.compile(plus(*(pair[0] for pair in sides))),
                costs.compile(plus(*(pair[0] for pair in doubled))),
            )

    def _sides(self, each: ProductCost, resource: Resource) -> list[Polynomial]:
        if resource == "flops":
            return [scaled(each.macs, 2)]
        if resource == "params":
            return [each.elements]
        if resource == "activations":
            return [each.written]
        assert self._device is not None
        numbers = plus(each.read, each.written, each.elements)
        return [
            scaled(each.macs, Fraction(2) / Fraction(self._device.peak)),
            scaled(numbers, Fraction(self._device.width) / Fraction(self._device.bandwidth)),
        ]

    def _vector(self, alive: Mapping[str, int | Tensor]) -> FloatArray:
        counts = []
        for name, size in zip(self.names, self._costs.sizes, strict=True):
            given = alive.get(name, size)
            counts.append(float(given.sum()) if isinstance(given, Tensor) else float(given))
        return np.array(counts)

    def value(self, alive: Mapping[str, int | Tensor]) -> float:
        """Return the cost with these units alive: counts or boolean vectors by group name, all where left out."""
        kept = self._vector(alive)
        if self._total is not None:
            return self._total[0].value(kept)
        return sum(max(side.value(kept) for side in pair) for pair in self._cost)

    def of_products(self, alive: Mapping[str, int | Tensor]) -> list[float]:
        """Return the cost of each product, in the order of ``UnitCosts.products``."""
        kept = self._vector(alive)
        return [max(side.value(kept) for side in pair) for pair in self._cost]

    def weights(self, alive: Mapping[str, int | Tensor]) -> dict[str, float]:
        """Return by group name what one unit of regularisation costs now: the derivative of the cost in its count.

        A latency is charged by the side of the roofline that dominates each operator.
        """
        kept = self._vector(alive)
        if self._total is not None:
            slopes = self._total[1].gradient(kept)
        else:
            slopes = np.zeros(len(self.names))
            for pair, pressure in zip(self._cost, self._pressure, strict=True):
                dominant = int(np.argmax([side.value(kept) for side in pair]))
                slopes += pressure[dominant].gradient(kept)
        return dict(zip(self.names, slopes.tolist(), strict=True))

    def regulariser(self, regularisation: Mapping[str, Tensor], alive: Mapping[str, int | Tensor]) -> Tensor:
        """Return ``sum over products of reg(v)``, differentiable in the regularisation vectors.

        Args:
            regularisation: Vectors (size,) by group name; groups left out have none.
            alive: Counts or boolean vectors by group name.
        """
        weights = self.weights(alive)
        terms = [weights[name] * vector.sum() for name, vector in regularisation.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def regularisers_of_products(
        self, regularisation: Mapping[str, Tensor], alive: Mapping[str, int | Tensor]
    ) -> list[float]:
        """Return ``reg(v)`` of each product, in the order of ``UnitCosts.products``; numbers without gradient."""
        kept = self._vector(alive)
        sums = np.array([float(regularisation[n].double().sum()) if n in regularisation else 0.0 for n in self.names])
        found = []
        for pair, pressure in zip(self._cost, self._pressure, strict=True):
            dominant = int(np.argmax([side.value(kept) for side in pair]))
            found.append(float(pressure[dominant].gradient(kept) @ sums))
        return found

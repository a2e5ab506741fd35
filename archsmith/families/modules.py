"""The networks of module expressions (``archsmith.space.modules``): DeepArchitect's three spaces, and any of your own.

Source: Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from archsmith.core.errors import Shown, UserError
from archsmith.families.module_spaces import published_module
from archsmith.layers.modules import ModuleNetwork
from archsmith.space import Architecture
from archsmith.space.deciders import Mask
from archsmith.space.module_programs import decisions_of, module_from_json, module_to_json
from archsmith.space.module_space import ModuleSpace
from archsmith.space.modules import Module, Program, Shape, padded_shape, window_output
from archsmith.space.options import Interval, Options
from archsmith.space.values import Value

FAMILIES = (
    {
        "name": "deeparchitect",
        "title": "networks of module expressions; DeepArchitect's tfref_convnet, deepconv and resnet",
        "task": "images",
    },
)

GROWING = ("Conv2D.filters", "Conv2D.size", "Affine.units", "Repeat", "RepeatTied")
"""Kinds of decisions whose larger values cost more; larger strides cost less, an ``Or`` lists cheap branches first."""


@dataclass(frozen=True, kw_only=True)
class ModuleFamily:
    """The networks of an expression for one image size.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes; the expression ends with as many features.
        module: The expression.
        label: Name of the expression, part of the space's name.

    Raises:
        UserError: The expression does not end with one feature for each class.

    Example:
        >>> from archsmith.space.modules import Affine, Concat, Conv2D, ReLU
        >>> family = ModuleFamily(
        ...     image=(1, 8, 8), num_classes=10, module=Concat([Conv2D([4, 8], [3, 5]), ReLU(), Affine([10])])
        ... )
        >>> family.space.size
        4
    """

    image: tuple[int, int, int]
    num_classes: int
    module: Module
    label: str = "own"

    def __post_init__(self) -> None:
        for end in (self.smallest(), self.largest()):
            if (shape := self.space.output_shape(end)) != (self.num_classes,):
                raise UserError(
                    "family.module",
                    Shown(f"an expression with outputs of shape {shape}"),
                    allowed=f"one that ends with {self.num_classes} features, one for each class",
                    hint=f"Put Affine([{self.num_classes}]) at its end.",
                )

    @cached_property
    def space(self) -> ModuleSpace:
        """The space of the expression for these images."""
        return ModuleSpace(f"modules-{self.label}", self.module, self.image)

    def largest(self) -> Architecture:
        """Return a greedy guess at the most expensive network: most filters, units, copies, widest convolutions.

        Of an ``Or`` the last branch is taken. No random sample of the published spaces costs more.
        """
        return self.space.walk(_Greedy(largest=True))

    def smallest(self) -> Architecture:
        """Return a greedy guess at the network of the fewest MACs; of an ``Or`` the first branch is taken.

        Where a reduction narrows the map before the last layer (resnet), networks of more MACs have fewer parameters.
        """
        return self.space.walk(_Greedy(largest=False))

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> ModuleNetwork:
        """Return the network of a point of the space, initialised as its modules say.

        Args:
            architecture: Decisions by path.
            seed: Seed of the initialisation; None draws from torch's global generator (for weights that are loaded
                next).
        """
        program = self.space.program(self.space.validate(architecture))
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return ModuleNetwork(program, self.image)

    def architecture_of(self, network: ModuleNetwork) -> Architecture:
        """Return a point of the space whose network has the same program.

        Raises:
            UserError: The network is none of this expression.
        """
        decisions = decisions_of(self.module, network.program)
        if decisions is None:
            raise UserError(
                "network", Shown("one with another program"), allowed=f"a network of the space {self.space.name}"
            )
        return self.space.validate(decisions)

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return ``macs`` (standard convention, one image) and ``params`` in closed form; nothing is built."""
        macs, params, _ = program_costs(self.space.program(self.space.validate(architecture)), self.image)
        return {"macs": macs, "params": params}

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        return {
            "name": "deeparchitect",
            "image": list(self.image),
            "num_classes": self.num_classes,
            "label": self.label,
            "module": module_to_json(self.module),
        }


def program_costs(program: Program, shape: Shape) -> tuple[int, int, Shape]:
    """Return MACs, parameters and the output shape of a specified module for one example.

    A convolution of n filters and window k makes ``n k^2 C`` products for each output pixel and has as many weights and
    n biases; an affine map of N numbers to n has ``n N`` and n; a normalisation has two parameters for each channel.
    """
    kind, content = program
    if kind == "Concat":
        macs = params = 0
        for part in content:
            more, weights, shape = program_costs(part, shape)
            macs, params = macs + more, params + weights
        return macs, params, shape
    if kind == "Residual":
        macs, params, inner = program_costs(content, shape)
        return macs, params, padded_shape(inner, shape)
    values = dict(content)
    if kind == "BatchNormalization":
        return 0, 2 * shape[0], shape
    if kind == "Affine":
        units = values["units"]
        return units * prod(shape), units * (prod(shape) + 1), (units,)
    if kind not in ("Conv2D", "MaxPooling2D", "AvgPooling2D"):
        return 0, 0, shape
    height, width = (window_output(side, values["size"], values["stride"], values["padding"]) for side in shape[1:])
    if kind != "Conv2D":
        return 0, 0, (shape[0], height, width)
    filters = values["filters"]
    weights = filters * shape[0] * values["size"] ** 2
    return weights * height * width, weights + filters, (filters, height, width)


def family_from_json(data: Mapping[str, Any]) -> ModuleFamily:
    """Return the family that ``ModuleFamily.to_json`` described."""
    channels, height, width = data["image"]
    return ModuleFamily(
        image=(channels, height, width),
        num_classes=data["num_classes"],
        module=module_from_json(data["module"]),
        label=data["label"],
    )


def open_family(
    name: str,
    *,
    image: tuple[int, int, int],
    num_classes: int,
    space: str = "tfref_convnet",
    divisor: int = 1,
    training: str = "none",
) -> ModuleFamily:
    """Return the family of one of the published spaces.

    Args:
        name: "deeparchitect".
        image: (C, H, W).
        num_classes: Number of classes.
        space: "tfref_convnet", "deepconv" or "resnet".
        divisor: Divides all widths, see ``archsmith.families.module_spaces.published_module``.
        training: "none", or the training hyper-parameters "light" or "heavy" as part of the space.

    Raises:
        UserError: Another name or space, or a divisor that makes two widths equal.
    """
    if name != "deeparchitect":
        raise UserError("family", name, allowed="deeparchitect", hint="See archsmith families.")
    module = published_module(space, num_classes=num_classes, divisor=divisor, training=training)
    label = "-".join([space, *([f"d{divisor}"] if divisor > 1 else []), *([training] if training != "none" else [])])
    return ModuleFamily(image=(image[0], image[1], image[2]), num_classes=num_classes, module=module, label=label)


class _Greedy:
    """Answers every question with the dearest or the cheapest option."""

    def __init__(self, *, largest: bool) -> None:
        self.largest = largest

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        assert not isinstance(options, Interval)
        if group in GROWING:
            return sorted(options, key=float)[-1 if self.largest else 0]  # type: ignore[arg-type]
        if group.endswith(".stride"):
            return sorted(options, key=float)[0 if self.largest else -1]  # type: ignore[arg-type]
        return options[-1 if self.largest else 0]

"""Once-for-All's MobileNetV3 sub-networks as networks of their own.

What may be chosen and what it costs is ``archsmith.families.ofa_mobile_space``. Each is built as the plain network that
an extraction leaves; the elastic network that holds all of them is ``archsmith.families.ofa_mobile_supernet``.

Source: Cai, Gan, Wang, Zhang, Han 2020, "Once-for-All: Train One Network and Specialize it for Efficient Deployment",
arXiv 1908.09791.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.mobile import fit_strides
from archsmith.families.mobile_chain_space import divisible
from archsmith.families.ofa_mobile_space import (
    DEPTHS,
    EXPANSIONS,
    HARD_SWISH,
    KERNELS,
    NAME,
    SQUEEZED,
    STRIDES,
    OfaMobileSpace,
    Skeleton,
    ofa_mobile_space,
    shape_of,
    squeeze_width,
    uniform_decisions,
)
from archsmith.layers.ofa_mobile import OfaMobileNet
from archsmith.space import Architecture

if TYPE_CHECKING:
    from archsmith.families.ofa_mobile_supernet import OfaMobileSupernet

FAMILIES = (
    {
        "name": "ofa-mobile",
        "title": "MobileNetV3 with kernel, expansion and depth to choose (Once-for-All)",
        "task": "images",
        "relaxed": False,
    },
)


@dataclass(frozen=True, kw_only=True)
class OfaMobileFamily:
    """The sub-networks for one image size.

    Attributes:
        image: Shape of one image, (C, H, W); 3 x 224 x 224 with 1000 classes is published.
        num_classes: Number of classes.
        width: Factor of all widths; 1.0 and 1.2 are published.
        strides: Of the stem and the first block of each unit.
        dropout: Drop probability in front of the classifier.

    Raises:
        UserError: A width that is not above 0, or not six strides of 1 or 2.
    """

    image: tuple[int, int, int]
    num_classes: int
    width: float = 1.0
    strides: tuple[int, ...] = (2, *STRIDES)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.width > 0 or not math.isfinite(self.width):
            raise UserError("family.width", self.width, allowed="a number above 0")
        if len(self.strides) != 1 + len(STRIDES) or not set(self.strides) <= {1, 2}:
            raise UserError("family.strides", self.strides, allowed=f"{1 + len(STRIDES)} strides of 1 or 2")

    @cached_property
    def skeleton(self) -> Skeleton:
        """Widths, sizes and costs."""
        return Skeleton(image=self.image, num_classes=self.num_classes, width=self.width, strides=self.strides)

    @property
    def space(self) -> OfaMobileSpace:
        """The space of 45 dimensions."""
        return ofa_mobile_space()

    def largest(self) -> Architecture:
        """Return the network of kernel 7, expansion 6 and depth 4 everywhere."""
        return self.space.validate(uniform_decisions(max(KERNELS), max(EXPANSIONS), max(DEPTHS)))

    def smallest(self) -> Architecture:
        """Return the network of kernel 3, expansion 3 and depth 2 everywhere."""
        return self.space.validate(uniform_decisions(min(KERNELS), min(EXPANSIONS), min(DEPTHS)))

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> OfaMobileNet:
        """Return the network of a point of the space.

        Args:
            architecture: Decisions by path.
            seed: Seed of the initial weights (normal by fan-out, as published); None leaves torch's own.
        """
        units = []
        for unit, blocks in enumerate(shape_of(architecture)):
            activation = "hard_swish" if HARD_SWISH[unit] else "relu"
            built = []
            for block, (kernel, expansion) in enumerate(blocks):
                channels, out_channels, stride = self.skeleton.block(unit, block)
                hidden = divisible(channels * expansion)
                squeeze = squeeze_width(hidden) if SQUEEZED[unit] else 0
                built.append((out_channels, kernel, stride, hidden, squeeze, activation))
            units.append(tuple(built))
        stem, first, *_, last, mix = self.skeleton.widths
        network = OfaMobileNet(
            in_channels=self.image[0],
            num_classes=self.num_classes,
            stem=stem,
            stem_stride=self.strides[0],
            first=first,
            units=tuple(units),
            last=last,
            mix=mix,
            dropout=self.dropout,
        )
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def architecture_of(self, network: OfaMobileNet) -> Architecture:
        """Return the point of the space that ``network`` is."""
        decisions: dict[str, Any] = {}
        for unit, blocks in enumerate(network.constructor()["units"]):
            decisions[f"stage/{unit}/depth"] = len(blocks)
            for block, (_, kernel, _, hidden, *_) in enumerate(blocks):
                channels = self.skeleton.block(unit, block)[0]
                expansion = next((e for e in EXPANSIONS if divisible(channels * e) == hidden), None)
                decisions[f"stage/{unit}/{block}/kernel"] = kernel
                decisions[f"stage/{unit}/{block}/expand"] = expansion
        return self.space.validate(decisions)

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" (one image) and "params"; nothing is built."""
        return self.skeleton.costs(architecture)

    def supernet(self, *, seed: int | None = None, kernel_transform: bool = True) -> OfaMobileSupernet:
        """Return the elastic network: the largest one, whose slices are all others.

        Args:
            seed: Seed of the published initialisation; None leaves torch's own weights.
            kernel_transform: Whether kernels shrink through learned matrices, as published; else they are cropped.
        """
        from archsmith.families.ofa_mobile_supernet import OfaMobileSupernet

        return OfaMobileSupernet(self, seed=seed, kernel_transform=kernel_transform)

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"name": NAME, **fields, "image": list(self.image), "strides": list(self.strides)}


def family_from_json(data: Mapping[str, Any]) -> OfaMobileFamily:
    """Return the family that ``OfaMobileFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key != "name"}
    channels, height, width = fields.pop("image")
    return OfaMobileFamily(image=(channels, height, width), strides=tuple(fields.pop("strides")), **fields)


def initialise_(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the published initial weights: normal with variance 2 over the fan-out; the classifier uniform."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> OfaMobileFamily:
    """Return the family called ``name`` ("ofa-mobile") for a task's images.

    Args:
        name: "ofa-mobile".
        image: (C, H, W). The first strides are dropped until the last map is at least 4x4 pixels.
        num_classes: Number of classes.
        settings: ``width``, ``dropout``, ``strides``.

    Raises:
        UserError: Another name, or a setting out of its range.
    """
    if name != NAME:
        raise UserError("family", name, allowed=NAME, hint="See archsmith families.")
    settings.setdefault("strides", _fitted(image))
    return OfaMobileFamily(image=image, num_classes=num_classes, **{**settings, "strides": tuple(settings["strides"])})


def _fitted(image: tuple[int, int, int]) -> tuple[int, ...]:
    stem, strides = fit_strides([2, *STRIDES], image)
    return (stem, *strides)

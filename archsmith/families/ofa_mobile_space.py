"""Once-for-All's MobileNetV3 sub-networks: what may be chosen, and exactly what it costs; free of torch.

Five units of two to four inverted residual blocks; every block has a kernel of 3, 5 or 7 and an expansion of 3, 4 or 6.
Blocks behind a unit's depth do not exist. As 45 genes (20 kernels, 20 expansions, 5 depths) there are 3^45 genotypes
for 2.18e19 networks; as a space with conditions each network is one point.

Costs are closed forms: a block's MACs and parameters depend on its place, kernel and expansion alone, so a network's
are sums. What is counted: multiply-accumulates of convolutions and linear layers, and every parameter.

Source: Cai, Gan, Wang, Zhang, Han 2020, "Once-for-All", arXiv 1908.09791; the skeleton is MobileNetV3-Large, Howard et
al. 2019, arXiv 1905.02244.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.families.mobile_chain_space import divisible
from archsmith.space import Architecture, Given, Ordinal, ProductSpace, Value, When, sample_by_decisions
from archsmith.space.elements import Element

NAME = "ofa-mobile"

UNITS = 5
BLOCKS = 4
"""Blocks of a unit at full depth."""

KERNELS = (3, 5, 7)
EXPANSIONS = (3, 4, 6)
DEPTHS = (2, 3, 4)

WIDTHS = (16, 16, 24, 40, 80, 112, 160, 960, 1280)
"""Channels of the stem, the first block, the five units, the last two 1x1 convolutions, at width 1."""

STRIDES = (2, 2, 2, 1, 2)
"""Strides of the units' first blocks; the stem has 2, too."""

SQUEEZED = (False, True, False, True, True)
"""Units with squeeze-and-excitation."""

HARD_SWISH = (False, False, True, True, True)
"""Units with hard swish; the others, and the first block, have ReLU."""


class OfaMobileSpace(ProductSpace):
    """A product space that is sampled gene by gene, as Once-for-All draws its sub-networks.

    Every decision is uniform among its options, so all depths are equally likely. (Uniform over the networks, nine of
    ten units would have the full depth: each block more means nine times as many networks.)
    """

    @property
    def samples_uniformly(self) -> bool:
        """Never: uniform by decisions, not over networks."""
        return False

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return a random network, each decision uniform."""
        return sample_by_decisions(self, rng)

    def sample_many(self, rng: np.random.Generator, n: int) -> list[Architecture]:
        """Return ``n`` networks, as by as many calls of ``sample``."""
        return [self.sample(rng) for _ in range(n)]


def unit_elements() -> dict[str, Element]:
    """Return the 45 dimensions: ``stage/<u>/depth``, ``stage/<u>/<b>/kernel`` and ``stage/<u>/<b>/expand``."""
    elements: dict[str, Element] = {}
    for unit in range(UNITS):
        depth = f"stage/{unit}/depth"
        elements[depth] = Ordinal(DEPTHS)
        for block in range(BLOCKS):
            reached = When(depth, [d for d in DEPTHS if d > block])
            elements[f"stage/{unit}/{block}/kernel"] = Given(reached, Ordinal(KERNELS, group="kernel"))
            elements[f"stage/{unit}/{block}/expand"] = Given(reached, Ordinal(EXPANSIONS, group="expand"))
    return elements


def ofa_mobile_space(resolutions: Sequence[int] = (), *, name: str = NAME) -> OfaMobileSpace:
    """Return the space: 45 dimensions, of which a network decides those that its depths reach.

    Args:
        resolutions: Sides of the image that may be chosen (``resolution``); none where the side is given.
        name: Name of the space.
    """
    elements: dict[str, Element] = {"resolution": Ordinal(tuple(resolutions))} if resolutions else {}
    return OfaMobileSpace(name, {**elements, **unit_elements()})


def from_genes(kernels: Sequence[int], expansions: Sequence[int], depths: Sequence[int]) -> dict[str, Value]:
    """Return the decisions of a published genotype; genes of blocks that do not exist are left out.

    Args:
        kernels: 20 kernel sizes, unit by unit.
        expansions: 20 expansions.
        depths: 5 depths.

    Raises:
        UserError: Another number of genes.
    """
    if (len(kernels), len(expansions), len(depths)) != (UNITS * BLOCKS, UNITS * BLOCKS, UNITS):
        raise UserError("genes", [len(kernels), len(expansions), len(depths)], allowed="20 kernels, 20 expansions, 5")
    found: dict[str, Value] = {}
    for unit, depth in enumerate(depths):
        found[f"stage/{unit}/depth"] = int(depth)
        for block in range(int(depth)):
            found[f"stage/{unit}/{block}/kernel"] = int(kernels[unit * BLOCKS + block])
            found[f"stage/{unit}/{block}/expand"] = int(expansions[unit * BLOCKS + block])
    return found


def uniform_decisions(kernel: int, expansion: int, depth: int) -> dict[str, Value]:
    """Return the network with the same kernel and expansion in all blocks and the same depth in all units."""
    count = UNITS * BLOCKS
    return from_genes([kernel] * count, [expansion] * count, [depth] * UNITS)


def shape_of(architecture: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
    """Return (kernel, expansion) of every existing block, unit by unit."""
    return [
        [
            (int(architecture[f"stage/{unit}/{block}/kernel"]), int(architecture[f"stage/{unit}/{block}/expand"]))
            for block in range(int(architecture[f"stage/{unit}/depth"]))
        ]
        for unit in range(UNITS)
    ]


@dataclass(frozen=True)
class Skeleton:
    """Widths and sizes of the network around the choices, and what every part costs.

    Attributes:
        image: Shape of one image, (C, H, W).
        num_classes: Number of classes.
        width: Factor of all widths, which become multiples of 8; 1.0 and 1.2 are published.
        strides: Of the stem and the units' first blocks.
    """

    image: tuple[int, int, int] = (3, 224, 224)
    num_classes: int = 1000
    width: float = 1.0
    strides: tuple[int, ...] = (2, *STRIDES)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Channels of the stem, the first block, the five units and the last two 1x1 convolutions."""
        return tuple(divisible(channels * self.width) for channels in WIDTHS)

    def block(self, unit: int, block: int) -> tuple[int, int, int]:
        """Return (input channels, output channels, stride) of a block."""
        before, own = self.widths[1 + unit], self.widths[2 + unit]
        return (before, own, self.strides[1 + unit]) if block == 0 else (own, own, 1)

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width behind the stem and behind each unit."""
        height, width = self.image[1:]
        found = []
        for stride in self.strides:
            height, width = -(-height // stride), -(-width // stride)
            found.append((height, width))
        return tuple(found)

    def block_costs(self, unit: int, block: int, kernel: int, expansion: int) -> tuple[int, int]:
        """Return (MACs of one image, parameters) of a block."""
        channels, out_channels, _ = self.block(unit, block)
        behind = _area(self.sizes[1 + unit])
        before = _area(self.sizes[unit]) if block == 0 else behind
        hidden = divisible(channels * expansion)
        macs = before * channels * hidden + behind * hidden * (kernel**2 + out_channels)
        params = hidden * (channels + 2) + hidden * (kernel**2 + 2) + out_channels * (hidden + 2)
        if SQUEEZED[unit]:
            squeezed = squeeze_width(hidden)
            macs += 2 * hidden * squeezed
            params += 2 * hidden * squeezed + hidden + squeezed
        return macs, params

    @cached_property
    def fixed_costs(self) -> tuple[int, int]:
        """MACs and parameters of what every network has: stem, first block, last convolutions, classifier."""
        stem, first, last, final, mix = (*self.widths[:2], *self.widths[-3:])
        start, end = _area(self.sizes[0]), _area(self.sizes[-1])
        macs = start * 9 * self.image[0] * stem + start * (9 * stem + stem * first)
        macs += end * last * final + final * mix + mix * self.num_classes
        params = 9 * self.image[0] * stem + 2 * stem + (9 * stem + 2 * stem) + (stem * first + 2 * first)
        params += last * final + 2 * final + final * mix + (mix + 1) * self.num_classes
        return macs, params

    @cached_property
    def _table(self) -> dict[tuple[int, int, int, int], tuple[int, int]]:
        return {
            (unit, block, kernel, expansion): self.block_costs(unit, block, kernel, expansion)
            for unit in range(UNITS)
            for block in range(BLOCKS)
            for kernel in KERNELS
            for expansion in EXPANSIONS
        }

    def costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" (one image) and "params" of a network; nothing is built."""
        macs, params = self.fixed_costs
        for unit, blocks in enumerate(shape_of(architecture)):
            for block, (kernel, expansion) in enumerate(blocks):
                own = self._table[unit, block, kernel, expansion]
                macs, params = macs + own[0], params + own[1]
        return {"macs": macs, "params": params}


def squeeze_width(hidden: int) -> int:
    """Return the width of the bottleneck of squeeze-and-excitation: a quarter, as a multiple of 8."""
    return divisible(hidden // 4)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]

"""Once-for-All's elastic ResNet50: what may be chosen, and what it costs; no torch, no network.

29 dimensions of three options: the depth of the stem and of four stages (how many blocks, beyond the fewest, a stage
has), the expansion of each of 18 blocks, and the width of the stem's two convolutions and of the stages. The networks
are bottleneck residual networks with three 3x3 convolutions in the stem and average pooling in front of the shortcuts'
projections. The second convolution of the stem is there at its largest depth alone (the smallest leaves it out, which
the published sizes show; the middle does as well, which is our reading).

Source: Cai, Gan, Wang, Zhang, Han 2020, arXiv 1908.09791; the space as searched in arXiv 2205.10358.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archsmith.core.errors import UserError
from archsmith.families.mobile_chain_space import divisible
from archsmith.space import Element, Given, Ordinal, ProductSpace, When

NAME = "ofa-resnet50"

DEPTHS = (0, 1, 2)
EXPANSIONS = (0.2, 0.25, 0.35)
WIDTHS = (0.65, 0.8, 1.0)

STEM = (32, 64)
STAGES = (256, 512, 1024, 2048)
FEWEST = (2, 2, 4, 2)
"""Blocks of every stage at depth 0."""


def ofa_resnet_space() -> ProductSpace:
    """Return the space: 29 dimensions, of which a network decides those that its depths reach.

    Paths: ``stem/depth``, ``stem/0/width``, ``stem/1/width``, ``stage/<s>/depth``, ``stage/<s>/width`` and
    ``stage/<s>/<b>/expand``.
    """
    elements: dict[str, Element] = {"stem/depth": Ordinal(DEPTHS, group="depth")}
    for number in range(len(STEM)):
        elements[f"stem/{number}/width"] = Ordinal(WIDTHS, group="width")
    for stage, fewest in enumerate(FEWEST):
        depth = f"stage/{stage}/depth"
        elements[depth] = Ordinal(DEPTHS, group="depth")
        elements[f"stage/{stage}/width"] = Ordinal(WIDTHS, group="width")
        for block in range(fewest + max(DEPTHS)):
            element: Element = Ordinal(EXPANSIONS, group="expand")
            if block >= fewest:
                element = Given(When(depth, [d for d in DEPTHS if fewest + d > block]), element)
            elements[f"stage/{stage}/{block}/expand"] = element
    return ProductSpace(NAME, elements)


def uniform_decisions(depth: int, expansion: float, width: float) -> dict[str, Any]:
    """Return the network with the same depth, expansion and width everywhere."""
    decisions: dict[str, Any] = {"stem/depth": depth}
    decisions |= {f"stem/{number}/width": width for number in range(len(STEM))}
    for stage, fewest in enumerate(FEWEST):
        decisions |= {f"stage/{stage}/depth": depth, f"stage/{stage}/width": width}
        decisions |= {f"stage/{stage}/{block}/expand": expansion for block in range(fewest + depth)}
    return decisions


def exact_costs(architecture: Mapping[str, Any], *, side: int = 224, num_classes: int = 1000) -> dict[str, int]:
    """Return "macs" (convolutions and the classifier, one image) and "params" of a network.

    Args:
        architecture: Decisions by path.
        side: Pixels of a side of the image; strides round up.
        num_classes: Number of classes.

    Raises:
        UserError: A side below 32 pixels.
    """
    if side < 32:
        raise UserError("side", side, allowed="at least 32")
    macs = params = 0

    def convolution(inputs: int, outputs: int, kernel: int, size: int) -> None:
        nonlocal macs, params
        macs += inputs * outputs * kernel**2 * size**2
        params += inputs * outputs * kernel**2 + 2 * outputs  # and its normalisation

    size = -(-side // 2)
    middle, channels = (divisible(c * architecture[f"stem/{i}/width"]) for i, c in enumerate(STEM))
    convolution(3, middle, 3, size)
    if architecture["stem/depth"] == max(DEPTHS):
        convolution(middle, middle, 3, size)
    convolution(middle, channels, 3, size)
    size = -(-size // 2)
    for stage, (width, fewest) in enumerate(zip(STAGES, FEWEST, strict=True)):
        outputs = divisible(width * architecture[f"stage/{stage}/width"])
        for block in range(fewest + architecture[f"stage/{stage}/depth"]):
            hidden = divisible(outputs * architecture[f"stage/{stage}/{block}/expand"])
            convolution(channels, hidden, 1, size)
            if block == 0 and stage > 0:
                size = -(-size // 2)
            convolution(hidden, hidden, 3, size)
            convolution(hidden, outputs, 1, size)
            if block == 0:
                convolution(channels, outputs, 1, size)  # the shortcut's, behind its pooling
            channels = outputs
    return {"macs": macs + channels * num_classes, "params": params + channels * num_classes + num_classes}

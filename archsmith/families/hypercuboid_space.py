"""The HyperCuboid: paths through a grid of widths and operations, without the networks and without torch.

A path begins with one of the widths, behind the stem. Each of its steps takes one of the operations to one of the
widths; steps have stride 1 and stride 2 in turn. What is chosen may be any discrete hyper-parameter: an operation is a
name for a combination of them (kernel, dilation, width of the middle).

Source: Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, ProductSpace
from archsmith.supernet.grid_paths import GridPath

POOL_AND_CONVOLUTION = ("max_pool_3x3", "sep_conv_3x3")
"""The published operations of a step: a pooling that may change the width, and a sharp separable convolution."""

STEM = "stem/width"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What paths go through.

    Attributes:
        widths: Channels, ascending.
        steps: Number of steps, even: stride 1 and 2 in turn.
        operations: Names of the operations of a step.
    """

    widths: tuple[int, ...]
    steps: int
    operations: tuple[str, ...]

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of all ways to take a step: input width, output width, operation, the last running fastest."""
        return tuple(
            candidate_name(before, behind, operation)
            for before in self.widths
            for behind in self.widths
            for operation in self.operations
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Axes of a tensor of all candidates: steps, input widths, output widths, operations."""
        return self.steps, len(self.widths), len(self.widths), len(self.operations)

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of every step, for reports."""
        return tuple(f"stage {step // 2 + 1}, stride {1 + step % 2}" for step in range(self.steps))

    def space(self) -> ProductSpace:
        """Return the space of all paths: ``stem/width``, and for each step n from 1 ``n/operation`` and ``n/width``."""
        elements = {STEM: Categorical(self.widths, group="width")}
        for step in range(1, self.steps + 1):
            elements[f"{step}/operation"] = Categorical(self.operations, group="operation")
            elements[f"{step}/width"] = Categorical(self.widths, group="width")
        return ProductSpace("hypercuboid", elements)

    def architecture(self, path: GridPath) -> Architecture:
        """Return a path as a point of the space."""
        decisions: dict[str, Any] = {STEM: self.widths[path.widths[0]]}
        for step, operation in enumerate(path.operations, 1):
            decisions[f"{step}/operation"] = self.operations[operation]
            decisions[f"{step}/width"] = self.widths[path.widths[step]]
        return self.space().validate(decisions)

    def path(self, architecture: Mapping[str, Any]) -> GridPath:
        """Return a point of the space as a path.

        Raises:
            UserError: It is not of the space.
        """
        widths, operations = chain_of(self.space().validate(architecture))
        return GridPath(
            tuple(self.widths.index(width) for width in widths),
            tuple(self.operations.index(operation) for operation in operations),
        )


def candidate_name(before: int, behind: int, operation: str) -> str:
    """Return the name of one way to take a step."""
    return f"{before}-{behind}-{operation}"


def chain_of(decisions: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return widths (behind the stem and every step) and operations of a path."""
    steps = (len(decisions) - 1) // 2
    widths = (int(decisions[STEM]), *(int(decisions[f"{step}/width"]) for step in range(1, steps + 1)))
    return widths, tuple(str(decisions[f"{step}/operation"]) for step in range(1, steps + 1))


def grid_widths(channels: int, count: int) -> tuple[int, ...]:
    """Return ``count`` widths, each twice the one before, from the largest power of two that is not above ``channels``.

    Raises:
        UserError: A number below 1.
    """
    for name, value in (("channels", channels), ("count", count)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(name, value, allowed="an integer from 1")
    least = 2 ** int(log2(channels))
    return tuple(least * 2**power for power in range(count))

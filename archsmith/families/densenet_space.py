"""DenseNets with bottlenecks as strings that grow: a growth rate for each miniblock, a transition between blocks.

The space of EAS with skip connections: ``g4 t g4 t g4`` is the start network, three dense blocks of one miniblock of
growth 4. The widths of stem and transitions follow: the stem has twice the mean growth (it never shrinks, so it is a
decision of its own), a transition keeps ``reduction`` of what its block puts out. Needs no torch.

Source: Cai et al. 2018, arXiv 1707.04873, with the lists of the released configuration; Huang et al. 2017, "Densely
Connected Convolutional Networks", arXiv 1608.06993 (DenseNet-BC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from archsmith.core.errors import UserError
from archsmith.families.plain_space import apply_edit_, check_widths, matched
from archsmith.space import Architecture, AtMost, Count, Ordinal, ProductSpace, Repeat, Value
from archsmith.space.growing import Edit, Layer, edit_numbers, next_width
from archsmith.space.values import digest_of

GROWTHS = tuple(range(4, 49, 2))
"""Growth rates of the released configuration."""

STEM_RATIO = 2
"""Filters of the stem for each unit of mean growth."""


class Dense(NamedTuple):
    """Widths of a DenseNet: of the stem, of each miniblock by block, of the transitions."""

    stem: int
    growths: tuple[tuple[int, ...], ...]
    transitions: tuple[int, ...]


class DenseSpace(ProductSpace):
    """Strings of growth rates in dense blocks.

    Args:
        growths: Growth rates, ascending.
        blocks: Dense blocks.
        depth: Most miniblocks of a block; the second decision of a deepening has as many options.
        reduction: Part of a block's output that its transition keeps, rounded down.
        longest: Most tokens of a string, transitions included.

    Decisions: ``stem``, ``dense<b>/count``, ``dense<b>/<i>/growth``. It is a ``GrowingSpace`` with the further edits
    ``("stem", width)`` and ``("transition", block, width)``.

    Raises:
        UserError: A list that is empty or not ascending, or another number out of its range.
    """

    def __init__(
        self,
        *,
        growths: Sequence[int] = GROWTHS,
        blocks: int = 3,
        depth: int = 20,
        reduction: float = 0.5,
        longest: int = 50,
    ) -> None:
        check_widths("dense.growths", growths)
        if blocks < 1 or depth < 1 or longest < 2 * blocks - 1:
            given = {"blocks": blocks, "depth": depth, "longest": longest}
            raise UserError("dense", given, allowed="blocks and depth from 1, and longest from 2 * blocks - 1")
        if not 0 < reduction <= 1:
            raise UserError("dense.reduction", reduction, allowed="a number above 0, at most 1")
        self.growths, self.reduction = tuple(growths), float(reduction)
        self.blocks, self.depth, self.longest = blocks, depth, longest
        self.heads: tuple[int, ...] = (blocks, depth)
        self.vocabulary = (*(f"g{growth}" for growth in self.growths), "t")
        elements: dict[str, Any] = {"stem": Count(STEM_RATIO * growths[0], STEM_RATIO * growths[-1])}
        names = [f"dense{block}" for block in range(blocks)]
        elements |= {name: Repeat(Count(1, depth), {"growth": Ordinal(self.growths)}) for name in names}
        fits = blocks * depth + blocks - 1 <= longest
        limit = [] if fits else [AtMost([f"{name}/count" for name in names], longest - blocks + 1)]
        settings = self.settings()
        super().__init__(
            "dense" if settings == DEFAULTS else f"dense-{digest_of(settings)[:8]}", elements, constraints=limit
        )

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain JSON."""
        numbers = {name: getattr(self, name) for name in ("blocks", "depth", "reduction", "longest")}
        return {"growths": list(self.growths), **numbers}

    def layers(self, architecture: Mapping[str, Value]) -> list[list[Layer]]:
        """Return the miniblocks of each block; the width of one is its growth."""
        return [
            [
                Layer(_int(architecture[f"dense{block}/{i}/growth"]))
                for i in range(_int(architecture[f"dense{block}/count"]))
            ]
            for block in range(self.blocks)
        ]

    def dense(self, architecture: Mapping[str, Value]) -> Dense:
        """Return all widths of an architecture."""
        growths = tuple(tuple(layer.width for layer in rows) for rows in self.layers(architecture))
        stem = _int(architecture["stem"])
        transitions: list[int] = []
        for block in range(self.blocks - 1):
            entering = transitions[-1] if transitions else stem
            transitions.append(int((entering + sum(growths[block])) * self.reduction))
        return Dense(stem, growths, tuple(transitions))

    def of_growths(self, growths: Sequence[Sequence[int]], *, stem: int | None = None) -> Architecture:
        """Return the architecture of growth rates by block.

        Args:
            growths: One list for each block.
            stem: Filters of the stem; by default those that keep the ratio.

        Raises:
            UserError: It is not in the space.
        """
        return self.validate(self._decisions(growths, ratio_stem(growths) if stem is None else stem))

    def _decisions(self, growths: Sequence[Sequence[int]], stem: int) -> dict[str, Value]:
        decisions: dict[str, Value] = {"stem": stem}
        for block, rows in enumerate(growths):
            decisions[f"dense{block}/count"] = len(rows)
            decisions |= {f"dense{block}/{i}/growth": growth for i, growth in enumerate(rows)}
        return decisions

    def uniform(self, growth: int, depth: int) -> Architecture:
        """Return the DenseNet-BC of one growth rate and a published depth: ``(depth - 4) / (2 * blocks)`` miniblocks.

        Raises:
            UserError: A depth that none has, or something outside the space.
        """
        miniblocks, rest = divmod(depth - self.blocks - 1, 2 * self.blocks)
        if rest or miniblocks < 1:
            raise UserError("depth", depth, allowed=f"{self.blocks + 1} + {2 * self.blocks} n for n from 1")
        return self.of_growths([[growth] * miniblocks] * self.blocks)

    def start(self) -> Architecture:
        """Return the start network: one miniblock of the smallest growth in each block."""
        return self.of_growths([[self.growths[0]]] * self.blocks)

    def tokens(self, architecture: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the string of an architecture."""
        words: list[str] = []
        for block, rows in enumerate(self.layers(architecture)):
            words += [*(["t"] if block else []), *(f"g{layer.width}" for layer in rows)]
        return tuple(words)

    def widenings(
        self, architecture: Mapping[str, Value], widths: Mapping[str, Sequence[int]] | None = None
    ) -> list[Edit | None]:
        """Return for each token the edit to the next larger growth, None for transitions; see ``GrowingSpace``.

        Args:
            architecture: What grows.
            widths: A list "growths" in place of the space's own.
        """
        growths = (widths or {}).get("growths", self.growths)
        edits: list[Edit | None] = []
        for block, rows in enumerate(self.layers(architecture)):
            if block:
                edits.append(None)
            for i, layer in enumerate(rows):
                wider = next_width(layer.width, growths)
                edits.append(None if wider is None else ("widen", block, i, wider))
        return edits

    def deepening_mask(self, architecture: Mapping[str, Value], chosen: Sequence[int]) -> list[bool] | None:
        """Return the options of the next decision: the block, the miniblock in it."""
        depths = [_int(architecture[f"dense{block}/count"]) for block in range(self.blocks)]
        if len(chosen) == 0:
            room = sum(depths) + self.blocks - 1 < self.longest
            return [room and depth < self.depth for depth in depths]
        return [i < depths[chosen[0]] for i in range(self.depth)]

    def deepening(self, architecture: Mapping[str, Value], chosen: Sequence[int]) -> Edit:
        """Return the edit that inserts a copy of the chosen miniblock behind it."""
        return ("deepen", *chosen)

    def settling(self, architecture: Mapping[str, Value]) -> list[Edit]:
        """Return the edits that keep the ratio of the stem, and of transitions that get more; nothing ever shrinks.

        ``architecture`` has the stem of the network before it grew.
        """
        before = self.dense(architecture)
        stem = max(before.stem, ratio_stem(before.growths))
        after = self.dense({**architecture, "stem": stem})
        edits: list[Edit] = [("stem", stem)] if stem > before.stem else []
        return edits + [("transition", block, width) for block, width in enumerate(after.transitions)]

    def edited(self, architecture: Mapping[str, Value], edits: Sequence[Edit]) -> dict[str, Value]:
        """Return the decisions after edits without asking whether they are in the space.

        Transitions follow from the rest, whether an edit names them or not.

        Raises:
            UserError: An edit that is none, or a miniblock that does not exist or would shrink.
        """
        layers, stem = self.layers(architecture), _int(architecture["stem"])
        for edit in edits:
            if edit[0] == "stem" and len(edit) == 2:
                (wider,) = edit_numbers(edit)
                if wider < stem:
                    raise UserError("edit", edit, allowed=f"a width of at least {stem}, which the stem has")
                stem = wider
            elif edit[0] != "transition":
                apply_edit_(layers, edit)
        return self._decisions([[layer.width for layer in rows] for rows in layers], stem)

    def grown(self, architecture: Mapping[str, Value], edits: Sequence[Edit]) -> Architecture:
        """Return the architecture after edits, as ``edited``.

        Raises:
            UserError: The same, or a width outside the space.
        """
        return self.validate(self.edited(architecture, edits))

    def match(self, parent: Mapping[str, Value], child: Mapping[str, Value]) -> tuple[Edit, ...] | None:
        """Return edits that lead from one architecture to another, None when growing cannot."""
        before, after = self.dense(parent), self.dense(child)
        edits = matched(self.layers(parent), self.layers(child))
        if edits is None or after.stem < before.stem:
            return None
        stem: tuple[Edit, ...] = (("stem", after.stem),) if after.stem > before.stem else ()
        return edits + stem + tuple(("transition", block, width) for block, width in enumerate(after.transitions))


DEFAULTS: dict[str, Any] = {"growths": list(GROWTHS), "blocks": 3, "depth": 20, "reduction": 0.5, "longest": 50}
"""Settings of the published space."""


def ratio_stem(growths: Sequence[Sequence[int]]) -> int:
    """Return the filters of a stem that keeps its ratio: ``int(2 * mean growth)`` over all miniblocks."""
    every = [growth for rows in growths for growth in rows]
    return STEM_RATIO * sum(every) // len(every)


def _int(value: Value) -> int:
    assert isinstance(value, int)
    return value

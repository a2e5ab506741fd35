"""The NASNet space: two cells of five two-input blocks each, without the networks and without torch.

A point is 50 decisions in the order in which the published controller makes them: for the normal cell, then for the
reduction cell, for each block first state, second state, first operation, second operation, combiner.

Source: Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition", arXiv 1707.07012, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, ProductSpace, Value

NASNET_OPERATIONS = (
    "identity",
    "conv_1x3_3x1",
    "conv_1x7_7x1",
    "dilated_conv_3x3",
    "avg_pool_3x3",
    "max_pool_3x3",
    "max_pool_5x5",
    "max_pool_7x7",
    "conv_1x1",
    "conv_3x3",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
)
"""The 13 operations, in the order of the paper's list."""

COMBINERS = ("add", "concat")

CELLS = ("normal", "reduction")

BLOCKS = 5
"""Blocks of a published cell."""

FIELDS = ("first", "second", "first_op", "second_op", "combiner")
"""Decisions of a block, in the order of the controller."""


class Block(NamedTuple):
    """Two states, an operation for each, and how the two results are combined.

    State 0 is h0, the previous layer; 1 is h1, the one before it; 2 + i is the result of block i.
    """

    first: int
    second: int
    first_op: str
    second_op: str
    combiner: str = "add"


@dataclass(frozen=True)
class Genotype:
    """The blocks of both cells, each in order."""

    normal: tuple[Block, ...]
    reduction: tuple[Block, ...]


class NasnetSpace(ProductSpace):
    """A product space with the canonical form of cell pairs; made by ``nasnet_space``."""

    def to_json(self) -> dict[str, Any]:
        """Return the space as a JSON object, for ``ProductSpace.from_json``.

        JSON holds no functions, so what is restored has the same architectures and digests, and as ``network_digest``
        of a new architecture its digest. Stored architectures keep the one that they had here.
        """
        return ProductSpace(self.name, self.root.elements).to_json()


def nasnet_space(blocks: int = BLOCKS) -> NasnetSpace:
    """Return the space of cell pairs; dimension ``<cell>/<block>/<field>``, fields as in ``FIELDS``.

    Args:
        blocks: B, blocks of each cell. The paper's 5 give ``2,286,906,949,584,691,200 ** 2`` ordered choices.

    ``network_digest`` is the same for cell pairs that give the same network: the two sides of an addition may be
    exchanged, and blocks may stand in any order that defines each state before its use. (The order of a concatenation
    is only the order of channels that the next 1x1 convolution mixes; inside a cell it counts, because channels of a
    concatenated state can be added to others.)

    Raises:
        UserError: ``blocks`` is not a positive integer.
    """
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise UserError("blocks", blocks, allowed="an integer from 1")
    elements: dict[str, Categorical] = {}
    for cell in CELLS:
        for block in range(blocks):
            states = tuple(range(block + 2))
            options: tuple[tuple[Value, ...], ...] = (states, states, NASNET_OPERATIONS, NASNET_OPERATIONS, COMBINERS)
            groups = ("state", "state", "operation", "operation", "combiner")
            for field, values, group in zip(FIELDS, options, groups, strict=True):
                elements[f"{cell}/{block}/{field}"] = Categorical(values, group=group)
    return NasnetSpace("nasnet" if blocks == BLOCKS else f"nasnet-{blocks}", elements, canonical=_canonical)


def genotype_of(decisions: Mapping[str, Any]) -> Genotype:
    """Return the cells of an architecture (or of a plain mapping of its decisions)."""
    cells: dict[str, tuple[Block, ...]] = {}
    for cell in CELLS:
        blocks = []
        for index in count():
            if f"{cell}/{index}/first" not in decisions:
                break
            blocks.append(Block(*(decisions[f"{cell}/{index}/{field}"] for field in FIELDS)))
        cells[cell] = tuple(blocks)
    return Genotype(**cells)


def architecture_of(genotype: Genotype) -> Architecture:
    """Return the genotype as a point of its space.

    Raises:
        UserError: The cells have different numbers of blocks, or a block is none of the space.
    """
    if len(genotype.normal) != len(genotype.reduction):
        sizes = (len(genotype.normal), len(genotype.reduction))
        raise UserError("genotype", sizes, allowed="as many blocks in the normal cell as in the reduction cell")
    decisions: dict[str, Value] = {}
    for cell, blocks in (("normal", genotype.normal), ("reduction", genotype.reduction)):
        for index, block in enumerate(blocks):
            decisions.update({f"{cell}/{index}/{field}": getattr(block, field) for field in FIELDS})
    return nasnet_space(len(genotype.normal)).validate(decisions)


def unused_states(blocks: Sequence[Block]) -> tuple[int, ...]:
    """Return the states that no block consumes, ascending: what a cell concatenates as its output."""
    used = {state for block in blocks for state in (block.first, block.second)}
    return tuple(state for state in range(len(blocks) + 2) if state not in used)


NASNET_A = Genotype(
    normal=(
        Block(0, 1, "sep_conv_5x5", "sep_conv_3x3"),
        Block(1, 1, "sep_conv_5x5", "sep_conv_3x3"),
        Block(0, 1, "avg_pool_3x3", "identity"),
        Block(1, 1, "avg_pool_3x3", "avg_pool_3x3"),
        Block(0, 0, "sep_conv_3x3", "identity"),
    ),
    reduction=(
        Block(0, 1, "sep_conv_5x5", "sep_conv_7x7"),
        Block(0, 1, "max_pool_3x3", "sep_conv_7x7"),
        Block(0, 1, "avg_pool_3x3", "sep_conv_5x5"),
        Block(3, 2, "identity", "avg_pool_3x3"),
        Block(2, 0, "sep_conv_3x3", "max_pool_3x3"),
    ),
)
"""The published pair of cells."""

NASNET_A_OUTPUTS = {"normal": (1, 2, 3, 4, 5, 6), "reduction": (3, 4, 5, 6)}
"""States that NASNet-A's cells concatenate as published.

Each list has one state that blocks do consume, h1 and the second block; ``unused_states`` gives the others. The
published networks (their parameters, and 24 F filters at the end) need the lists as they are here.
"""


def nasnet_a() -> Architecture:
    """Return NASNet-A as a point of ``nasnet_space()``."""
    return architecture_of(NASNET_A)


def _canonical(architecture: Architecture) -> list[list[list[Any]]]:
    """Return, for each cell, its blocks in the least of all orders that define before use, additions sorted."""
    genotype = genotype_of(architecture)
    return [[list(row) for row in _least_order(cell)] for cell in (genotype.normal, genotype.reduction)]


def _least_order(blocks: Sequence[Block]) -> tuple[tuple[Any, ...], ...]:
    """Return the lexicographically least rows over all orders of ``blocks`` with states renumbered accordingly.

    The least row that can stand next is always part of the answer; only ties branch.
    """
    partial: list[tuple[tuple[tuple[Any, ...], ...], dict[int, int]]] = [((), {0: 0, 1: 1})]
    for _ in blocks:
        grown = []
        for rows, names in partial:
            for index, block in enumerate(blocks):
                if index + 2 not in names and block.first in names and block.second in names:
                    grown.append(((*rows, _row(block, names)), {**names, index + 2: len(names)}))
        least = min(rows for rows, _ in grown)
        partial = [(rows, names) for rows, names in grown if rows == least]
    return partial[0][0]


def _row(block: Block, names: Mapping[int, int]) -> tuple[Any, ...]:
    sides = [(names[block.first], block.first_op), (names[block.second], block.second_op)]
    if block.combiner == "add":
        sides.sort()
    (first, first_op), (second, second_op) = sides
    return first, second, first_op, second_op, block.combiner

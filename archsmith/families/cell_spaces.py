"""The NAS-Bench-201 space without the networks: cells, strings, canonical forms and exact counts, free of torch.

Nodes 0 to 3, one operation on each of the 6 edges ``i -> j`` with ``i < j``, and ``x_j = sum_i op_ij(x_i)``: 5^6 =
15,625 cells. Which of them are *the same network* depends on what one looks at; the published counts:

===========================  =======  ==========================================================================
form                         classes  two cells agree when
===========================  =======  ==========================================================================
``structure_string`` plain    15,625  they are written alike
... ``zero=False``            12,751  they agree after writing a skipped node's string in place of the skip
``structure_string``           6,466  ... and an edge that is ``none``, or starts at a node written "#", counts as zero
``functional_form``            4,930  ... and zeros and skips are propagated to the end: sums of zeros are zero, and a
                                      sum that is skipped into a sum joins it
===========================  =======  ==========================================================================

``network_digest`` uses the 6,466 (the number every paper quotes). It is syntactic and a little too cautious: a node
whose terms are all zero reads "#+#", which is not "#". In the functional form 341 cells have an output that does not
depend on the input. The benchmark trained cells of equal form separately, so their recorded accuracies differ.

Source: NAS-Bench-201, arXiv 2001.00326; NATS-Bench, arXiv 2009.00437 (its topology space).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeAlias

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, ProductSpace, Value

NB201_OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""Operations of an edge, in the order of the table's codes 0 to 4."""

NB201_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""Edges (source, target) of the cell, in the order of the table's columns."""

NB201_PATHS = tuple(f"edge/{source}-{target}" for source, target in NB201_EDGES)
"""Decision paths of the edges, in the same order."""

_STRING = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"
_PATTERN = re.compile(re.escape(_STRING).replace(r"\{\}", "([a-z0-9_]+)"))

FunctionalForm: TypeAlias = "tuple[tuple[str, FunctionalForm, int], ...]"


def nas_bench_201_space() -> ProductSpace:
    """Return the 15,625 cells: dimension ``edge/<source>-<target>`` chooses an operation.

    ``network_digest`` groups them into the 6,466 classes of ``structure_string``.
    """
    edges = {path: Categorical(NB201_OPERATIONS, group="edge") for path in NB201_PATHS}
    return ProductSpace("nas-bench-201", edges, canonical=structure_string)


def cell_string(cell: Mapping[str, Value]) -> str:
    """Return ``|op~0|+|op~0|op~1|+|op~0|op~1|op~2|``: a group per node 1, 2, 3; "op~i" comes from node i."""
    return _STRING.format(*(cell[path] for path in NB201_PATHS))


def cell_from_string(text: str) -> Architecture:
    """Return the cell that ``cell_string`` writes so.

    Raises:
        UserError: Not such a string, or an operation that the space does not have.
    """
    found = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise UserError("cell", text, allowed="a text like '|op~0|+|op~0|op~1|+|op~0|op~1|op~2|'")
    return nas_bench_201_space().validate(dict(zip(NB201_PATHS, found.groups(), strict=True)))


def structure_string(cell: Mapping[str, Value], *, zero: bool = True, skip: bool = True) -> str:
    """Return the benchmark's structure string of the output node: equal strings, equal networks.

    A node is the sorted sum of its terms, node 0 is "0". A term is "(source)@operation"; with ``skip`` a skipped source
    stands for itself, with ``zero`` an edge that is ``none`` or starts at "#" is "#".

    Args:
        cell: Operation per path.
        zero: Whether zeros are recognised; ``none`` is an ordinary operation otherwise.
        skip: Whether skips are recognised.
    """
    nodes = ["0"]
    for target in (1, 2, 3):
        terms = []
        for source in range(target):
            operation, inner = cell[f"edge/{source}-{target}"], nodes[source]
            if zero and (operation == "none" or inner == "#"):
                terms.append("#")
            elif skip and operation == "skip_connect":
                terms.append(inner)
            else:
                terms.append(f"({inner})@{operation}")
        nodes.append("+".join(sorted(terms)))
    return nodes[3]


def functional_form(cell: Mapping[str, Value]) -> FunctionalForm:
    """Return the output as a sorted sum of (operation, operand, how often) with zeros and skips resolved.

    The operand is again such a sum; the input itself is the operation "input" on nothing; the empty sum is zero. Cells
    with equal forms compute the same function when edges of one operation share weights and every normalisation has
    zero bias and running mean.
    """
    nodes: list[Counter[tuple[str, FunctionalForm]]] = [Counter({("input", ()): 1})]
    for target in (1, 2, 3):
        total: Counter[tuple[str, FunctionalForm]] = Counter()
        for source in range(target):
            operation, operand = str(cell[f"edge/{source}-{target}"]), nodes[source]
            if operation == "none" or not operand:
                continue
            total.update(operand if operation == "skip_connect" else {(operation, _sum_of(operand)): 1})
        nodes.append(total)
    return _sum_of(nodes[3])


def _sum_of(terms: Counter[tuple[str, FunctionalForm]]) -> FunctionalForm:
    return tuple(sorted((operation, operand, times) for (operation, operand), times in terms.items()))


def is_constant(cell: Mapping[str, Value]) -> bool:
    """Return whether the output does not depend on the input (341 cells): its functional form is the empty sum."""
    return not functional_form(cell)


def network_counts(
    cell: Mapping[str, Value], *, channels: int = 16, cells: int = 5, classes: int = 10, size: int = 32
) -> dict[str, int]:
    """Return exact parameters and multiply-accumulates of the benchmark's network around a cell, in closed form.

    The network: 3x3 stem to C, N cells, residual block to 2C, N cells, residual block to 4C, N cells, BN, pool, linear.

    Args:
        cell: Operation per path.
        channels: C, channels of the first stage.
        cells: N, cells per stage.
        classes: Outputs of the linear layer.
        size: Height and width of the input image, a multiple of 4.

    Returns:
        ``params``; ``macs`` of convolutions and the linear layer; ``macs_paper``, the benchmark's "FLOPs", which add
        one for each bias element of the linear layer (and likewise count neither BN nor pooling nor sums).
    """
    widths = (channels, 2 * channels, 4 * channels)
    areas = (size**2, (size // 2) ** 2, (size // 4) ** 2)
    params = 27 * channels + 2 * channels + 2 * widths[2] + (widths[2] + 1) * classes
    macs = 27 * channels * areas[0] + widths[2] * classes
    for (before, width), area in zip(pairwise(widths), areas[1:], strict=True):
        weights = 9 * before * width + 9 * width * width + before * width  # conv, conv, 1x1 on the pooled shortcut
        params += weights + 4 * width
        macs += weights * area
    for kernel in (1, 3):
        edges = cells * sum(cell[path] == f"nor_conv_{kernel}x{kernel}" for path in NB201_PATHS)
        params += edges * sum(kernel**2 * width**2 + 2 * width for width in widths)
        macs += edges * sum(kernel**2 * width**2 * area for width, area in zip(widths, areas, strict=True))
    return {"params": params, "macs": macs, "macs_paper": macs + classes}

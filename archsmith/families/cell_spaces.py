"""Spaces of cell-based families, without the networks: what tables and strategies need, free of torch.

Source: NAS-Bench-201, arXiv 2001.00326.
"""

from __future__ import annotations

from archsmith.space import Categorical, ProductSpace

NB201_OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""Operations of an edge, in the order of the table's codes 0 to 4."""

NB201_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""Edges (source, target) of the cell, in the order of the table's columns."""


def nas_bench_201_space() -> ProductSpace:
    """Return the 15,625 cells: dimension ``edge/<source>-<target>`` chooses an operation."""
    edges = {f"edge/{source}-{target}": Categorical(NB201_OPERATIONS, group="edge") for source, target in NB201_EDGES}
    return ProductSpace("nas-bench-201", edges)

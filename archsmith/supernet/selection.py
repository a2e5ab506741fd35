"""From mixing weights to an architecture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from archsmith.core.errors import UserError

Chosen = tuple[tuple[str, int], ...]
"""(operation, source) of the kept edges, node by node, the stronger of a node first."""


def magnitude(
    strength_EO: Tensor,
    options: Sequence[Sequence[str]],
    edges: Sequence[tuple[int, int]],
    *,
    per_node: int = 2,
    never: Sequence[str] = ("none",),
) -> Chosen:
    """Return the strongest edges into each node, each with its strongest operation.

    An edge is as strong as its strongest allowed operation. Of equal edges the one with the lower source stands first,
    of equal operations the earlier one.

    Args:
        strength_EO: Strength of every operation of every edge: mixing weights, or these times edge weights.
        options: Operations of each edge.
        edges: (source, target) of each edge; the edges of one target stand together, sources ascending.
        per_node: Edges to keep for each target.
        never: Operations that are no choice, however strong.

    Raises:
        UserError: NaN among the strengths, or an edge whose operations are all excluded.

    Source: DARTS, arXiv 1806.09055, section 2.4.
    """
    _require_numbers(strength_EO)
    best: dict[int, list[tuple[float, str, int]]] = {}
    for row, names, (source, target) in zip(strength_EO.tolist(), options, edges, strict=True):
        allowed = [(value, name) for value, name in zip(row, names, strict=False) if name not in never]
        if not allowed:
            raise UserError("options", tuple(names), allowed=f"an operation other than {', '.join(never)}")
        value, name = max(allowed, key=lambda entry: entry[0])
        best.setdefault(target, []).append((value, name, source))
    chosen: list[tuple[str, int]] = []
    for target in sorted(best):
        ranked = sorted(best[target], key=lambda entry: -entry[0])
        chosen += [(name, source) for _, name, source in ranked[:per_node]]
    return tuple(chosen)


def strongest(strength_EO: Tensor, options: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the strongest operation of every edge; of equal ones the earlier.

    Args:
        strength_EO: Strength of every operation of every edge.
        options: Operations of each edge.

    Raises:
        UserError: NaN among the strengths.
    """
    _require_numbers(strength_EO)
    return tuple(
        max(zip(row, names, strict=False), key=lambda entry: entry[0])[1]
        for row, names in zip(strength_EO.tolist(), options, strict=True)
    )


def _require_numbers(strength_EO: Tensor) -> None:
    if bool(strength_EO.isnan().any()):
        raise UserError("strength", "NaN", allowed="numbers", hint="The search diverged; lower its learning rates.")

"""Pooling and resampling: channels pass, spatial positions stay."""

from __future__ import annotations

from torch import fx

from archsmith.atoms.propagate import Axes, Propagation, shape, values_of
from archsmith.atoms.rules.table import rule

BY_RANK = {
    f"{name}{n}d": n
    for n in (1, 2, 3)
    for name in ("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "max_pool", "adaptive_max_pool", "lp_pool")
}
WITH_POSITIONS = {f"max_pool{n}d_with_indices": n for n in (1, 2, 3)}
RESAMPLING = {
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
    "_upsample_nearest_exact3d": 3,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
    "grid_sampler": 2,
    "grid_sampler_2d": 2,
}
ALL = {**BY_RANK, **WITH_POSITIONS, **RESAMPLING}


@rule(*ALL)
def spatial(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Hand on all axes before the spatial ones; pin labels on the spatial ones."""
    x = node.all_input_nodes[0]
    name = str(node.target).split(".")[1]
    first = len(shape(x)) - ALL[name]
    for axis, labels in p.of(x).items():
        if axis >= first:
            p.pin(labels, "is a spatial position")
    for other in node.all_input_nodes[1:]:
        for labels in p.of(other).values():
            p.pin(labels, "is used as positions")
    found = {axis: labels for axis, labels in p.of(x).items() if axis < first}
    several = len(values_of(node))
    return [dict(found) for _ in range(several)] if several > 1 else found

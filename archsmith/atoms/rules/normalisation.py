"""Normalisations: their statistics are reductions, their scales meet the channels."""

from __future__ import annotations

import numpy as np
from torch import fx

from archsmith.atoms.propagate import Axes, Propagation, shape
from archsmith.atoms.rules.table import rule


@rule("batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Let the channels meet scale, shift, running mean and running variance: every channel is on its own."""
    given = p.arguments(node)
    x = given["input"]
    channels = p.on(x, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = given.get(name)
        if isinstance(tensor, fx.Node) and shape(tensor)[0] > 1:
            p.meet(channels, p.on(tensor, 0))
    several = isinstance(node.meta.get("val"), list | tuple)
    found = dict(p.of(x))
    return [found, {}, {}] if several else found


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Let the last axes meet scale and shift; their statistics change with every removal."""
    given = p.arguments(node)
    x = given["input"]
    rank, many = len(shape(x)), len(given["normalized_shape"])
    what = "rms_norm" if "rms" in str(node.target) else "layer_norm"
    for axis in range(rank - many, rank):
        labels = p.on(x, axis)
        p.change(labels, what)
        p.expect("normalized_shape", labels, axis - rank + many)
        for name in ("weight", "bias"):
            tensor = given.get(name)
            if isinstance(tensor, fx.Node) and shape(tensor)[axis - rank + many] > 1:
                p.meet(labels, p.on(tensor, axis - rank + many))
    several = isinstance(node.meta.get("val"), list | tuple)
    found = dict(p.of(x))
    return [found, {}, {}] if several else found


@rule("group_norm", "native_group_norm")
def group_norm(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Factor the channels into (group, column): whole groups or whole columns go, the latter change the statistics."""
    given = p.arguments(node)
    x = given["input"]
    groups = int(given["num_groups"] if "num_groups" in given else given["group"])
    channels = p.on(x, 1)
    for name in ("weight", "bias"):
        tensor = given.get(name)
        if isinstance(tensor, fx.Node) and shape(tensor)[0] > 1:
            p.meet(channels, p.on(tensor, 0))
    if channels is not None:
        each = len(channels) // groups
        if groups == 1:
            p.change(channels, "group_norm")
        elif each > 1:
            rows, columns = p.labels.factor(channels.reshape(groups, each), p.cause("shares a group with a constant"))
            p.expect("num_groups", rows)
            p.change(columns, "group_norm")
        else:
            p.expect("num_groups", channels)
    several = isinstance(node.meta.get("val"), list | tuple)
    found = dict(p.of(x))
    return [found, {}, {}] if several else found


@rule("embedding")
def embedding(p: Propagation, node: fx.Node) -> Axes:
    """Rows are taken by number and stay; columns are handed on."""
    given = p.arguments(node)
    p.pin(p.on(given["weight"], 0), "rows are taken by their number")
    for labels in p.of(given["indices"]).values():
        p.pin(labels, "is used as positions")
    columns = p.on(given["weight"], 1)
    return {} if columns is None else {len(shape(node)) - 1: columns}


@rule("embedding_bag")
def embedding_bag(p: Propagation, node: fx.Node) -> list[Axes]:
    """As ``embedding``, for the sums."""
    given = p.arguments(node)
    p.pin(p.on(given["weight"], 0), "rows are taken by their number")
    columns = p.on(given["weight"], 1)
    first: Axes = {} if columns is None else {1: np.asarray(columns)}
    if given.get("mode") == 2:
        p.change(columns, "max")
    return [first, {}, {}, {}]


@rule("_weight_norm")
def weight_norm(p: Propagation, node: fx.Node) -> Axes:
    """Scale v by g / |v|: the norm of a slice sums over all other axes, to which zeros add nothing."""
    given = p.arguments(node)
    v, g = given["v"], given["g"]
    for axis, n in enumerate(shape(g)):
        if n > 1:
            p.meet(p.on(v, axis), p.on(g, axis))
    return dict(p.of(v))

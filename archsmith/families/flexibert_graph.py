"""A heterogeneous encoder as a graph: one vertex for each head, feed-forward layer and sum.

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from archsmith.families.flexibert_space import FlexiSpace, Layer, split_operator
from archsmith.space.labelled_graph import LabelledGraph

INPUT, OUTPUT, ADD_NORM = "input", "output", "add_norm"


def operator_label(operation: str, hidden: int, parameter: str | int) -> str:
    """Return the label of a head's vertex, "sa_h128_p-sdp" say."""
    return f"{operation}_h{hidden}_p-{parameter}"


def encoder_graph(layers: Sequence[Layer]) -> LabelledGraph:
    """Return the graph of an encoder.

    A layer is its heads side by side, a sum (fed by the layer's input too), the chain of its feed-forward layers, and
    another sum (fed by the first one too).
    """
    labels = [INPUT]
    edges: list[tuple[int, int]] = []
    last = 0
    for layer in layers:
        heads = range(len(labels), len(labels) + layer.heads)
        first = heads.stop
        labels += [operator_label(layer.operation, layer.hidden, layer.parameter)] * layer.heads + [ADD_NORM]
        edges += [(last, head) for head in heads] + [(head, first) for head in heads] + [(last, first)]
        chain = [first, *range(first + 1, first + 1 + len(layer.sizes) + 1)]
        labels += [*(f"f{size}" for size in layer.sizes), ADD_NORM]
        edges += [*itertools.pairwise(chain), (first, chain[-1])]
        last = chain[-1]
    return LabelledGraph((*labels, OUTPUT), (*edges, (last, len(labels))))


def label_order(space: FlexiSpace) -> dict[str, int]:
    """Return the published order of labels: neighbours in it are cheap to exchange.

    Input, output, sum; feed-forward sizes; linear transforms; self-attention; convolutions; one number is left out
    between two groups. Operators are ordered by hidden size, then DFT before DCT, SDP before WMA, small kernels first.
    """
    ranks = {"dft": 0, "dct": 1, "sdp": 0, "wma": 1}
    chosen = [split_operator(name) for name in space.operators]
    groups: list[Iterable[str]] = [[INPUT, OUTPUT, ADD_NORM], [f"f{size}" for size in space.sizes]]
    for operation in ("l", "sa", "c"):
        own = [p for o, p in chosen if o == operation]
        own.sort(key=lambda p: p if isinstance(p, int) else ranks[p])
        groups.append([operator_label(operation, hidden, p) for hidden in space.hidden for p in own])
    order: dict[str, int] = {}
    number = 0
    for group in groups:
        for label in group:
            order[label] = number
            number += 1
        number += 1
    return order


def plain_vector(layers: Sequence[Layer], space: FlexiSpace) -> np.ndarray:
    """Return the naive vector of an encoder: its depth, and five numbers for each layer, zeros for absent ones.

    Returns:
        Float64 of shape (1 + 5 * largest depth,): number of layers; then operation, hidden size, heads, sum of the
        feed-forward sizes, and parameter of every layer, names by their place among the operators.
    """
    operations = list(dict.fromkeys(split_operator(name)[0] for name in space.operators))
    found = np.zeros(1 + 5 * max(space.depths))
    found[0] = len(layers)
    for number, layer in enumerate(layers):
        parameter = space.operators.index(layer.operator)
        row = (operations.index(layer.operation), layer.hidden, layer.heads, sum(layer.sizes), parameter)
        found[1 + 5 * number : 6 + 5 * number] = row
    return found


def leading_overlap(first: Sequence[Layer], second: Sequence[Layer]) -> float:
    """Return which share of the longer encoder the two have in common from the front: what weights can pass on.

    Layers count until the first that differ in any choice ("biased overlap").
    """
    same = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        same += 1
    return same / max(len(first), len(second))

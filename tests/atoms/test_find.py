import itertools

import numpy as np
import pytest
import torch
from atoms_nets import NETS, build
from references.masked_graph import masked_outputs
from torch.utils._pytree import tree_leaves

from archsmith.atoms.find import FoundAtoms, find
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.replay import cut_copy


def doubles(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def gap(found: FoundAtoms, cut, inputs) -> float:
    """Largest relative difference between the cut model and the masked original, in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        twin = cut_copy(found.model, cut, values=True).double()
        with torch.no_grad():
            outputs = [o for o in tree_leaves(twin(*doubles(inputs))) if isinstance(o, torch.Tensor)]
        masked = masked_outputs(found, cut.removed, doubles(inputs))
    finally:
        torch.set_default_dtype(torch.float32)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, masked, strict=True))


def single_and_pairs(found: FoundAtoms, limit: int):
    """Every unit alone, then pairs of units, at most ``limit`` of all."""
    units = [(group.name, i) for group in found.groups for i in range(group.size)]
    removals = [{name: [i]} for name, i in units]
    for (a, i), (b, j) in itertools.combinations(units, 2):
        removals.append({a: [i, j]} if a == b else {a: [i], b: [j]})
    if len(removals) > limit:
        chosen = np.random.default_rng(0).choice(len(removals), limit, replace=False)
        removals = [removals[i] for i in sorted(chosen)]
    return removals


MAY_REFUSE = {"shuffle", "shuffle into conv", "shape-scaled attention", "shufflenet"}
"""Nets some of whose cuts are refused: pieces of equal width, two rows written as a number, a scale by the width."""


@pytest.mark.parametrize("name", NETS)
def test_cut_equals_masked_original(name):
    model, inputs = build(name)
    found = find(model, inputs)
    done = 0
    for removed in single_and_pairs(found, 8):
        try:
            cut = found.plan(removed)
        except CutRefused as refusal:
            assert name in MAY_REFUSE, refusal
            continue
        assert gap(found, cut, inputs) < 1e-5, (removed, cut.attributes)
        done += 1
    assert done

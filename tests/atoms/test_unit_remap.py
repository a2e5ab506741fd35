import numpy as np
import torch
from hand_units import along, attention, branches

from archsmith.atoms.declared import copy_without
from archsmith.atoms.fingerprint import shapes_of
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.plan import plan_cut
from archsmith.atoms.unit_remap import groups_after, kept_units, new_positions
from archsmith.atoms.units import Place, TensorCut, UnitGroup


def check_values(before, after, groups, moved, kept):
    """Every surviving unit owns the same numbers, wherever it lies now."""
    old, new = tensors_of(before), tensors_of(after)
    for group, present in zip(groups, moved, strict=True):
        for place, now in zip(group.places, present.places, strict=True):
            was, is_ = old[place.tensor].detach(), new[now.tensor].detach()
            for unit, (a, b) in enumerate(zip(place.index[kept[group.name]], now.index, strict=True)):
                left = was.flatten(place.axes[0], place.axes[-1]).movedim(place.axes[0], 0)
                right = is_.flatten(now.axes[0], now.axes[-1]).movedim(now.axes[0], 0)
                mine = set(right[b].flatten().tolist())
                assert mine <= set(left[a].flatten().tolist()), (group.name, place.tensor, unit)


def test_units_own_the_same_numbers_after_a_cut():
    for atoms, removed in (
        (branches(), {"c1": [0, 5], "c2": [3, 4, 11]}),
        (attention(), {"heads": [1, 3], "v": [0], "ffn": [2]}),
    ):
        cut = atoms.plan(removed)
        moved = groups_after(atoms.groups, cut, shapes_of(atoms.model))
        kept = kept_units(atoms.groups, cut)
        assert [g.size for g in moved] == [g.size - len(removed.get(g.name, [])) for g in atoms.groups]
        small = copy_without(atoms, {name: np.array(units) for name, units in removed.items()})
        check_values(atoms.model, small, atoms.groups, moved, kept)
        again = plan_cut(moved, {moved[0].name: [0]}, small)  # and can be cut again
        assert again.tensors


def test_jointly_cut_tensors():
    index = np.array([[(3 * (i // 4) + o) * 4 + i % 4 for o in range(3)] for i in range(8)])
    model = torch.nn.Conv2d(8, 6, 3, groups=2)
    groups = [
        UnitGroup("in", 8, (Place("weight", (0, 1), index),), balance=((0, 1, 2, 3), (4, 5, 6, 7))),
        UnitGroup("out", 6, (along("weight", 0, 6), along("bias", 0, 6)), balance=((0, 1, 2), (3, 4, 5))),
    ]
    cut = plan_cut(groups, {"in": [1, 6], "out": [0, 4]}, model)
    assert cut.tensors["weight"].joint is not None
    inputs, outputs = groups_after(groups, cut, shapes_of(model))
    assert inputs.balance == ((0, 1, 2), (3, 4, 5))
    assert outputs.balance == ((0, 1), (2, 3))
    assert inputs.places[0].index.tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    assert outputs.places[0].index.tolist() == [[0], [1], [2], [3]]


def test_rectangular_cuts_of_joint_places():
    moved = new_positions(
        Place("w", (0, 1), np.zeros((1, 1), dtype=int)), TensorCut({0: np.array([1]), 1: np.array([0, 2])}), (2, 3)
    )
    assert moved.tolist() == [-1, -1, -1, 0, -1, 1]

import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from archsmith.atoms.fingerprint import fingerprint, unwrap
from archsmith.atoms.plan import CutRefused, plan_cut
from archsmith.atoms.units import Place, UnitGroup
from archsmith.core.errors import UserError


def rows(tensor, axis, size, k=1, offset=0):
    return Place(tensor, (axis,), offset + np.arange(size * k).reshape(size, k))


def network():
    model = nn.ModuleDict({"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 6, 1), "g": nn.Conv2d(8, 6, 3, groups=2)})
    model["t"] = nn.Linear(8, 8)
    model["t2"] = nn.Linear(8, 8)
    model["t2"].weight = model["t"].weight
    return model


def channels(**settings):
    return UnitGroup("a", 8, (rows("a.weight", 0, 8), rows("a.bias", 0, 8), rows("b.weight", 1, 8)), **settings)


def grouped_inputs(**settings):
    """Input channels of ``g``: unit i is column i % 4 of the three rows of group i // 4."""
    index = np.array([[(3 * (i // 4) + o) * 4 + i % 4 for o in range(3)] for i in range(8)])
    return UnitGroup("in", 8, (Place("g.weight", (0, 1), index),), **settings)


def test_places_become_what_remains():
    cut = plan_cut([channels()], {"a": [5, 1, 5]}, network(), {"a.width": 6})
    kept = [0, 2, 3, 4, 6, 7]
    assert {name: {a: k.tolist() for a, k in t.axes.items()} for name, t in cut.tensors.items()} == {
        "a.weight": {0: kept},
        "a.bias": {0: kept},
        "b.weight": {1: kept},
    }
    assert cut.removed["a"].tolist() == [1, 5]
    assert cut.attributes == {"a.width": 6}
    assert cut.fingerprint == fingerprint(network())


def test_an_element_dies_with_the_first_of_its_owners():
    heads = UnitGroup("head", 2, (rows("t.weight", 0, 2, 4),))
    columns = UnitGroup("column", 4, (Place("t2.weight", (0,), np.array([[j, 4 + j] for j in range(4)])),))
    cut = plan_cut([heads, columns], {"head": [0], "column": [1, 2]}, network())
    assert list(cut.tensors) == ["t.weight"]  # tied: under its first name
    assert cut.tensors["t.weight"].axes[0].tolist() == [4, 7]
    assert plan_cut([heads, columns], {"head": [], "column": ()}, network()).tensors == {}


def test_inputs_of_a_grouped_convolution_are_cut_jointly():
    cut = plan_cut([grouped_inputs()], {"in": [0, 7]}, network())
    axes, kept = cut.tensors["g.weight"].joint
    assert axes == (0, 1) and not cut.tensors["g.weight"].axes
    assert kept.tolist() == [[4 * row + c for c in ((1, 2, 3) if row < 3 else (0, 1, 2))] for row in range(6)]
    same = plan_cut([grouped_inputs()], {"in": [2, 6]}, network()).tensors["g.weight"]  # a rectangle
    assert same.joint is None and {a: k.tolist() for a, k in same.axes.items()} == {1: [0, 1, 3]}
    outputs = UnitGroup("out", 2, (rows("g.weight", 0, 2, 3), rows("g.bias", 0, 2, 3)))
    whole = plan_cut([grouped_inputs(), outputs], {"in": [0, 1, 2, 3], "out": [0]}, network())
    assert {a: k.tolist() for a, k in whole.tensors["g.weight"].axes.items()} == {0: [3, 4, 5]}
    single = UnitGroup("single", 6, (rows("g.weight", 0, 6),))
    both = plan_cut([grouped_inputs(), single], {"in": [0, 7], "single": [1, 4]}, network()).tensors["g.weight"]
    assert both.joint[1].tolist() == [[1, 2, 3], [9, 10, 11], [12, 13, 14], [20, 21, 22]] and not both.axes


@pytest.mark.parametrize(
    ("group", "removed", "text"),
    [
        (channels(frozen="the user said so"), [0], "group 'a': it is frozen: the user said so"),
        (channels(minimum=4), range(5), "it would keep 3 of 8 units, at least 4 must stay"),
        (channels(minimum=0), range(8), "nothing of axis 0 of 'a.weight' (8, 3, 3, 3) would remain"),
        (channels(divisor=4), [0], "it would keep 7 of 8 units, not a multiple of 4"),
        (channels(balance=((0, 1, 2, 3), (4, 5, 6, 7))), [0, 1, 4], "its parts would keep 2, 3 units each"),
        (grouped_inputs(), [0], "rows of 'g.weight' (6, 4, 3, 3) would keep 3, 4 columns each"),
        (grouped_inputs(), [0, 1, 2, 3], "rows 0, 1, 2 of 'g.weight' would have no inputs left"),
        (grouped_inputs(minimum=0), range(8), "nothing of 'g.weight' (6, 4, 3, 3) would remain"),
    ],
)
def test_refusals_name_the_group_and_the_reason(group, removed, text):
    with pytest.raises(CutRefused, match="^" + re.escape(f"cut refused at group '{group.name}': ")) as caught:
        plan_cut([group], {group.name: removed}, network())
    assert text.removeprefix("group 'a': ") in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.group, again.reason) == (str(caught.value), group.name, caught.value.reason)


def test_a_divisor_that_the_size_does_not_have_is_relaxed():
    assert plan_cut([channels(divisor=3)], {"a": [0]}, network()).tensors
    assert plan_cut([channels(divisor=4, balance=((0, 1), (2, 3)))], {"a": [0, 1, 2, 3]}, network()).tensors


@pytest.mark.parametrize(
    ("group", "removed", "text"),
    [
        (channels(), {"b": [0]}, r"removed: got 'b'; allowed: names of groups: a"),
        (channels(), {"a": [8]}, r"removed\['a'\]: got 8; allowed: positions 0 to 7"),
        (channels(), {"a": [-1]}, r"removed\['a'\]: got -1; allowed: positions 0 to 7"),
        (
            UnitGroup("a", 8, (rows("c.weight", 0, 8),)),
            {"a": [0]},
            "group 'a': got 'c.weight'; allowed: qualified names",
        ),
        (UnitGroup("a", 8, (rows("a.bias", 1, 8),)), {"a": [0]}, r"got \(1,\); allowed: ascending axes of 'a.bias'"),
        (
            UnitGroup("a", 8, (rows("b.bias", 0, 8),)),
            {"a": [0]},
            r"positions up to 7 on axes \(0,\) of 'b.bias' \(6,\)",
        ),
        (UnitGroup("a", 8, (rows("a.bias", 0, 6),)), {"a": [0]}, r"an index of shape \(6, 1\) for 'a.bias'"),
    ],
)
def test_wrong_declarations_are_said(group, removed, text):
    with pytest.raises(UserError, match=text):
        plan_cut([group], removed, network())
    with pytest.raises(UserError, match=r"several named \['a'\]"):
        plan_cut([group, group], removed, network())


def test_the_fingerprint_sees_names_shapes_kinds_and_ties():
    model = network()
    seen = {fingerprint(model)}
    assert fingerprint(network().double()) in seen and fingerprint(torch.compile(network())) in seen
    model["t2"].weight = nn.Parameter(model["t"].weight.detach().clone())
    seen.add(fingerprint(model))
    model["a"].register_buffer("extra", torch.zeros(2))
    seen.add(fingerprint(model))
    model["a"].extra = model["a"].extra.long()
    seen.add(fingerprint(model))
    model["a"].register_buffer("cache", torch.zeros(2), persistent=False)
    assert fingerprint(model) in seen
    model["u"] = model.pop("b")
    seen.add(fingerprint(model))
    assert len(seen) == 5
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    assert fingerprint(wrapped) in seen and unwrap(nn.DataParallel(model)) is model

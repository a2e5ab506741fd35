"""Attributes of torch's own modules follow from their weights and from what was kept."""

import numpy as np
import pytest
import torch
from cut_samples import rows
from torch import nn

from archsmith.atoms.attributes import refresh_attributes
from archsmith.atoms.edits import Edits
from archsmith.atoms.plan import CutRefused, plan_cut
from archsmith.atoms.transaction import apply_
from archsmith.atoms.units import Cut, Place, TensorCut, UnitGroup


def cut(module, **kept):
    """Cut tensors of one module: for each name a mapping from axis to what stays."""
    cuts = {
        name.replace("__", "."): TensorCut({axis: np.array(index) for axis, index in axes.items()})
        for name, axes in kept.items()
    }
    return apply_(module, Cut({}, cuts)).attributes


def every(*left_out, of):
    return [i for i in range(of) if i not in left_out]


CASES = {
    "Linear": (
        lambda: nn.Linear(6, 4),
        {"weight": {0: [0, 2, 3], 1: [0, 5]}, "bias": {0: [0, 2, 3]}},
        {"in_features": 2, "out_features": 3},
        (2,),
    ),
    "Bilinear": (
        lambda: nn.Bilinear(3, 4, 5, bias=False),
        {"weight": {0: [0, 1], 1: [0], 2: [1, 2, 3]}},
        {"in1_features": 1, "in2_features": 3, "out_features": 2},
        None,
    ),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), {"weight": {1: [0, 3]}}, {"in_channels": 2}, (2, 5, 5)),
    "depthwise": (
        lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False),
        {"weight": {0: [0, 2, 3]}},
        {"groups": 3, "in_channels": 3, "out_channels": 3},
        (3, 5, 5),
    ),
    "depthwise with a multiplier": (
        lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False),
        {"weight": {0: [0, 1, 4, 5]}},
        {"groups": 2, "in_channels": 2, "out_channels": 4},
        (2, 5, 5),
    ),
    "whole groups": (
        lambda: nn.Conv1d(6, 9, 3, groups=3, bias=False),
        {"weight": {0: [0, 1, 2, 6, 7, 8]}},
        {"groups": 2, "in_channels": 4, "out_channels": 6},
        (4, 5),
    ),
    "a column of each group": (
        lambda: nn.Conv1d(6, 9, 3, groups=3, bias=False),
        {"weight": {0: [0, 1, 4, 5, 6, 8], 1: [1]}},
        {"in_channels": 3, "out_channels": 6},
        (3, 5),
    ),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False),
        {"weight": {0: [0, 2, 3, 4], 1: [1]}},
        {"in_channels": 4, "out_channels": 2},
        (4, 3, 3),
    ),
    "BatchNorm1d": (
        lambda: nn.BatchNorm1d(4, affine=False),
        {"running_mean": {0: [1, 2]}, "running_var": {0: [1, 2]}},
        {"num_features": 2},
        (2,),
    ),
    "GroupNorm, a group": (
        lambda: nn.GroupNorm(3, 6),
        {"weight": {0: [0, 1, 4, 5]}, "bias": {0: [0, 1, 4, 5]}},
        {"num_groups": 2, "num_channels": 4},
        (4, 5),
    ),
    "GroupNorm, columns": (
        lambda: nn.GroupNorm(3, 6),
        {"weight": {0: [0, 3, 4]}, "bias": {0: [0, 3, 4]}},
        {"num_channels": 3},
        (3, 5),
    ),
    "LayerNorm": (
        lambda: nn.LayerNorm((3, 4)),
        {"weight": {1: [0, 2, 3]}, "bias": {1: [0, 2, 3]}},
        {"normalized_shape": (3, 3)},
        (3, 3),
    ),
    "RMSNorm": (lambda: nn.RMSNorm(4), {"weight": {0: [1, 3]}}, {"normalized_shape": (2,)}, (2,)),
    "PReLU": (lambda: nn.PReLU(4), {"weight": {0: [1, 3]}}, {"num_parameters": 2}, (2, 3)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 4), {"weight": {1: [1, 3]}}, {"embedding_dim": 2}, None),
    "Embedding": (
        lambda: nn.Embedding(5, 4, padding_idx=3),
        {"weight": {0: [0, 2, 3]}},
        {"num_embeddings": 3, "padding_idx": 2},
        None,
    ),
    "LSTM": (
        lambda: nn.LSTM(3, 2, bidirectional=False),
        {
            "weight_ih_l0": {0: [0, 2, 4, 6], 1: [0, 2]},
            "weight_hh_l0": {0: [0, 2, 4, 6], 1: [0]},
            "bias_ih_l0": {0: [0, 2, 4, 6]},
            "bias_hh_l0": {0: [0, 2, 4, 6]},
        },
        {"hidden_size": 1, "input_size": 2},
        (4, 2),
    ),
    "LSTM with projection": (
        lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
        {"weight_hr_l0": {0: [1]}, "weight_hh_l0": {1: [1]}},
        {"proj_size": 1},
        (4, 3),
    ),
    "GRUCell": (
        lambda: nn.GRUCell(3, 2, bias=False),
        {"weight_ih": {0: [0, 2, 4]}, "weight_hh": {0: [0, 2, 4], 1: [0]}},
        {"hidden_size": 1},
        (3,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attributes_follow(name):
    make, kept, expected, shape = CASES[name]
    module = make()
    assert cut(module, **kept) == expected
    for attribute, value in expected.items():
        assert getattr(module, attribute) == value
    if shape is not None:
        module.eval()(torch.randn(2, *shape))  # and it runs


def test_a_ragged_grouped_convolution_keeps_its_groups():
    module = nn.Conv2d(6, 4, 1, groups=2, bias=False)
    index = np.array([[(2 * (i // 3) + o) * 3 + i % 3 for o in range(2)] for i in range(6)])
    group = UnitGroup("in", 6, (Place("weight", (0, 1), index),))
    before, x = module.weight.detach().clone(), torch.randn(2, 6, 3, 3)
    x[:, [0, 5]] = 0
    expected = module(x)
    done = apply_(module, plan_cut([group], {"in": [0, 5]}, module))
    assert done.attributes == {"in_channels": 4} and module.weight.shape == (4, 2, 1, 1)
    assert torch.equal(module.weight[0, :, 0, 0], before[0, [1, 2], 0, 0])
    torch.testing.assert_close(module(x[:, 1:5]), expected)


def test_multi_head_attention():
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(8, 4, batch_first=True), torch.randn(2, 5, 4)
    stay = [0, 1, 4, 5]  # two heads of two features, and as many features of the stream
    thirds = [8 * part + i for part in range(3) for i in stay]
    attributes = cut(
        module,
        in_proj_weight={0: thirds, 1: stay},
        in_proj_bias={0: thirds},
        out_proj__weight={0: stay, 1: stay},
        out_proj__bias={0: stay},
    )
    assert attributes["num_heads"] == 2 and attributes["embed_dim"] == 4 and "head_dim" not in attributes
    assert module(x, x, x)[0].shape == x.shape
    with pytest.raises(
        CutRefused, match=r"needs queries, keys and values as wide as its input: got \[2, 2, 2\] rows for 4"
    ):
        cut(module, in_proj_weight={0: [0, 1, 4, 5, 8, 9]}, in_proj_bias={0: [0, 1, 4, 5, 8, 9]})


@pytest.mark.parametrize(
    ("module", "kept", "text"),
    [
        (nn.Conv1d(6, 9, 1, groups=3), {"weight": {0: every(0, of=9)}}, "its groups would keep 2, 3, 3 members, they"),
        (nn.GroupNorm(3, 6), {"weight": {0: every(0, of=6)}}, "its groups would keep 1, 2, 2 members, they must stay"),
        (nn.Embedding(5, 4, padding_idx=3), {"weight": {0: every(3, of=5)}}, "its padding row 3 would go"),
        (
            nn.GRU(3, 4, num_layers=2),
            {"weight_hh_l1": {0: every(0, 4, 8, of=12), 1: [1, 2, 3]}},
            r"its layers and directions would have \[3, 4\] units, they must have equally many",
        ),
    ],
)
def test_what_makes_no_module_is_refused_and_taken_back(module, kept, text):
    before = {name: (p.data_ptr(), p.shape) for name, p in module.named_parameters()}
    with pytest.raises(CutRefused, match=text):
        cut(module, **kept)
    assert {name: (p.data_ptr(), p.shape) for name, p in module.named_parameters()} == before


def test_shared_tensors_refresh_all_their_modules():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    apply_(model, plan_cut([UnitGroup("g", 4, (rows("a.weight", 1, 4),))], {"g": [0]}, model))
    assert (model["a"].in_features, model["b"].in_features) == (3, 3)


def test_conv1d_of_transformers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    module = pytorch_utils.Conv1D(6, 4)
    assert cut(module, weight={0: [0, 1, 3], 1: [0, 5]}, bias={0: [0, 5]}) == {"nx": 3, "nf": 2}
    assert module(torch.randn(2, 3)).shape == (2, 2)


def test_nothing_changes_without_cuts():
    with Edits() as edits:
        for make, *_ in CASES.values():
            assert refresh_attributes(make(), {}, edits) == {}

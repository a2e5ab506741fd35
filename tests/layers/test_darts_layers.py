import pytest
import torch
from darts_recipe import cases, image, matches, weighted_
from torch import nn

from archsmith.layers.darts import (
    AuxiliaryClassifier,
    DartsCell,
    DartsNetwork,
    DenseLayers,
    FactorizedReduce,
    make_primitive,
    reduction_cells,
    relu_conv_bn,
)

EDGES = (("sep_conv_3x3", 0), ("skip_connect", 1), ("max_pool_3x3", 2), ("dil_conv_3x3", 0))


def cell(**changes):
    arguments = {
        "edges": EDGES,
        "concat": (2, 3),
        "before_channels": 6,
        "previous_channels": 8,
        "channels": 4,
        "reduction": False,
        "after_reduction": False,
        "affine": True,
        "pool_norm": False,
        "layers": DenseLayers(),
    }
    return DartsCell(**{**arguments, **changes})


@pytest.mark.parametrize("case", cases("prim:"), ids=lambda case: case["name"])
def test_primitives(case):
    given = case["input"]
    operation = make_primitive(given["primitive"], given["C"], given["stride"], given["affine"], DenseLayers())
    matches(weighted_(operation)(image(2, 4, 8, 8)), case["expected"])


def test_input_layers():
    (halved,), (kept,) = cases("factorized_reduce"), cases("relu_conv_bn")
    matches(weighted_(FactorizedReduce(4, 6, False, DenseLayers()))(image(2, 4, 8, 8)), halved["expected"])
    matches(weighted_(relu_conv_bn(6, 4, False, DenseLayers()))(image(2, 6, 8, 8)), kept["expected"])


def test_what_has_a_scale_and_what_has_a_norm():
    for name in ("sep_conv_3x3", "dil_conv_5x5", "conv_7x1_1x7", "sep_conv_7x7"):
        norms = [m for m in make_primitive(name, 4, 1, True, DenseLayers()).modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == (2 if name.startswith("sep") else 1)  # the dilated one is applied once
        assert all(norm.affine for norm in norms)
    pooled = make_primitive("avg_pool_3x3", 4, 2, True, DenseLayers(), pool_norm=True)
    assert [norm.affine for norm in pooled.modules() if isinstance(norm, nn.BatchNorm2d)] == [False]
    assert isinstance(make_primitive("avg_pool_3x3", 4, 2, True, DenseLayers()), nn.AvgPool2d)


def test_a_long_thin_convolution_strides_along_each_axis_once():
    wide, tall = make_primitive("conv_7x1_1x7", 2, 2, True, DenseLayers()).convs
    assert (wide.kernel_size, wide.stride) == ((1, 7), (1, 2))
    assert (tall.kernel_size, tall.stride) == ((7, 1), (2, 1))


def test_the_input_before_is_halved_after_a_reduction_only():
    y = torch.rand(2, 8, 8, 8)
    assert cell(after_reduction=True)(torch.rand(2, 6, 16, 16), y).shape == (2, 8, 8, 8)
    assert cell()(torch.rand(2, 6, 8, 8), y).shape == (2, 8, 8, 8)
    reduced = cell(reduction=True)
    assert reduced(torch.rand(2, 6, 8, 8), y).shape == (2, 8, 4, 4)
    assert isinstance(reduced.before.convs[0], nn.Conv2d)  # decided by the cell before, not by this one
    assert isinstance(reduced.operations[2], nn.MaxPool2d) and reduced.operations[2].stride == 1


def test_paths_are_dropped_by_sample_and_identities_never():
    torch.manual_seed(0)
    network = cell(edges=(("skip_connect", 0), ("max_pool_3x3", 1)), concat=(2,))
    network.drop_path = 0.5
    kept, x = [], torch.rand(64, 8, 8, 8)
    before = torch.rand(64, 6, 8, 8)
    with torch.no_grad():
        pooled = network.operations[1](network.previous(x))
        alone = network(before, x) - network.before(before)
    for sample, whole in zip(alone, pooled, strict=True):
        dropped = torch.allclose(sample, torch.zeros_like(sample), atol=1e-5)
        assert dropped or torch.allclose(sample, 2 * whole, atol=1e-5)
        kept.append(not dropped)
    assert 16 < sum(kept) < 48
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(before, x), network.before(before) + network.operations[1](network.previous(x)))


def test_reductions_stand_at_the_thirds():
    assert [reduction_cells(cells) for cells in (3, 4, 5, 8, 20)] == [(1, 2), (1, 2), (1, 3), (2, 5), (6, 13)]


def test_large_images_reach_the_first_cell_at_an_eighth():
    network = DartsNetwork(3, 5, 4, 3, EDGES, EDGES, (2, 3), (2, 3), stem="imagenet", auxiliary=True)
    seen = []
    network.cells[0].register_forward_hook(lambda _, given, __: seen.append([tuple(x.shape) for x in given]))
    logits, second = network.forward_with_auxiliary(torch.rand(2, 3, 224, 224))
    assert seen == [[(2, 4, 56, 56), (2, 4, 28, 28)]]
    assert logits.shape == second.shape == (2, 5)


def test_the_published_auxiliary_classifiers_differ_in_a_norm():
    assert isinstance(AuxiliaryClassifier(8, 5, 3, True).features[6], nn.BatchNorm2d)
    assert isinstance(AuxiliaryClassifier(8, 5, 2, False).features[6], nn.Identity)


def test_wrong_names_and_odd_widths_are_refused():
    with pytest.raises(ValueError, match="operation: got 'conv_9x9'"):
        make_primitive("conv_9x9", 4, 1, True, DenseLayers())
    with pytest.raises(ValueError, match="got 5; allowed: an even number"):
        FactorizedReduce(4, 5, True, DenseLayers())

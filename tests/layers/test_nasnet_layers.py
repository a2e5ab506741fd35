import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archsmith.families.nasnet_space import NASNET_A, NASNET_A_OUTPUTS, NASNET_OPERATIONS
from archsmith.layers.nasnet import (
    HalvedInput,
    NasnetCell,
    SameConv,
    SamePool,
    SeparableTwice,
    drop_path,
    make_operation,
    same_pads,
    scheduled_keep,
)

CASES = json.loads(Path(__file__).parents[1].joinpath("golden/nasnet.json").read_text())["cases"]


def cases(kind: str) -> list[dict]:
    return [case for case in CASES if case["name"].startswith(f"{kind}/")]


def fill_(module: nn.Module) -> None:
    """Set every weight to the closed form of the golden cases."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            count = each.weight.numel()
            fan_in = count // each.weight.shape[0]
            values = torch.sin(torch.arange(1, count + 1, dtype=torch.float64)) * math.sqrt(2 / fan_in)
            each.weight.data = values.view_as(each.weight)
        elif isinstance(each, nn.BatchNorm2d):
            i = torch.arange(each.num_features, dtype=torch.float64)
            each.weight.data, each.bias.data = 1 + 0.1 * torch.cos(i), 0.1 * torch.sin(i)
            each.running_mean, each.running_var = 0.05 * torch.sin(i + 1), 1 + 0.2 * torch.cos(i) ** 2


def wave(channels: int, size: int, shift: float) -> torch.Tensor:
    count = 2 * channels * size * size
    return torch.cos(0.05 * torch.arange(count, dtype=torch.float64) + shift).view(2, channels, size, size)


def published_cell(name: str, current: int, before: int, filters: int, **changed: object) -> NasnetCell:
    fields = {
        "previous_channels": current,
        "before_channels": before,
        "filters": filters,
        "blocks": getattr(NASNET_A, name),
        "outputs": NASNET_A_OUTPUTS[name],
        "stride": 2 if name == "reduction" else 1,
        "halve_before": False,
        "norm_eps": 1e-3,
        "norm_momentum": 0.1,
    }
    return NasnetCell(**{**fields, **changed})


@pytest.mark.parametrize("case", cases("cell_forward"), ids=lambda case: case["name"])
def test_both_cells_compute_the_published_function(case):
    given, expected = case["input"], case["expected"]
    cell = published_cell(given["cell"], given["c_cur"], given["c_prev"], given["filters"]).double().eval()
    fill_(cell)
    y = cell(wave(given["c_cur"], given["size"], 0), wave(given["c_prev"], given["size"], 1))
    assert list(y.shape) == expected["shape"]
    assert sum(p.numel() for p in cell.parameters()) == expected["params"]
    assert y.sum().item() == pytest.approx(expected["sum"], abs=1e-6)
    assert y.abs().sum().item() == pytest.approx(expected["abs_sum"], abs=1e-6)
    branches = [branch.sum().item() for branch in y.split(given["filters"], dim=1)]
    assert branches == pytest.approx(expected["per_branch_sum"], abs=1e-6)


@pytest.mark.parametrize("case", cases("scheduled_drop_path"), ids=lambda case: case["name"])
def test_the_drop_path_schedule_is_the_published_one(case):
    given = case["input"]
    keep = scheduled_keep(
        given["final_keep_prob"], given["cell_num"], given["total_cells"], given["step"] / given["total_steps"]
    )
    assert keep == pytest.approx(case["expected"], abs=1e-9)


def test_the_schedule_starts_at_one_and_ends_at_the_final_probability():
    assert {scheduled_keep(0.6, cell, 20, 0.0) for cell in range(20)} == {1.0}
    assert scheduled_keep(0.6, 19, 20, 1.0) == scheduled_keep(0.6, 19, 20, 3.0) == pytest.approx(0.6)
    by_cell = [scheduled_keep(0.6, cell, 20, 0.5) for cell in range(20)]
    assert by_cell == sorted(by_cell, reverse=True)


def test_a_dropped_path_keeps_its_expectation_sample_by_sample():
    torch.manual_seed(0)
    n, keep = 40_000, 0.7
    y = drop_path(torch.full((n, 2, 3), 3.0), keep)
    assert y.unique().tolist() == pytest.approx([0.0, 3.0 / keep])
    assert torch.equal(y.amax((1, 2)), y.amin((1, 2)))  # one mask for all of a sample
    error = 3.0 * math.sqrt((1 - keep) / keep / n)
    assert abs(y[:, 0, 0].mean().item() - 3.0) <= 4 * error


def test_keep_one_drops_nothing():
    x = torch.randn(50, 3)
    assert torch.equal(drop_path(x, 1.0), x)


def test_only_operations_are_dropped_and_only_in_training():
    torch.manual_seed(0)
    blocks = ((0, 0, "identity", "max_pool_3x3", "add"),)
    cell = published_cell("normal", 4, 4, 4, blocks=blocks, outputs=(2,)).double()
    cell.keep = 1e-9  # everything that may be dropped is
    previous = wave(4, 6, 0)
    identity = cell.current(previous)
    assert torch.equal(cell(previous, None), identity)
    cell.eval()
    h0 = cell.current(previous)
    assert torch.equal(cell(previous, None), h0 + F.max_pool2d(h0, 3, 1, 1))


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize(("kernel", "stride"), list(product((1, 3, 5, 7), (1, 2))))
def test_same_padding_gives_the_rounded_up_size(length, kernel, stride):
    before, after = same_pads(length, kernel, stride)
    assert (length + before + after - kernel) // stride + 1 == -(-length // stride)
    assert 0 <= after - before <= 1


@pytest.mark.parametrize("size", [(7, 7), (6, 6), (5, 8)])
@pytest.mark.parametrize(("kernel", "stride"), list(product((3, 5, 7), (1, 2))))
def test_poolings_equal_windows_cut_at_the_border(size, kernel, stride):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = (same_pads(length, kernel, stride)[0] for length in size)
    for kind, reduce in (("avg", torch.mean), ("max", torch.amax)):
        y = SamePool(kind, kernel, stride)(x)
        assert y.shape == (2, 3, -(-size[0] // stride), -(-size[1] // stride))
        for i, j in product(range(y.shape[2]), range(y.shape[3])):
            top, left = i * stride - rows, j * stride - columns
            window = x[:, :, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
            torch.testing.assert_close(y[:, :, i, j], reduce(window, dim=(2, 3)))


@pytest.mark.parametrize("size", [(7, 7), (6, 6), (5, 8)])
def test_convolutions_equal_those_of_the_padded_input(size):
    conv = SameConv(3, 4, (5, 5), (2, 2)).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    (top, bottom), (left, right) = (same_pads(length, 5, 2) for length in size)
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), conv.conv.weight, stride=2)
    torch.testing.assert_close(conv(x), expected)


def test_the_factorised_reduction_sees_even_pixels_and_shifted_ones():
    halved = HalvedInput(1, 2, 0.0, 0.1).double().eval()
    halved.even.weight.data.fill_(1.0)
    halved.shifted.weight.data.fill_(1.0)
    x = torch.arange(25.0, dtype=torch.float64).view(1, 1, 5, 5)
    y = halved(x)
    assert y[0, 0].tolist() == x[0, 0, ::2, ::2].tolist()
    assert y[0, 1].tolist() == [[6, 8, 0], [16, 18, 0], [0, 0, 0]]


def test_a_separable_convolution_is_applied_twice_without_anything_inside():
    sep = SeparableTwice(4, 6, 5, 2, 1e-3, 0.1)
    assert sum(p.numel() for p in sep.parameters()) == 4 * 25 + 4 * 6 + 12 + 6 * 25 + 36 + 12
    assert len([m for m in sep.modules() if isinstance(m, nn.BatchNorm2d)]) == 2


@pytest.mark.parametrize("name", NASNET_OPERATIONS)
@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 4), 2), ((3, 4), 1), ((3, 4), 2)])
@pytest.mark.parametrize("size", [(7, 7), (6, 9)])
def test_every_operation_has_the_asked_shape(name, channels, stride, size):
    operation = make_operation(name, *channels, stride, 1e-3, 0.1)
    y = operation(torch.randn(2, channels[0], *size))
    assert y.shape == (2, channels[1], -(-size[0] // stride), -(-size[1] // stride))


def test_operations_without_weights_have_none_where_the_shape_stays():
    for name in ("identity", "avg_pool_3x3", "max_pool_3x3", "max_pool_5x5", "max_pool_7x7"):
        assert not list(make_operation(name, 4, 4, 1, 1e-3, 0.1).parameters())
        assert list(make_operation(name, 3, 4, 1, 1e-3, 0.1).parameters())


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="operation: got 'conv_9x9'"):
        make_operation("conv_9x9", 4, 4, 1, 1e-3, 0.1)


def test_intermediate_states_are_never_strided():
    cell = published_cell("reduction", 6, 8, 4)
    for block, (first, second, *_) in enumerate(NASNET_A.reduction):
        for side, state in enumerate((first, second)):
            operation = cell.operations[2 * block + side]
            strides = {m.stride[0] for m in operation.modules() if isinstance(m, nn.Conv2d)}
            strides |= {m.stride for m in operation.modules() if isinstance(m, SamePool)}
            assert (2 in strides) == (state < 2)


def test_unused_inputs_and_concatenations_reach_the_output():
    blocks = ((1, 1, "conv_1x1", "identity", "concat"), (2, 1, "sep_conv_3x3", "max_pool_3x3", "concat"))
    for stride, size in ((1, 6), (2, 3)):
        cell = published_cell("normal", 6, 8, 4, blocks=blocks, outputs=(0, 3), stride=stride)
        y = cell(torch.randn(2, 6, 6, 6), torch.randn(2, 8, 6, 6))
        assert y.shape == (2, 12, size, size) and cell.out_channels == 12

"""Pattern-wise execution against the masked dense convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archsmith.layers.pattern_conv import PatternConv2d

POOL = ((4, 5, 7, 8), (3, 4, 6, 7), (1, 2, 4, 5), (0, 1, 3, 4))


def example(
    *,
    kernel: int = 3,
    percent: int = 50,
    groups: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    **more,
) -> tuple[nn.Conv2d, torch.Tensor, torch.Tensor | None]:
    """Return a pruned convolution, which kernels it keeps, and their patterns."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 12, kernel, groups=groups, bias=bias, dtype=dtype, **more)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        kept = torch.rand(12, 8 // groups, generator=generator) >= percent / 100
        mask, ids = kept[:, :, None, None].expand(conv.weight.shape).clone(), None
        if kernel == 3:
            ids = torch.randint(0, len(POOL), kept.shape, generator=generator)
            allowed = torch.zeros(len(POOL), 9, dtype=torch.bool)
            for number, pattern in enumerate(POOL):
                allowed[number, list(pattern)] = True
            mask &= allowed[ids].view(*kept.shape, 3, 3)
        conv.weight.mul_(mask)
    return conv, kept, ids


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("execution", ["patterns", "sparse"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"padding": 1},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (2, 0), "dilation": 2},
        {"padding": 1, "groups": 2, "bias": False},
        {"kernel": 1},
        {"kernel": 1, "stride": 2, "groups": 4},
        {"kernel": 5, "padding": 2},
        {"padding": 1, "percent": 0},
        {"padding": 1, "percent": 100},
    ],
    ids=str,
)
def test_it_equals_the_masked_dense_convolution(form: dict, execution: str) -> None:
    conv, kept, ids = example(**form)
    layer = PatternConv2d.from_dense(conv, kept, ids, None if ids is None else POOL)
    layer.execution = execution  # type: ignore[assignment]
    for size in ((9, 11), (8, 8)):
        x = torch.randn(3, 8, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, found = conv(x), layer(x)
        assert found.shape == expected.shape
        assert relative(found, expected) < 1e-5
    assert torch.equal(layer.to_dense(), conv.weight)
    assert len(layer.values) == int(kept.sum())


def test_float64_and_channels_last() -> None:
    conv, kept, ids = example(padding=1, dtype=torch.float64)
    layer = PatternConv2d.from_dense(conv, kept, ids, POOL)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for execution in ("patterns", "sparse"):
            layer.execution = execution  # type: ignore[assignment]
            assert relative(layer(x), conv(x)) < 1e-12


def test_what_is_stored_is_a_list_of_kernels_for_each_filter() -> None:
    conv, kept, ids = example(padding=1)
    layer = PatternConv2d.from_dense(conv, kept, ids, POOL)
    assert ids is not None
    for o in range(12):
        own = slice(int(layer.filters[o]), int(layer.filters[o + 1]))
        channels = layer.channel[own].long()
        assert channels.tolist() == kept[o].nonzero()[:, 0].tolist()
        assert layer.pattern[own].tolist() == ids[o, channels].tolist()
        for k, i in zip(range(own.start, own.stop), channels.tolist(), strict=True):
            positions = list(POOL[int(layer.pattern[k])])
            assert torch.equal(layer.values[k], conv.weight[o, i].flatten()[positions])


def test_gradients_are_those_of_the_masked_convolution() -> None:
    conv, kept, ids = example(padding=1, dtype=torch.float64)
    layer = PatternConv2d.from_dense(conv, kept, ids, POOL)
    layer.execution = "patterns"
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64, requires_grad=True)
    (by_layer,) = torch.autograd.grad(layer(x).square().sum(), layer.values)
    dense = layer.to_dense()
    (by_dense,) = torch.autograd.grad(F.conv2d(x, dense, conv.bias, padding=1).square().sum(), layer.values)
    assert torch.allclose(by_layer, by_dense)
    layer.execution = "sparse"
    with pytest.raises(RuntimeError, match="the sparse execution has no gradient: set execution='patterns'"):
        layer(x)


def test_changed_values_are_seen_by_the_sparse_matrix() -> None:
    conv, kept, ids = example(padding=1)
    layer = PatternConv2d.from_dense(conv, kept, ids, POOL)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.values.mul_(2)
        assert layer.bias is not None
        shift = layer.bias[:, None, None]
        assert torch.allclose(layer(x) - shift, 2 * (before - shift), atol=1e-4)


def test_what_each_execution_multiplies() -> None:
    conv, kept, ids = example(padding=1, percent=50)
    layer = PatternConv2d.from_dense(conv, kept, ids, POOL)
    assert ids is not None
    assert layer.macs(10, 10) == int(kept.sum()) * 4 * 100
    layer.execution = "patterns"
    total = 0
    for number in range(4):
        o, i = (kept & (ids == number)).nonzero(as_tuple=True)
        total += 4 * len({*o.tolist()}) * len({*i.tolist()})
    assert layer.macs(10, 10) == total * 100
    strided, kept, ids = example(padding=1, stride=2)
    assert PatternConv2d.from_dense(strided, kept, ids, POOL).macs(9, 8) == int(kept.sum()) * 4 * 5 * 4


def test_it_is_made_again_from_its_arguments_and_weights() -> None:
    conv, kept, ids = example(padding=1, stride=2)
    layer = PatternConv2d.from_dense(conv, kept, ids, POOL)
    again = PatternConv2d(**layer.constructor())  # type: ignore[arg-type]
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))


def test_what_cannot_be_stored_is_refused() -> None:
    kept = torch.ones(4, 4, dtype=torch.bool)
    for conv in (nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ValueError, match=r"padding: got .*; allowed: numbers, 'zeros'"):
            PatternConv2d.from_dense(conv, kept)
    with pytest.raises(ValueError, match=r"patterns: got .*; allowed: equally many positions each, from 0 to 8"):
        PatternConv2d(1, 1, (3, 3), ((0, 1), (9, 2)), 1)
    with pytest.raises(ValueError, match="patterns: got"):
        PatternConv2d(1, 1, (3, 3), ((0, 1), (2,)), 1)

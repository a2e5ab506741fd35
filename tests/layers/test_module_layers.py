import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from archsmith.layers.modules import FlatLinear, ModuleNetwork, PaddedResidual, WindowConv, WindowPool, make_modules
from archsmith.space.module_space import ModuleSpace
from archsmith.space.modules import (
    Affine,
    AvgPooling2D,
    BatchNormalization,
    Concat,
    Conv2D,
    Dropout,
    MaxPooling2D,
    Optional,
    Or,
    ReLU,
    Repeat,
    Residual,
    Sigmoid,
    Tanh,
    UserHyperparams,
    window_output,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "deeparchitect.json").read_text())["cases"]


def literal_window(x, size, stride, padding, value, of):
    """Return ``of(window pixels (C, n), weights' rows and columns that are on the map)`` for each output pixel."""
    _, height, width = x.shape
    outputs = [window_output(side, size, stride, padding) for side in (height, width)]
    before = [0, 0]
    if padding == "SAME":
        totals = [max((out - 1) * stride + size - side, 0) for out, side in zip(outputs, (height, width), strict=True)]
        before = [total // 2 for total in totals]
    rows = []
    for i in range(outputs[0]):
        row = []
        for j in range(outputs[1]):
            top, left = i * stride - before[0], j * stride - before[1]
            places = [
                (u, v) for u in range(size) for v in range(size) if 0 <= top + u < height and 0 <= left + v < width
            ]
            row.append(of(places, [x[:, top + u, left + v] for u, v in places]))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


WINDOWS = [(size, stride, padding) for size in (1, 2, 3, 4, 5) for stride in (1, 2, 3) for padding in ("SAME", "VALID")]


@pytest.mark.parametrize(("size", "stride", "padding"), WINDOWS)
def test_windows_are_tensorflows(size, stride, padding):
    torch.manual_seed(0)
    x = torch.randn(2, 7, 8)
    conv = WindowConv(2, 3, size, stride, padding, "normal")
    with torch.no_grad():
        conv.conv.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))

        def product(places, pixels):
            weight = conv.conv.weight
            terms = [weight[:, :, u, v] @ pixel for (u, v), pixel in zip(places, pixels, strict=True)]
            return sum(terms) + conv.conv.bias

        expected = literal_window(x, size, stride, padding, 0.0, product)
        torch.testing.assert_close(conv(x[None])[0], expected, rtol=1e-5, atol=1e-5)
        for kind, of in (
            ("max", lambda places, pixels: torch.stack(pixels).amax(0)),
            ("avg", lambda places, pixels: torch.stack(pixels).mean(0)),
        ):
            expected = literal_window(x, size, stride, padding, 0.0, of)
            torch.testing.assert_close(WindowPool(kind, size, stride, padding)(x[None])[0], expected)


def test_tensorflows_published_example_of_an_odd_padding():
    # An even window over an even side: SAME puts its only zero at the end.
    conv = WindowConv(1, 1, 2, 1, "SAME", "kaiming")
    with torch.no_grad():
        conv.conv.weight.fill_(1.0)
        assert conv(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().tolist() == [10.0, 6.0, 7.0, 4.0]
        assert WindowPool("avg", 2, 1, "SAME")(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().tolist() == [
            2.5,
            3.0,
            3.5,
            4.0,
        ]


def test_a_residual_pads_at_the_end_of_each_axis():
    narrow = torch.nn.Conv2d(3, 5, 1, stride=2)
    residual = PaddedResidual(narrow, (3, 4, 4), (5, 2, 2))
    x = torch.randn(2, 3, 4, 4)
    y = residual(x)
    assert y.shape == (2, 5, 4, 4) and residual.shape == (5, 4, 4)
    inner = narrow(x)
    assert torch.equal(y[:, :3, 2:, :], x[:, :, 2:, :])
    assert torch.equal(y[:, 3:, :2, :2], inner[:, 3:])
    torch.testing.assert_close(y[:, :3, :2, :2], x[:, :, :2, :2] + inner[:, :3])
    assert not y[:, 3:, 2:, :].any()


def test_a_residual_of_another_rank_is_flattened():
    case = GOLDEN["residual output dims, rank change"]
    network = ModuleNetwork(("Residual", ("Affine", (("units", 50), ("initialiser", "kaiming")))), (3, 4, 4))
    assert list(network.output_shape) == case["expected"]
    x = torch.randn(2, 3, 4, 4)
    expected = network.body.body(x) + functional.pad(x.flatten(1), (0, 2))
    torch.testing.assert_close(network(x), expected)


def test_initialisers_have_their_scales():
    torch.manual_seed(0)
    for name, scale in (("kaiming", (2 / 400) ** 0.5), ("xavier", (2 / 700) ** 0.5), ("normal", 0.05)):
        linear = FlatLinear(400, 300, name).linear
        assert linear.weight.std().item() == pytest.approx(scale, rel=0.02)
        assert not linear.bias.any()
    bound = (6 / 700) ** 0.5
    assert FlatLinear(400, 300, "xavier").linear.weight.abs().max().item() <= bound
    with pytest.raises(ValueError, match="initialiser: got 'zeros'; allowed: 'kaiming', 'xavier', 'normal'"):
        FlatLinear(2, 2, "zeros")


def test_dropout_keeps_with_its_probability():
    layer, shape = make_modules(("Dropout", (("keep", 0.9),)), (10_000,))
    torch.manual_seed(0)
    kept = layer.train()(torch.ones(1, 10_000))
    assert shape == (10_000,)
    assert abs((kept != 0).float().mean().item() - 0.9) < 4 * (0.09 / 10_000) ** 0.5
    assert kept.max().item() == pytest.approx(1 / 0.9)
    assert torch.equal(layer.eval()(kept), kept)


EVERYTHING = Concat(
    [
        UserHyperparams(lr=[0.1, 0.01]),
        Or([Conv2D([2, 3], [1, 2, 4], [1, 2], ["SAME", "VALID"]), MaxPooling2D([2, 3], [1, 2], ["SAME", "VALID"])]),
        BatchNormalization(),
        Optional(AvgPooling2D([2, 3], [1, 3])),
        Repeat(Residual(Concat([Or([Conv2D([4], [3], [2]), Affine([9])]), Or([ReLU(), Tanh(), Sigmoid()])])), [1]),
        Optional(Dropout([0.5])),
        BatchNormalization(),
        Residual(Affine([5, 70])),
    ]
)


def test_shapes_are_those_of_the_space():
    space = ModuleSpace("everything", EVERYTHING, (2, 9, 6))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        sample = space.sample(rng)
        network = ModuleNetwork(space.program(sample), (2, 9, 6)).train()
        output = network(torch.randn(3, 2, 9, 6))
        assert tuple(output.shape[1:]) == network.output_shape == space.output_shape(sample)
        seen.update(space.tokens(sample))
    assert seen >= {"Conv2D", "MaxPooling2D", "AvgPooling2D", "Affine", "Residual", "Dropout", "Empty", "Tanh"}


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (("Softmax", ()), "got the module 'Softmax'"),
        (
            (
                "Concat",
                (
                    ("Affine", (("units", 4), ("initialiser", "xavier"))),
                    ("MaxPooling2D", (("size", 2), ("stride", 2), ("padding", "SAME"))),
                ),
            ),
            r"MaxPooling2D needs a map \(C, H, W\), its input has the shape \(4,\)",
        ),
        (("MaxPooling2D", (("size", 5), ("stride", 1), ("padding", "VALID"))), "a window of 5 does not fit"),
        (("MaxPooling2D", (("size", 1), ("stride", 1), ("padding", "same"))), "padding: got 'same'"),
    ],
)
def test_programs_that_do_not_fit_are_refused(program, text):
    with pytest.raises(ValueError, match=text):
        ModuleNetwork(program, (1, 4, 4))

import json

import pytest
import torch
from flexibert_cases import benchmark_layers, cases, fill
from shared_data import shared_data
from torch import nn

from archsmith.layers.flexibert import (
    FlexiClassifier,
    FlexiEncoder,
    FlexiLayer,
    LinearTransform,
    SelfAttention,
    SpanConvolution,
    cosine_transform,
    fourier_matrices,
    fourier_real,
    text_operator,
)

NUMBERS = {"query": 1, "key": 2, "value": 3, "multiply": 4, "input": 5, "kernels": 9, "spans": 10}
ALL_SIX = [
    ("l", "dct", 16, 2),
    ("l", "dft", 8, 2),
    ("c", 5, 8, 2),
    ("c", 9, 12, 4),
    ("sa", "wma", 8, 2),
    ("sa", "sdp", 8, 1),
]


def filled(operator):
    """Give an operator the weights of the published cases."""
    with torch.no_grad():
        for name, part in operator.named_children():
            if isinstance(part, nn.Linear):
                part.weight.copy_(fill(NUMBERS[name], 0.3, tuple(part.weight.shape)))
                if part.bias is not None:
                    part.bias.copy_(fill(NUMBERS[name] + 0.5, 0.3, tuple(part.bias.shape)))
        if isinstance(operator, SpanConvolution):
            operator.key_depthwise.weight.copy_(fill(6, 0.3, tuple(operator.key_depthwise.weight.shape)))
            operator.key_pointwise.weight.copy_(fill(7, 0.3, tuple(operator.key_pointwise.weight.shape)))
            operator.key_pointwise.bias.copy_(fill(8, 0.3, tuple(operator.key_pointwise.bias.shape)))
    return operator


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("case", cases("op_"), ids=lambda case: case["name"])
def test_the_published_operators(case):
    given, expected = case["input"], case["expected"]
    kinds = {"sdp": ("sa", "sdp"), "wma": ("sa", "wma"), "dft": ("l", "dft"), "dct": ("l", "dct")}
    operation, parameter = kinds.get(given["op"], ("c", given["kernel"]))
    operator = filled(text_operator(operation, parameter, 16, given["heads"]).double().eval())
    with torch.no_grad():
        y = operator(fill(0, 1, (2, 6, 16)))
    assert count(operator) == expected["params"]
    assert y.sum().item() == pytest.approx(expected["sum"], rel=1e-9)
    assert y.square().sum().item() == pytest.approx(expected["sum_sq"], rel=1e-9)
    assert y.flatten()[:4].tolist() == pytest.approx(expected["first4"], rel=1e-9)
    assert y.flatten()[-3:].tolist() == pytest.approx(expected["last3"], rel=1e-9)


def encoder_params(hidden, rows, *, size=None):
    layers = [(o, p, hidden, n, f if size is None else (size,) * len(f)) for o, p, n, f in benchmark_layers(rows)]
    with torch.device("meta"):
        return count(FlexiEncoder(30522, 512, 128, layers))


@pytest.mark.parametrize("row", cases("bert_param_counts")[0]["expected"], ids=lambda row: str(row["id"]))
def test_the_published_sizes_of_trained_encoders(row):
    assert encoder_params(row["hidden"], row["layers"]) == row["true_params"]
    assert encoder_params(256, row["layers"], size=1024) == row["published_params"]


@pytest.mark.slow
def test_the_published_sizes_of_all_500_encoders():
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = shared_data("nas-benchmarks")
    rows = parquet.read_table(folder / "flexibert-500-glue.parquet").to_pylist()
    published = parquet.read_table(folder / "flexibert-500-proxies.parquet").to_pylist()
    assert len(rows) == 500
    for row, scores in zip(rows, published, strict=True):
        assert row["id"] == scores["ID"]
        layers = [tuple(layer.values()) for layer in json.loads(row["encoder_layers_json"])]
        assert encoder_params(256, layers, size=1024) == scores["Number of Parameters"]


def test_weighted_attention_with_the_identity_is_the_plain_one():
    plain, weighted = SelfAttention(16, 2).double(), SelfAttention(16, 2, weighted=True).double()
    weighted.load_state_dict(plain.state_dict() | {"multiply.weight": torch.eye(16, dtype=torch.float64)})
    x = fill(3, 1, (2, 5, 16))
    torch.testing.assert_close(weighted(x), plain(x), rtol=1e-12, atol=1e-12)


def test_the_transform_of_a_constant_is_in_the_first_bin_of_each_head():
    operator = LinearTransform(8, 2, "dft").double()
    with torch.no_grad():
        operator.input.weight.zero_()
        operator.input.bias.fill_(0.5)
        y = operator(fill(1, 1, (1, 6, 8)))[0].unflatten(-1, (2, 4))
    assert y[0, :, 0].tolist() == pytest.approx([0.5 * 6 * 4] * 2)
    y[0, :, 0] = 0
    assert y.abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 8, 4), (3, 1, 6), (2, 5, 1)])
def test_fast_transforms_equal_their_matrices(shape, monkeypatch):
    x = fill(2, 1, shape)
    fast = fourier_real(x), cosine_transform(x)
    monkeypatch.setattr("archsmith.layers.flexibert.written_as_graph", lambda: True)
    for found, expected in zip(fast, (fourier_real(x), cosine_transform(x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    n, k = torch.arange(shape[-1], dtype=torch.float64), torch.arange(shape[-1], dtype=torch.float64)[:, None]
    direct = 2 * (x[..., None, :] * torch.cos(torch.pi * k * (2 * n + 1) / (2 * shape[-1]))).sum(-1)
    torch.testing.assert_close(fast[1], direct, rtol=1e-12, atol=1e-12)
    cosines, sines = fourier_matrices(shape[-1], x)
    torch.testing.assert_close(cosines @ cosines + sines @ sines, shape[-1] * torch.eye(shape[-1], dtype=x.dtype))


@pytest.mark.parametrize("kernel", [1, 5, 13])
def test_a_convolution_sees_its_neighbourhood_only(kernel):
    operator = SpanConvolution(8, 2, kernel).double()
    x = fill(4, 1, (1, 20, 8))
    moved = x.clone()
    moved[0, 15] += 1
    with torch.no_grad():
        changed = (operator(x) - operator(moved))[0].abs()
    far = [t for t in range(20) if abs(t - 15) > kernel // 2]
    assert changed[far][:, 4:].max() == 0  # the convolving head
    assert changed[far][:, :4].max() > 0  # the attending head


def test_attention_does_not_look_at_padding():
    torch.manual_seed(0)
    encoder = FlexiEncoder(20, 9, 8, [("sa", "wma", 8, 2, (6,)), ("sa", "sdp", 12, 2, (6, 6))]).eval()
    tokens = torch.randint(1, 20, (2, 6))
    with torch.no_grad():
        short, padded = encoder(tokens), encoder(torch.nn.functional.pad(tokens, (0, 3)))
    torch.testing.assert_close(padded[:, :6], short)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_every_parameter_learns(pooling):
    torch.manual_seed(0)
    layers = [(o, p, h, n, (6,) * (1 + i % 3)) for i, (o, p, h, n) in enumerate(ALL_SIX)]
    network = FlexiClassifier(30, 11, 8, layers, 4, 0.1, pooling=pooling)
    tokens = torch.randint(1, 30, (3, 11))
    network(tokens).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    again = FlexiClassifier(**network.constructor())
    again.load_state_dict(network.state_dict())
    as_float = tokens.float()[:, None, None]
    with torch.no_grad():
        assert torch.equal(again.eval()(as_float), network.eval()(tokens))


def test_transforms_have_an_output_where_the_graph_has_one():
    bare, drawn = FlexiLayer(8, "l", "dft", 2, (4,)), FlexiLayer(8, "l", "dft", 2, (4,), transform_output=True)
    assert count(drawn) - count(bare) == 8 * 8 + 8 + 2 * 8
    with torch.no_grad():
        drawn.output.weight.zero_(), drawn.output.bias.zero_()
        x = fill(1, 1, (1, 3, 8)).float()
        torch.testing.assert_close(drawn(x), drawn.feed_forward(drawn.norm(x)))  # the residual alone is left


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SelfAttention(10, 4), "a divisor of the hidden size 10"),
        (lambda: LinearTransform(8, 2, "fft"), "'dft' or 'dct'"),
        (lambda: SpanConvolution(8, 2, 4), "an odd number"),
        (lambda: text_operator("sa", "dct", 8, 2), r"allowed: sa \(sdp, wma\)"),
        (lambda: FlexiLayer(8, "sa", "sdp", 2, ()), "at least one size"),
        (lambda: FlexiClassifier(9, 4, 8, [("sa", "sdp", 8, 2, (4,))], 2, pooling="max"), "'mean' or 'first'"),
        (lambda: FlexiClassifier(9, 4, 8, [("sa", "sdp", 8, 2, (4,))], 2)(torch.ones(1, 5)), "got 5 positions"),
    ],
)
def test_errors_say_what_is_allowed(make, text):
    with pytest.raises(ValueError, match=text):
        make()

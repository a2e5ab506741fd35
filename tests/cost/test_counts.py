"""MACs and parameters against closed forms, one operator kind at a time, and what counting must leave alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import count


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def macs(function, *shapes, **options):
    return count(Function(function), tuple(torch.zeros(shape) for shape in shapes), **options).macs


@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    ins=st.integers(1, 2),
    outs=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    transposed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_convolutions_count_every_kernel_position(
    dims, groups, ins, outs, kernel, stride, dilation, padding, transposed
):
    names = ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"] if transposed else ["Conv1d", "Conv2d", "Conv3d"]
    conv = getattr(nn, names[dims - 1])(
        groups * ins, groups * outs, kernel, stride=stride, dilation=dilation, padding=padding, groups=groups
    )
    size = 7
    # One axis of a convolution visits `positions` places, each with `kernel` taps; a transposed one starts from inputs.
    positions = size if transposed else (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    expected = groups * ins * outs * (positions * kernel) ** dims
    assert count(conv, torch.zeros(2, groups * ins, *[size] * dims)).macs == expected


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda x, y: x @ y, [(5, 7), (7, 3)], 5 * 7 * 3),
        (lambda x, y: x @ y, [(2, 4, 5, 7), (2, 4, 7, 3)], 2 * 4 * 5 * 7 * 3),
        (lambda x, y: x @ y, [(6, 5, 7), (7, 3)], 6 * 5 * 7 * 3),
        (lambda x, y: x @ y, [(5, 7), (7,)], 5 * 7),
        (lambda x, y: x @ y, [(7,), (7,)], 7),
        (lambda c, x, y: torch.addmm(c, x, y), [(3,), (5, 7), (7, 3)], 5 * 7 * 3),
        (lambda c, x, y: torch.baddbmm(c, x, y), [(2, 5, 3), (2, 5, 7), (2, 7, 3)], 2 * 5 * 7 * 3),
        (lambda c, x, y: torch.addbmm(c, x, y), [(5, 3), (2, 5, 7), (2, 7, 3)], 2 * 5 * 7 * 3),
        (lambda c, x, y: torch.addmv(c, x, y), [(5,), (5, 7), (7,)], 5 * 7),
        (lambda x, y: torch.einsum("bhle,bhse->bhls", x, y), [(2, 3, 5, 7), (2, 3, 4, 7)], 2 * 3 * 5 * 4 * 7),
        (lambda x, y: torch.einsum("ij,kj->ik", x, y), [(5, 7), (3, 7)], 5 * 7 * 3),
        (lambda x, w: F.linear(x, w), [(2, 3, 7), (5, 7)], 2 * 3 * 7 * 5),
        (lambda x: x.exp().mean() * 2 + x.softmax(-1).sum(), [(5, 7)], 0),
    ],
)
def test_matrix_products(function, shapes, expected):
    assert macs(function, *shapes, batch_axis=None) == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2), (8, 1)])
def test_attention_counts_scores_and_mixing_of_every_query_head(heads, groups, causal):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=causal)

    shapes = (3, heads, 5, 16), (3, groups, 7, 16), (3, groups, 7, 12)
    assert macs(attend, *shapes) == heads * 5 * 7 * (16 + 12)


def test_fused_attention_operators_called_by_name():
    def attend(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    assert macs(attend, *[(3, 2, 5, 8)] * 3) == 2 * 5 * 5 * 16
    assert macs(attend, (3, 8, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)) == 8 * 5 * 7 * 16


def test_attention_with_a_mask_and_under_inference_mode():
    def attend(q, mask):
        with torch.inference_mode():
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert macs(attend, (3, 2, 5, 8), (5, 5)) == 2 * 5 * 5 * 16


@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_and_encoder_in_evaluation_mode(bias):
    length, width, hidden = 5, 8, 16
    attention = 4 * length * width * width + 2 * length * length * width
    mha = nn.MultiheadAttention(width, 2, batch_first=True, bias=bias).eval()
    x = torch.zeros(3, length, width)
    assert count(mha, (x, x, x)).macs == attention
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True, bias=bias)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    assert count(encoder, x).macs == 2 * (attention + 2 * length * width * hidden)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("make", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 1), (2, 2)])
def test_recurrent_layers_count_their_matrices_per_step(make, gates, layers, directions):
    steps, ins, hidden = 7, 3, 4
    net = make(ins, hidden, layers, bidirectional=directions == 2, batch_first=True)
    first = gates * hidden * (ins + hidden)
    later = gates * hidden * (directions * hidden + hidden)
    expected = steps * directions * (first + (layers - 1) * later)
    assert count(net, torch.zeros(5, steps, ins)).macs == expected
    sequence_first = make(ins, hidden, layers, bidirectional=directions == 2)
    assert count(sequence_first, torch.zeros(steps, 5, ins), batch_axis=1).macs == expected


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_lstm_with_projection_and_cells():
    net = nn.LSTM(3, 4, proj_size=2, batch_first=True)
    assert count(net, torch.zeros(1, 7, 3)).macs == 7 * (16 * 3 + 16 * 2 + 2 * 4)
    assert count(nn.LSTMCell(3, 4), torch.zeros(2, 3)).macs == 16 * 7
    assert count(nn.GRUCell(3, 4), torch.zeros(2, 3)).macs == 12 * 7


def test_embedding_is_free():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    counts = count(net, torch.zeros(3, 5, dtype=torch.long))
    assert (counts.macs, counts.params) == (5 * 8, 40 + 10)


def test_conventions():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.zeros(2, 3, 6, 6)
    standard, paper = count(net, x), count(net, x, convention="paper")
    assert standard.macs == 3 * 4 * 36 + 8 and standard.convention == "standard"
    assert paper.macs == standard.macs + 4 * 36 + 4 * 9 and paper.convention == "paper"
    assert {layer.name: layer.macs for layer in paper.layers}["2"] == 4 * 9
    pools = [lambda x: F.avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(input=x, output_size=(2, 3))]
    for pool in pools:
        assert macs(pool, (2, 3, 6, 6), convention="paper") == 3 * 36
    for other in [lambda x: x.mean((2, 3)), lambda x: F.max_pool2d(x, 2)]:
        assert macs(other, (2, 3, 6, 6), convention="paper") == 0
    assert macs(lambda x: F.avg_pool1d(x, 2), (2, 3, 6), convention="paper") == 18
    assert macs(lambda x: F.adaptive_avg_pool3d(x, 2), (2, 3, 6, 6, 6), convention="paper") == 3 * 216


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(y) @ self.head.weight


def test_layer_table_sums_to_the_totals():
    counts = count(Block(), torch.zeros(2, 3, 5, 5))
    table = {layer.name: (layer.kind, layer.macs, layer.params, layer.output_shape) for layer in counts.layers}
    assert table == {
        "": ("Block", 4 * 8, 0, (1, 8)),
        "conv": ("Conv2d", 25 * 27 * 8, 27 * 8, (1, 8, 5, 5)),
        "norm": ("BatchNorm2d", 0, 16, (1, 8, 5, 5)),
        "head": ("Linear", 32, 36, (1, 4)),
    }
    assert counts.macs == sum(layer.macs for layer in counts.layers)
    assert counts.params == sum(layer.params for layer in counts.layers) == 27 * 8 + 16 + 36
    assert counts.params_conv_linear == 27 * 8 + 36
    assert counts.to_dict()["layers"][1]["name"] == "conv"


def test_norms_of_any_make_are_outside_params_conv_linear():
    class MyRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight

    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), MyRMSNorm(), nn.GroupNorm(2, 4), nn.BatchNorm1d(4))
    counts = count(net, torch.zeros(1, 4))
    assert (counts.params_conv_linear, counts.params) == (20, 20 + 8 + 4 + 8 + 8)


def test_shared_parameters_and_shared_modules_count_once_but_run_twice():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    counts = count(tied, torch.zeros(1, 4))
    assert (counts.params, counts.params_conv_linear, counts.macs) == (16, 16, 32)
    assert [layer.params for layer in counts.layers] == [16, 0]
    same = nn.Linear(4, 4)
    twice = count(nn.Sequential(same, same), torch.zeros(1, 4))
    assert [(layer.name, layer.macs, layer.params) for layer in twice.layers] == [("0", 32, 20)]


@given(batch=st.integers(1, 9))
@settings(max_examples=5, deadline=None)
def test_the_batch_does_not_matter_even_with_work_shared_between_examples(batch):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Parameter(torch.ones(6, 4)), nn.Linear(4, 4)

        def forward(self, x, y):
            return x @ self.mix(self.table).t() + y

    counts = count(Shared(), (torch.zeros(batch, 4), torch.zeros(batch, 6)))
    assert counts.macs == 6 * 4 * 4 + 4 * 6


def test_mode_buffers_attributes_hooks_and_random_state_stay():
    class Remembering(Block):
        def forward(self, x):
            self.seen = x
            self.calls = getattr(self, "calls", 0) + 1
            return F.dropout(super().forward(x), training=True)

    net = Remembering().train()
    net.norm.eval()
    x = torch.randn(2, 3, 5, 5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    identities = [id(parameter) for parameter in net.parameters()]
    random_state = torch.get_rng_state()
    in_training = count(net, x)
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [id(parameter) for parameter in net.parameters()] == identities
    assert not hasattr(net, "seen") and not hasattr(net, "calls")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert count(net.eval(), x) == in_training


def test_large_meta_network_is_counted_without_memory_or_computation():
    with torch.device("meta"):
        net = nn.Sequential(*[nn.Linear(10_000, 10_000) for _ in range(30)])
    counts = count(net, torch.zeros(64, 10_000))
    assert counts.macs == 30 * 10**8
    assert counts.params == 30 * (10**8 + 10**4)


class LooksAtData(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large, self.norm = nn.Linear(3, 4), nn.Linear(3, 40), nn.BatchNorm1d(3)

    def forward(self, x):
        self.norm(x)
        return self.small(x) if x.sum() > 0 else self.large(x)


def test_control_flow_on_data_runs_on_the_real_inputs():
    net = LooksAtData().train()
    assert count(net, torch.ones(1, 3)).macs == 12
    assert count(net, -torch.ones(1, 3)).macs == 120
    assert net.norm.num_batches_tracked == 0 and net.training
    with torch.device("meta"):
        meta = LooksAtData()
    with pytest.raises(UserError, match=r"LooksAtData fails"):
        count(meta, torch.ones(1, 3))


def test_custom_operators_are_named_not_ignored():
    @torch.library.custom_op("archsmith_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    assert count(Function(twice), torch.zeros(1, 3)).uncounted == ("archsmith_test.twice.default",)
    bilinear = count(nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3)))
    assert bilinear.uncounted == ("aten._trilinear.default",)


def test_errors(capfd):
    with pytest.raises(UserError, match=r"convention: got 'flops'; allowed: standard or paper"):
        count(nn.Linear(3, 2), torch.zeros(1, 3), convention="flops")
    with pytest.raises(UserError, match=r"inputs: got a first tensor of shape \(0, 3\); allowed: at least one example"):
        count(nn.Linear(3, 2), torch.zeros(0, 3))
    with pytest.raises(UserError, match=r"axis 0.*batch_axis=None"):
        count(nn.Identity(), torch.tensor(1.0))
    with pytest.raises(
        UserError, match=r"shape \[\(1, 4\)\] \(one example\), with which Linear fails: .*cannot be mul"
    ):
        count(nn.Linear(3, 2), torch.zeros(5, 4))
    assert capfd.readouterr().err == ""

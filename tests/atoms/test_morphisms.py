import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from archsmith.atoms.morphisms import (
    Copies,
    channel_statistics,
    divided,
    flattened,
    identity_conv,
    identity_linear,
    identity_norm,
    joined,
    neutral_norm,
    repeated,
    repeated_norm,
    unchanged,
    widening,
    without_inputs,
)
from archsmith.core.errors import UserError

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden/eas.json").read_text())["cases"]
DOUBLE = {"dtype": torch.float64}


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", ["Net2Wider mapping and magnifier 4->7", "Net2Wider mapping and magnifier 5->6"])
def test_the_published_mappings(case):
    given_, expected = GOLDEN[case]["input"], GOLDEN[case]["expected"]
    copies = widening(given_["old"], given_["new"], extra=given_["sampled_extra"])
    assert copies.source.tolist() == expected["indices"]
    assert copies.shares.tolist() == pytest.approx(expected["magnifier"], abs=1e-12)


def test_a_random_widening_keeps_the_old_units_first_and_follows_its_stream():
    copies = widening(4, 9, generator=stream(3))
    assert copies.source[:4].tolist() == [0, 1, 2, 3]
    assert torch.equal(copies.source, widening(4, 9, generator=stream(3)).source)
    assert not torch.equal(copies.source, widening(4, 9, generator=stream(4)).source)
    drawn = widening(4, 4_004, generator=stream()).counts
    assert int((drawn - 1_001).abs().max()) < 4 * (1_000 * 0.75) ** 0.5 + 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(0, 6), st.integers(0, 10**6))
def test_what_is_made_twice_is_read_by_halves(old, more, seed):
    """Every linear consumer reads the same sum, whichever units are copied, in any order."""
    first, second = normal(old, 3, seed=seed), normal(2, old, seed=seed + 1)
    source = torch.cat([torch.arange(old), torch.randint(old, (more,), generator=stream(seed))])
    copies = Copies(source[torch.randperm(len(source), generator=stream(seed))], old)
    grown = divided(second, copies) @ repeated(first, copies)
    torch.testing.assert_close(grown, second @ first, rtol=1e-12, atol=1e-12)
    assert float(copies.shares.sum()) == pytest.approx(old)
    assert int(copies.is_repeat.sum()) == more


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
def test_through_normalisation_depthwise_and_pool(pool):
    conv, depthwise, reader = normal(4, 3, 3, 3), normal(4, 1, 3, 3, seed=1), normal(5, 4, 3, 3, seed=2)
    norm = nn.BatchNorm2d(4).double()
    vectors = {k: v + 1 + torch.rand(v.shape, generator=stream(5)) for k, v in norm.state_dict().items() if v.dim()}
    x = normal(2, 3, 8, 8, seed=3)

    def network(first, between, each, last):
        h = functional.conv2d(x, first, padding=1)
        h = functional.batch_norm(
            h, between["running_mean"], between["running_var"], between["weight"], between["bias"]
        )
        h = functional.conv2d(pool(functional.relu(h)), each, padding=1, groups=each.shape[0])
        return functional.conv2d(h, last, padding=1)

    copies = widening(4, 7, extra=[1, 3, 1])
    grown = network(
        repeated(conv, copies), repeated_norm(vectors, copies), repeated(depthwise, copies), divided(reader, copies)
    )
    torch.testing.assert_close(grown, network(conv, vectors, depthwise, reader), rtol=1e-12, atol=1e-12)
    undivided = network(
        repeated(conv, copies),
        repeated_norm(vectors, copies),
        repeated(depthwise, copies),
        repeated(reader, copies, axis=1),
    )
    assert float((undivided - grown).abs().max()) > 0.1


@pytest.mark.parametrize("order", ["channels-first", "channels-last"])
def test_through_a_flatten(order):
    conv, reader, x = normal(4, 3, 1, 1), normal(5, 4 * 6, seed=1), normal(2, 3, 2, 3, seed=2)

    def network(first, last, way):
        maps = functional.conv2d(x, first)
        maps = maps if way == "channels-first" else maps.permute(0, 2, 3, 1)
        return maps.flatten(1) @ last.T

    copies = widening(4, 6, extra=[3, 3])
    grown = network(repeated(conv, copies), divided(reader, flattened(copies, 6, order)), order)
    torch.testing.assert_close(grown, network(conv, reader, order), rtol=1e-12, atol=1e-12)
    other = "channels-last" if order == "channels-first" else "channels-first"
    wrong = network(repeated(conv, copies), divided(reader, flattened(copies, 6, other)), order)
    assert float((wrong - grown).abs().max()) > 0.1  # the order of the flatten matters


def test_through_a_concatenation_and_a_remapped_copy_of_a_part():
    """A new part whose units copy those of another one, in any order, is one more mapping (DenseNet's insertion)."""
    parts, reader = [normal(2, 3), normal(4, 3, seed=1), normal(3, 3, seed=2)], normal(5, 9, seed=3)
    copies = joined([unchanged(2), Copies(torch.tensor([0, 1, 2, 3, 2, 0, 3, 3]), 4), unchanged(3)])
    assert copies.source.tolist() == [0, 1, 2, 3, 4, 5, 4, 2, 5, 5, 6, 7, 8]
    assert copies.shares[:10].tolist() == pytest.approx([1, 1, 1 / 2, 1, 1 / 2, 1 / 3, 1 / 2, 1 / 2, 1 / 3, 1 / 3])
    grown = divided(reader, copies) @ torch.cat([parts[0], parts[1], parts[1][[2, 0, 3, 3]], parts[2]])
    torch.testing.assert_close(grown, reader @ torch.cat(parts), rtol=1e-12, atol=1e-12)


def test_steps_compose():
    first, second = widening(3, 5, extra=[0, 2]), widening(5, 6, extra=[4])
    both = first.then(second)
    assert both.source.tolist() == [0, 1, 2, 0, 2, 2] and both.old == 3
    weight = normal(2, 3)
    read = divided(weight, both) @ repeated(torch.eye(3, **DOUBLE), both)
    torch.testing.assert_close(read, weight, rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="copies: got 3; allowed: 5 old units"):
        first.then(unchanged(3))


def test_copies_have_equal_gradients_until_noise_breaks_the_symmetry():
    layer, reader, x = normal(4, 6), normal(3, 4, seed=1), normal(400, 6, seed=2)  # enough for ReLUs to differ
    copies = widening(4, 6, extra=[1, 1])

    def gradients(noise):
        weight = repeated(layer, copies, noise=noise, generator=stream(1)).requires_grad_()
        (functional.relu(x @ weight.T) @ divided(reader, copies).T).square().sum().backward()
        return weight.grad[[1, 4, 5]]

    same = gradients(0.0)
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2])
    different = gradients(0.01)
    assert not torch.equal(different[0], different[1]) and not torch.equal(different[1], different[2])


def test_noise_touches_repeats_only_and_has_the_stated_size():
    weight = normal(3, 4_000)
    grown = repeated(weight, widening(3, 5, extra=[0, 2]), noise=0.01, generator=stream())
    assert torch.equal(grown[:3], weight)
    added = grown[3:] - weight[[0, 2]]
    assert float(added.std()) == pytest.approx(0.01 * float(weight.std(correction=0)), rel=0.05)
    deep = identity_linear(60, noise=0.001, generator=stream())
    expected = 0.001 * float(torch.eye(60).std(correction=0))
    assert float((deep - torch.eye(60)).std()) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_new_layer_changes_nothing(kernel):
    x = functional.relu(normal(8, 4, 6, 6))
    mean, variance = channel_statistics(x)
    norm = nn.BatchNorm2d(4, eps=1e-5).double()
    norm.load_state_dict(identity_norm(mean, variance, eps=1e-5), strict=False)
    h = functional.conv2d(x, identity_conv(4, kernel, dtype=torch.float64), padding=kernel // 2)
    for mode in (False, True):  # in training mode with the batch of the statistics as input
        deeper = functional.relu(norm.train(mode)(h))
        torch.testing.assert_close(deeper, x, rtol=1e-10, atol=1e-10)
    signed = normal(8, 4, 6, 6)  # not the output of a ReLU, or another activation: not an identity
    assert float((functional.relu(signed) - signed).abs().max()) > 1
    assert float((torch.tanh(x) - x).abs().max()) > 0.5


def test_the_variance_is_the_biased_one_over_all_other_axes():
    x = normal(3, 4, 2, 5)
    mean, variance = channel_statistics(x)
    rows = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(variance, ((rows - rows.mean(1, keepdim=True)) ** 2).mean(1))
    mean, variance = channel_statistics(x[..., 0, 0])
    assert mean.shape == variance.shape == (4,)


def test_further_inputs_are_ignored():
    weight, x = normal(5, 3, 1, 1), normal(2, 7, 4, 4, seed=1)
    wide = without_inputs(weight, 4)
    torch.testing.assert_close(functional.conv2d(x, wide), functional.conv2d(x[:, :3], weight))
    norm = nn.BatchNorm2d(3)
    grown = neutral_norm(norm.state_dict(), 2)
    wider = nn.BatchNorm2d(5)
    wider.load_state_dict(grown)
    assert grown["running_var"].tolist() == grown["weight"].tolist() == [1.0] * 5
    assert grown["running_mean"].tolist() == grown["bias"].tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: widening(4, 3), "widening to: got 3; allowed: at least the 4 units"),
        (lambda: widening(4, 6, extra=[1]), r"extra: got \[1\]; allowed: 2 old units to copy"),
        (lambda: Copies(torch.tensor([0, 2]), 2), "old units from 0 to 1"),
        (lambda: Copies(torch.tensor([0, 0]), 2), r"a copy of every old unit; \[1\] have none"),
        (lambda: Copies(torch.tensor([0.0]), 1), "a vector of int64"),
        (lambda: repeated(torch.zeros(3, 2), widening(4, 5)), "size of axis 0: got 3; allowed: 4"),
        (lambda: divided(torch.zeros(3, 2), widening(4, 5)), "size of axis 1: got 2; allowed: 4"),
        (lambda: identity_conv(3, 2), "kernel: got 2; allowed: an odd number"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()

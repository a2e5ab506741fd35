import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from archsmith.layers.darts import DartsNetwork
from archsmith.layers.sparse import (
    SparseConv2d,
    SparseLayers,
    SparseLinear,
    dense_state,
    kept_count,
    kept_counts,
    masked_weight,
    masks,
    reset_scores_,
    scaled_scores,
    set_keep_,
    sparse_layers,
    top_mask,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dass.json").read_text())["cases"]
BY_NAME = {case["name"]: case for case in GOLDEN}


def wave(shape, function, offset, step):
    return function(offset + step * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)


def layer_of(case):
    given = case["input"]
    shape = given["weight_shape"]
    layer = SparseConv2d(
        shape[1] * given["groups"], shape[0], 3, padding=1, groups=given["groups"], keep=given["k"]
    ).double()
    with torch.no_grad():
        layer.weight.copy_(wave(shape, torch.sin, float(given["weight"][4:7]), 1.3))
        layer.score.copy_(wave(shape, torch.cos, float(given["scores"][4:7]), 0.7))
    return layer


@pytest.mark.parametrize("name", ["sparse_conv_k30", "sparse_depthwise_k20", "sparse_conv_dense_limit"])
def test_masks_outputs_and_gradients(name):
    case = BY_NAME[name]
    expected, layer = case["expected"], layer_of(case)
    x = wave((2, layer.in_channels, 6, 6), torch.sin, 0.0, 0.31)
    y = layer(x)
    (y * wave(tuple(y.shape), torch.cos, 0.0, 0.17)).sum().backward()
    kept = top_mask(layer.score, layer.keep).flatten().nonzero().flatten().tolist()
    assert kept == expected["kept_flat_indices"] and len(kept) == expected["kept"]
    close = {"rel": 0, "abs": 1e-9}
    assert y.sum().item() == pytest.approx(expected["output_sum"], **close)
    assert y.flatten()[:4].tolist() == pytest.approx(expected["output_first4"], **close)
    assert layer.score.grad.sum().item() == pytest.approx(expected["score_grad_sum"], **close)
    assert layer.score.grad.flatten()[:6].tolist() == pytest.approx(expected["score_grad_first6"], **close)
    assert int(layer.weight.grad.count_nonzero()) == expected["weight_grad_nonzero"]
    assert layer.weight.grad.sum().item() == pytest.approx(expected["weight_grad_sum"], **close)


def test_keeping_all_is_the_dense_layer_with_a_gradient_for_scores():
    layer = layer_of(BY_NAME["sparse_conv_dense_limit"])
    x = wave((2, 3, 6, 6), torch.sin, 0.0, 0.31)
    assert torch.equal(layer(x), functional.conv2d(x, layer.weight, padding=1))
    layer(x).square().sum().backward()
    assert layer.score.grad.abs().sum() > 0
    layer.score.requires_grad_(False)
    assert masked_weight(layer.weight, layer.score, 1.0) is layer.weight


def test_kept_counts():
    case = BY_NAME["kept_counts"]
    assert [kept_count(n, case["input"]["k"]) for n in case["input"]["numel"]] == case["expected"]
    assert kept_count(10, 1e-20) == 1
    assert kept_count(10, 1.0) == 10
    for keep in (0.01, 0.1):
        assert all(0 < kept_count(n, keep) <= n for n in range(1, 300))


def test_the_mask_keeps_the_stated_number_also_with_equal_scores():
    mask = top_mask(torch.ones(4, 3, 3), 0.25)
    assert mask.sum() == kept_count(36, 0.25)
    assert mask.flatten()[-9:].tolist() == [1.0] * 9


def test_scores_start_as_scaled_weights():
    case = BY_NAME["scaled_score_init"]
    weight = wave(case["input"]["shape"], torch.sin, 0.3, 1.1)
    scores = scaled_scores(weight)
    assert scores.flatten()[:4].tolist() == pytest.approx(case["expected"]["first4"], abs=1e-12)
    assert scores.abs().max().item() == pytest.approx(case["expected"]["max_abs_score"], abs=1e-12)
    magnitude = torch.zeros(weight.numel(), dtype=torch.float64)
    magnitude[weight.abs().flatten().topk(kept_count(108, 0.3)).indices] = 1
    assert torch.equal(top_mask(scores, 0.3).flatten(), magnitude)
    assert torch.equal(scaled_scores(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_a_dropped_weight_can_come_back():
    layer = SparseLinear(2, 1, bias=False, keep=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 3.0]]))
        layer.score.copy_(torch.tensor([[0.2, -0.1]]))
    optimizer = torch.optim.SGD([layer.score], lr=0.1)
    assert masks(layer)[""].tolist() == [[1.0, 0.0]]
    loss = (layer(torch.ones(1, 2)) - 3.0).square().sum()
    loss.backward()
    # dL/dy = 2 (1 - 3) = -4; dL/dm = -4 w; through the sign of each score
    assert layer.score.grad.tolist() == [[-4.0, 12.0]]
    optimizer.step()
    assert masks(layer)[""].tolist() == [[0.0, 1.0]]


def network(layers, seed=0):
    torch.manual_seed(seed)
    edges = (("sep_conv_3x3", 0), ("skip_connect", 1), ("dil_conv_5x5", 0), ("max_pool_3x3", 2))
    return DartsNetwork(3, 5, 4, 3, edges, edges, (2, 3), (2, 3), layers=layers)


def test_the_dense_export_is_the_sparse_network():
    sparse, dense = network(SparseLayers(0.2)), network(None, seed=9)
    x = torch.rand(4, 3, 8, 8)
    for _ in range(3):
        sparse(x)  # statistics
    dense.load_state_dict(dense_state(sparse))
    torch.testing.assert_close(dense.eval()(x), sparse.eval()(x), rtol=0, atol=1e-6)
    kept = kept_counts(sparse)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert (int(module.weight.count_nonzero()), module.weight.numel()) == kept[name]


def test_sparse_and_dense_networks_of_one_seed_have_the_same_weights():
    sparse, dense = network(SparseLayers()), network(None)
    own = sparse.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in dense.state_dict().items())
    assert set(own) - set(dense.state_dict()) == {f"{name}.score" for name in sparse_layers(sparse)}


def test_fractions_are_set_everywhere_and_checked():
    sparse = network(SparseLayers())
    set_keep_(sparse, 0.1)
    assert {layer.keep for layer in sparse_layers(sparse).values()} == {0.1}
    assert sparse.constructor()["layers"].constructor() == {"keep": 0.1}
    for wrong in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="allowed: a fraction in"):
            set_keep_(sparse, wrong)


def test_scores_can_be_reset_to_the_weights_of_today():
    sparse = network(SparseLayers(0.1))
    with torch.no_grad():
        for layer in sparse_layers(sparse).values():
            layer.weight.mul_(-1).add_(0.01)
    reset_scores_(sparse)
    assert all(torch.equal(layer.score, scaled_scores(layer.weight)) for layer in sparse_layers(sparse).values())


def test_a_depthwise_layer_with_two_weights_left_stays_finite():
    layer = nn.Sequential(SparseConv2d(16, 16, 3, padding=1, groups=16, keep=0.01), nn.BatchNorm2d(16, affine=False))
    assert kept_counts(layer) == {"0": (2, 144)}
    y = layer(torch.rand(4, 16, 6, 6))
    y.square().sum().backward()
    assert bool(y.isfinite().all()) and bool(layer[0].score.grad.isfinite().all())
    assert int((y.abs().sum((0, 2, 3)) == 0).sum()) >= 14  # most channels say nothing

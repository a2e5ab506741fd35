"""Self-attention with a choice of rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from archsmith.cost import count
from archsmith.layers.self_attention import SelfAttention, linear_attention

KINDS = ("softmax", "linear", "regression", "local_linear")


def one(kind: str, **options) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(16, 4, kind=kind, **options)


def inputs() -> torch.Tensor:
    return torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_all_kinds_have_the_same_weights_and_hide_padding(kind, causal, num_kv_heads):
    layer = one(kind, causal=causal, num_kv_heads=num_kv_heads)
    assert layer.state_dict().keys() == one("softmax").state_dict().keys()
    x = inputs()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 7:] = False
    y = layer(x, mask)
    assert y.shape == x.shape
    changed = x.clone()
    changed[1, 7:] += 5
    assert torch.allclose(layer(changed, mask)[1, :7], y[1, :7], atol=1e-5)
    assert torch.allclose(layer(x[1:, :7])[0], y[1, :7], atol=1e-5)
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.q_proj.weight.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_rebuilt_from_its_literals(kind):
    layer = one(kind, ridge=0.3, num_kv_heads=2, groups=2)
    again = SelfAttention(**layer.constructor())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(inputs()), layer(inputs())) and again.constructor() == layer.constructor()


def test_a_large_ridge_makes_local_linear_attention_softmax_attention():
    layer, other = one("local_linear", ridge=1e6), one("softmax")
    other.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(inputs()), other(inputs()), atol=1e-5)
    other.kind = "linear"
    assert not torch.allclose(layer(inputs()), other(inputs()), atol=1e-3)


@pytest.mark.parametrize(
    ("form", "names"), [("head", ["ridge_logit"]), ("token", ["ridge_proj.bias", "ridge_proj.weight"])]
)
def test_a_learned_ridge_begins_where_it_should_and_learns(form, names):
    fixed, learned = one("local_linear", ridge=0.3), one("local_linear", ridge=0.3, ridge_form=form)
    assert sorted(set(learned.state_dict()) - set(fixed.state_dict())) == names
    learned.load_state_dict({**learned.state_dict(), **fixed.state_dict()})
    assert torch.allclose(fixed(inputs()), learned(inputs()), atol=1e-5)
    learned(inputs()).square().mean().backward()
    assert all(learned.get_parameter(name).grad.any() for name in names)


def test_linear_attention_equals_its_definition_for_every_tile():
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    wanted = weights / weights.sum(-1, keepdim=True) @ v
    for tile in (1, 4, 9, 64):
        assert torch.allclose(linear_attention(q, k, v, tile=tile), wanted)


def test_its_products_are_counted():
    softmax, local = (count(one(kind), torch.zeros(1, 12, 16)) for kind in ("softmax", "local_linear"))
    assert softmax.params == local.params and softmax.macs == 12 * 16 * 16 * 4 + 2 * 12 * 12 * 16
    # One pass for the moments, one for the output, and the solver between
    assert local.macs > 12 * 16 * 16 * 4 + 3 * 12 * 12 * 16 and not local.uncounted


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "cosine"}, "kind: got 'cosine'"),
        ({"ridge_form": "layer"}, "ridge_form: got 'layer'"),
        ({"ridge_form": "head"}, "where kind has no ridge"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
    ],
)
def test_what_does_not_exist_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        SelfAttention(16, 4, **options)

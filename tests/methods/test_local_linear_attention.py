"""Local linear attention as a system: it is listed, and it is a layer with the weights of any other attention."""

import pytest
import torch

from archsmith.layers.self_attention import SelfAttention
from archsmith.methods import load_method
from archsmith.methods.local_linear_attention import Settings, alternative, attention


@pytest.mark.parametrize("name", ["local-linear-attention", "lla"])
def test_it_is_listed_as_a_layer(name):
    system, module = load_method(name, kind="layer")
    assert system["slug"] == "local-linear-attention" and module.attention is attention


def test_the_layer_takes_the_weights_of_softmax_attention_and_is_near_it_at_a_large_ridge():
    torch.manual_seed(0)
    softmax, x = SelfAttention(16, 4).double(), torch.randn(2, 9, 16, dtype=torch.float64)
    gaps = []
    for ridge in (0.1, 1e3, 1e7):
        layer = attention(16, 4, Settings(ridge=ridge)).double()
        layer.load_state_dict(softmax.state_dict())
        gaps.append(float((layer(x) - softmax(x)).abs().max()))
    assert gaps[0] > 1e-2 > gaps[1] > gaps[2] and gaps[2] < 1e-6


def test_a_learned_ridge_is_for_layers_that_are_trained():
    layer = attention(8, 2, Settings(ridge_form="head"))
    layer(torch.randn(1, 6, 8)).sum().backward()
    assert layer.ridge_logit.grad.abs().sum() > 0
    assert alternative(Settings(ridge=2.0), name="lla-2").name == "lla-2"
    with pytest.raises(ValueError, match="ridge_form: got 'head'"):
        alternative(Settings(ridge_form="head"))
    with pytest.raises(ValueError, match="ridge"):
        Settings(ridge=0.0)


@pytest.mark.slow
def test_in_context_regression_is_learned_better_than_by_softmax_and_linear_attention():
    from argparse import Namespace
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    path = Path(__file__).parents[2] / "benchmarks" / "evidence" / "local_linear_attention.py"
    spec = spec_from_file_location("lla_evidence", path)
    evidence = module_from_spec(spec)
    spec.loader.exec_module(evidence)
    args = Namespace(channels=4, heads=2, lr=1e-2, steps=150, batch=32, length=64)
    for seed in range(2):
        local, softmax, linear = (evidence.error("piecewise", rule, seed, args) for rule in evidence.KINDS)
        assert local < 0.75 * softmax < softmax < linear

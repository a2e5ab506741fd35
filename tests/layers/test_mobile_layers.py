import ast

import pytest
import torch
from mobile_samples import built, closed_form_block, fact, images, small_family, wave, worn_
from references.mobile_block import atom_by_atom, fused

from archsmith.layers.mobile import ChannelShift, MixedInvertedResidual, MobileNet, make_activation


@pytest.mark.parametrize("case", ["r_eval", "r_train", "s2_eval", "s2_train"])
def test_the_block_computes_what_the_published_one_computes(case):
    given, expected = fact(f"block_forward_{case}")
    block, x = closed_form_block(given)
    y = block.train("train" in given["mode"])(x)
    assert list(y.shape) == expected["shape"]
    assert y.sum().item() == pytest.approx(expected["sum"], abs=1e-9)
    assert (y * y).sum().item() == pytest.approx(expected["sum_sq"], abs=1e-9)
    assert y.flatten()[:5].tolist() == pytest.approx(expected["first5"], abs=1e-9)


BLOCKS = {
    "residual": ((6, 6, 1, ((3, 4), (5, 3), (7, 2))), {}),
    "strided": ((6, 9, 2, ((3, 4), (5, 3), (7, 2))), {}),
    "one kernel": ((5, 7, 1, ((5, 6),)), {}),
    "one atom each": ((3, 3, 1, ((3, 1), (7, 1))), {"activation": "swish"}),
    "no expansion": ((4, 6, 2, ((3, 4), (5, 4))), {"expand": False}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BLOCKS)
def test_branches_equal_one_wide_pass_and_the_sum_over_atoms(name, training):
    arguments, settings = BLOCKS[name]
    block = worn_(MixedInvertedResidual(*arguments, **settings).double(), seed=3).train(training)
    x = wave((3, arguments[0], 9, 7), 0.37)
    wide, single = fused(block, x, training=training), atom_by_atom(block, x, training=training)
    y = block(x)
    assert y.abs().max() > 0.1
    torch.testing.assert_close(y, wide, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("activation", ["relu", "swish"])
def test_squeeze_and_excitation_works_on_all_atoms_together(activation, training):
    block = MixedInvertedResidual(6, 6, 1, ((3, 4), (5, 3)), squeeze=3, activation=activation).double()
    worn_(block, seed=4).train(training)
    x = wave((2, 6, 8, 8), 0.37)
    torch.testing.assert_close(block(x), fused(block, x, training=training), rtol=0, atol=1e-12)


def test_a_dead_block_adds_one_constant_for_each_channel():
    block = MixedInvertedResidual(3, 3, 1, ())
    assert isinstance(block.norm, ChannelShift)
    torch.nn.init.normal_(block.norm.bias)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(block(x) - x, (x + block.norm.bias[:, None, None]) - x)
    assert block.atoms() == ()
    assert block.out_channels() == 3


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="needs at least one atom; it has no residual connection"):
        MixedInvertedResidual(3, 4, 1, ())
    with pytest.raises(ValueError, match="needs at least one atom"):
        MixedInvertedResidual(3, 3, 2, ())
    with pytest.raises(ValueError, match=r"every kernel size may occur once, got \(\(3, 2\), \(3, 1\)\)"):
        MixedInvertedResidual(3, 4, 1, ((3, 2), (3, 1)))
    with pytest.raises(ValueError, match="got 'gelu'; allowed: 'relu', 'relu6', 'swish'"):
        make_activation("gelu")


@pytest.mark.parametrize(
    "settings",
    [{}, {"squeeze_ratio": 0.5, "activation": "swish", "dropout": 0.28, "norm_eps": 1e-5, "norm_momentum": 0.1}],
)
def test_the_constructor_rebuilds_the_network(settings):
    blocks = ((8, 1, ((3, 6),), False), (8, 1, (), True), (12, 2, ((3, 6), (7, 2)), True), (12, 1, ((5, 1),), True))
    network = MobileNet(2, 5, 6, 2, blocks, 16, **settings)
    arguments = network.constructor()
    assert ast.literal_eval(repr(arguments)) == arguments
    twin = MobileNet(**arguments)
    assert str(twin) == str(network)
    worn_(network)
    twin.load_state_dict(network.state_dict())
    x = torch.randn(2, 2, 16, 16)
    assert torch.equal(twin.eval()(x), network.eval()(x))


def test_the_classifier_is_pooled_dropped_and_linear():
    family = small_family(dropout=0.5)
    network = built(family, dtype=torch.float64).eval()
    x = images(family, 3, dtype=torch.float64)
    h = network.stem(x)
    for block in network.blocks:
        h = block(h)
    pooled = network.last(h).mean((2, 3))
    y = network(x)
    torch.testing.assert_close(y, pooled @ network.classifier.weight.T + network.classifier.bias, rtol=0, atol=1e-10)
    assert y.shape == (3, 3)
    network.dropout.train()
    assert not torch.equal(network(x), network(x))

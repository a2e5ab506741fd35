import numpy as np
import pytest
import torch
from growing_samples import GOLDEN, filled_dense, filled_plain, images, params
from torch import nn

from archsmith.atoms.morphisms import channel_statistics, widening
from archsmith.core.errors import UserError
from archsmith.families.densenet import DenseFamily
from archsmith.families.densenet import open_family as open_dense
from archsmith.families.densenet_growth import DenseWeights
from archsmith.families.densenet_space import DenseSpace
from archsmith.families.plain import PlainFamily, output_statistics
from archsmith.families.plain import open_family as open_plain
from archsmith.families.plain_growth import PlainWeights
from archsmith.layers.densenet import DenseNetwork
from archsmith.layers.plain import PlainNetwork

PLAIN = open_plain("plain", image=(3, 32, 32), num_classes=10, widen_noise=0.0, deepen_noise=0.0)
DENSE = open_dense("densenet", image=(3, 32, 32), num_classes=10, widen_noise=0.0, deepen_noise=0.0)
WIDER = "Net2Wider on conv_1 4->8 keeps the function"
WIDENINGS = "three successive widenings (conv_1, conv_3 before global pooling, fc_0)"
DEEPER = "Net2Deeper (3x3 identity + BN) after conv_0 on top of the three widenings"
FC = "Net2Deeper fc identity after fc_0"
DENSE_WIDER = "DenseNet widening of one miniblock (growth 4->6) keeps the function"
DENSE_DEEPER = "DenseNet insertion of a miniblock (copy, zero-padded input, remapped output) keeps the function"


def loaded(network, weights):
    network.double().eval().load_state_dict(weights.state_dict())
    return network


@torch.no_grad()
def difference(first, second, batch=None):
    batch = images() if batch is None else batch
    return float((first(batch) - second(batch)).abs().max())


def test_the_start_networks_are_the_published_ones():
    for build, case in (
        (lambda: filled_plain(PLAIN.build(PLAIN.space.start())), "plain start net forward"),
        (
            lambda: filled_dense(DENSE.build(DENSE.space.start())),
            "DenseNet-BC start net (growth 4, depth 10, 3 blocks, reduction 0.5, bottleneck 4) forward",
        ),
    ):
        network, expected = build(), GOLDEN[case]["expected"]
        assert params(network) == expected["params_trainable"]
        with torch.no_grad():
            logits = network(images())
        np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-7)


@pytest.mark.parametrize("depth", [40, 100])
def test_published_densenets_have_their_sizes(depth):
    family = open_dense("densenet", image=(3, 32, 32), num_classes=10, longest=60)
    expected = GOLDEN[f"DenseNet-BC trainable parameters growth 12 depth {depth}"]["expected"]["params_trainable"]
    with torch.device("meta"):
        network = family.build(family.space.uniform(12, depth))
    assert params(network) == expected
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    assert layers == depth


def grown_plain():
    """Yield (case, network) along the published chain of transforms."""
    network = filled_plain(PLAIN.build(PLAIN.space.start()))
    weights, space = PlainWeights(network.state_dict()), PLAIN.space
    tokens = list(space.tokens(space.start()))
    yield "start", network

    def now():
        return loaded(PLAIN.build(space.from_tokens(tokens)), weights)

    # In the facts layers are counted with pools: 2 is the second block, 6 the fourth, 8 the linear layer.
    for step, (place, wider) in zip(
        GOLDEN[WIDENINGS]["input"]["steps"],
        (((1, 0), "conv-8-3"), ((3, 0), "conv-8-3"), ((4, 0), "fc-16")),
        strict=True,
    ):
        tokens[step["layer"]] = wider
        width = int(wider.split("-")[1])
        weights.widen_(*place, widening(width // 2, width, extra=step["extra"]))
        yield WIDER if place == (1, 0) else WIDENINGS, now()
    before = now()
    weights.deepen_(0, 0, 3, output_statistics(before, before.blocks[0][0], images()), eps=1e-5)
    tokens.insert(1, "conv-4-3")
    yield DEEPER, now()
    before = now()
    weights.deepen_(4, 0, None, output_statistics(before, before.blocks[4][0], images()), eps=1e-5)
    tokens.append("fc-16")
    yield FC, now()


def test_the_published_chain_keeps_the_function_with_exact_sizes():
    chain = list(grown_plain())
    start, first = chain[0][1], chain[1][1]
    sizes = [params(network) for _, network in chain]
    assert [sizes[0], sizes[1], *sizes[3:]] == [710, 1006, 1350, 1502, 1790]
    for case, network in chain[1:]:
        assert difference(network, start) < 1e-9
        expected = GOLDEN[case]["expected"]["params_trainable"]
        assert params(network) == expected or (case == WIDENINGS and network is chain[2][1])
    expected = GOLDEN[WIDER]["expected"]
    assert tuple(first.blocks[1][0].linear.weight.permute(2, 3, 1, 0).shape) == tuple(expected["new_kernel_shape"])
    kernel = first.blocks[2][0].linear.weight.detach()
    assert float(kernel.sum()) == pytest.approx(expected["next_kernel_sum"], abs=1e-9)
    assert float(kernel.abs().sum()) == pytest.approx(expected["next_kernel_abs_sum"], abs=1e-9)
    norm = chain[4][1].blocks[0][1].norm
    np.testing.assert_allclose(norm.weight.detach(), GOLDEN[DEEPER]["expected"]["gamma"], atol=1e-7)
    np.testing.assert_allclose(norm.bias.detach(), GOLDEN[DEEPER]["expected"]["beta"], atol=1e-7)


def test_in_float32_the_chain_keeps_the_function_to_1e_5():
    chain = [network.float() for _, network in grown_plain()]
    assert all(difference(network, chain[0], images().float()) < 1e-5 for network in chain)


def test_a_new_layer_alone_in_training_mode_keeps_the_function_of_its_statistics_batch():
    chain = list(grown_plain())
    deeper = chain[4][1]
    deeper.blocks[0][1].norm.train()
    assert difference(deeper, chain[0][1]) < 1e-5


def test_the_published_dense_transforms_keep_the_function():
    network = filled_dense(DENSE.build(DENSE.space.start()))
    weights = DenseWeights(network.state_dict())
    given = GOLDEN[DENSE_WIDER]["input"]
    copies = widening(16, 24, extra=given["bottleneck_extra"]), widening(4, 6, extra=given["branch_extra"])
    weights.widen_(0, 0, *copies)
    wider = loaded(DenseNetwork(3, 8, ((6,), (4,), (4,)), (6, 5), 10), weights)
    assert params(wider) == GOLDEN[DENSE_WIDER]["expected"]["params_trainable"]
    assert difference(wider, network) < 1e-9
    weights.insert_(0, 0, torch.tensor(GOLDEN[DENSE_DEEPER]["input"]["remap"]))
    deeper = loaded(DenseNetwork(3, 8, ((6, 6), (4,), (4,)), (6, 5), 10), weights)
    assert params(deeper) == GOLDEN[DENSE_DEEPER]["expected"]["params_trainable"]
    assert difference(deeper, network) < 1e-9
    weights.widen_stem_(widening(8, 12, generator=torch.Generator().manual_seed(0)))
    weights.widen_transition_(0, widening(6, 9, generator=torch.Generator().manual_seed(1)))
    settled = loaded(DenseNetwork(3, 12, ((6, 6), (4,), (4,)), (9, 5), 10), weights)
    assert difference(settled, network) < 1e-9


def test_no_consumer_of_a_miniblock_may_be_forgotten():
    """Undoing the change of any single reader of a widened miniblock breaks the function or does not even load."""
    family = DENSE
    start = family.space.of_growths([[4, 4, 4], [4], [4]])
    network = family.build(start, seed=0).double().eval()
    worn(network)
    weights = DenseWeights(network.state_dict())
    weights.widen_(0, 0, widening(16, 16), widening(4, 4))
    assert difference(loaded(family.build(start), weights), network) < 1e-12
    weights.insert_(0, 0, torch.tensor([0, 0, 1, 3]))
    larger = family.space.of_growths([[4, 4, 4, 4], [4], [4]])
    readers = ["blocks.0.2.conv1.weight", "blocks.0.3.conv1.weight", "transitions.0.conv.weight"]
    readers += [f"blocks.0.{i}.norm1.running_mean" for i in (2, 3)] + ["transitions.0.norm.weight"]
    grown = DenseNetwork(3, 8, ((4, 4, 4, 4), (4,), (4,)), family.space.dense(start).transitions, 10)
    assert difference(loaded(grown, weights), network) < 1e-12
    assert family.space.dense(larger).growths[0] == (4, 4, 4, 4)
    for name in readers:
        spoiled = dict(weights.state_dict())
        value = spoiled[name].clone()
        axis = 1 if value.dim() > 1 else 0
        spoiled[name] = value.roll(1, dims=axis)
        grown.load_state_dict(spoiled)
        assert difference(grown, network) > 1e-6, name


@torch.no_grad()
def worn(network):
    generator = torch.Generator().manual_seed(1)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return network


def walks(family, seed, edits=12):
    """Return a parent, and a child by random edits as the controller might choose them."""
    rng, space = np.random.default_rng(seed), family.space
    parent = architecture = space.start()
    done = []
    for _ in range(edits):
        if rng.random() < 0.5:
            options = [edit for edit in space.widenings(architecture) if edit is not None]
            new = [options[int(rng.integers(len(options)))]]
        else:
            chosen: list[int] = []
            while len(chosen) < len(space.heads):
                mask = space.deepening_mask(architecture, chosen)
                mask = [True] if mask is None else mask
                chosen.append(int(rng.choice(np.flatnonzero(mask))))
            new = [space.deepening(architecture, chosen)]
        architecture = space.grown(architecture, new)
        done += new
    settled = space.settling(architecture)
    return parent, space.grown(architecture, settled), [*done, *settled]


@pytest.mark.parametrize("family", [PLAIN, DENSE], ids=["plain", "dense"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("given", [True, False], ids=["edits", "matched"])
def test_inherited_weights_keep_the_function(family, seed, given):
    parent, child, edits = walks(family, seed)
    network = worn(family.build(parent, seed=seed).double().eval())
    stream = torch.get_rng_state()
    weights = family.inherit(
        network.state_dict(),
        parent,
        child,
        edits=edits if given else None,
        examples=images(),
        generator=torch.Generator().manual_seed(seed),
    )
    assert torch.equal(torch.get_rng_state(), stream)  # whoever uses torch's own stream notices nothing
    grown = family.build(child).double().eval()
    grown.load_state_dict(weights)
    assert difference(grown, network) < 1e-9
    assert params(grown) == family.exact_costs(child)["params"] > params(network)
    again = family.build(parent).double()
    again.load_state_dict(network.state_dict())  # the parent's tensors were not touched
    assert difference(again.eval(), network) == 0


def test_inheriting_from_a_grown_network_goes_on():
    _, child, _ = walks(PLAIN, 5, edits=6)
    network = worn(PLAIN.build(child, seed=0).double().eval())
    larger = PLAIN.space.grown(child, [edit for edit in PLAIN.space.widenings(child) if edit is not None])
    weights = PLAIN.inherit(network.state_dict(), child, larger, examples=images())
    assert difference(loaded_plain(larger, weights), network) < 1e-9


def loaded_plain(architecture, weights):
    network = PLAIN.build(architecture).double().eval()
    network.load_state_dict(weights)
    return network


def test_noise_is_small_and_breaks_the_symmetry():
    noisy = PlainFamily(image=(3, 32, 32), num_classes=10)
    space = noisy.space
    child = space.grown(space.start(), [("widen", 1, 0, 8), ("deepen", 0, 0, 3)])
    network = noisy.build(space.start(), seed=0).double().eval()
    spread = {}
    for family in (noisy, PLAIN):
        generator = torch.Generator().manual_seed(2)
        weights = family.inherit(network.state_dict(), space.start(), child, examples=images(), generator=generator)
        grown = loaded_plain(child, weights)
        kernels = grown.blocks[1][0].linear.weight
        assert difference(grown, network) < 0.1
        (grown.train()(images()) ** 2).sum().backward()
        source = widening(4, 8, generator=torch.Generator().manual_seed(2)).source
        first = kernels.grad[source[4]]
        spread[family.widen_noise] = float((kernels.grad[4] - first).abs().max()) / float(first.abs().max())
    assert spread[0.0] < 1e-9 < 1e-4 < spread[0.01]


def test_weights_of_unrelated_networks_are_refused():
    space = PLAIN.space
    start = space.start()
    wide = space.grown(start, [("widen", 0, 0, 8)])
    tensors = PLAIN.build(wide, seed=0).state_dict()
    with pytest.raises(UserError, match=r"inherited weights: got those of conv-8-3 .*; allowed: weights of a network"):
        PLAIN.inherit(tensors, wide, start, examples=images().float())
    with pytest.raises(UserError, match="inherited weights"):
        PLAIN.inherit(tensors, wide, wide, edits=[("widen", 0, 0, 12)], examples=images().float())
    with pytest.raises(UserError, match="the state_dict of a PlainNetwork"):
        PlainWeights({"a": torch.zeros(1)})
    with pytest.raises(UserError, match="the state_dict of a DenseNetwork"):
        DenseWeights({"a": torch.zeros(1)})
    with pytest.raises(UserError, match="4 outputs of the old miniblock"):
        DenseWeights(DENSE.build(DENSE.space.start()).state_dict()).insert_(0, 0, torch.tensor([0]))


def test_statistics_are_those_of_the_eval_mode_output():
    network = filled_plain(PLAIN.build(PLAIN.space.start()))
    with torch.no_grad():
        output = network.blocks[0][0](images())
    expected = channel_statistics(output)
    found = output_statistics(network.train(), network.blocks[0][0], images())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert isinstance(network, PlainNetwork)


def test_settings_and_errors():
    with pytest.raises(UserError, match="family: got 'other'; allowed: plain"):
        open_plain("other", image=(1, 8, 8), num_classes=2)
    with pytest.raises(UserError, match="family: got 'other'; allowed: densenet"):
        open_dense("other", image=(1, 8, 8), num_classes=2)
    with pytest.raises(UserError, match=r"family: got \['width'\]; allowed: filters, units"):
        open_plain("plain", image=(1, 8, 8), num_classes=2, width=3)
    with pytest.raises(UserError, match="numbers from 0; 0 is exact"):
        open_plain("plain", image=(1, 8, 8), num_classes=2, widen_noise=-1)
    with pytest.raises(UserError, match=r"family\.bottleneck"):
        DenseFamily(image=(1, 8, 8), num_classes=2, bottleneck=0)
    other = DenseNetwork(3, 8, ((4,), (4,)), (5,), 10)
    family = DenseFamily(image=(3, 8, 8), num_classes=10, space=DenseSpace(blocks=2))
    with pytest.raises(UserError, match=r"network\.transitions: got \(5,\); allowed: \(6,\)"):
        family.architecture_of(other)
    with pytest.raises(ValueError, match="one between each two of 2 blocks"):
        DenseNetwork(3, 8, ((4,), (4,)), (), 10)
    assert PlainFamily(image=(1, 8, 8), num_classes=2) != open_plain("plain", image=(1, 8, 8), num_classes=2, depth=3)

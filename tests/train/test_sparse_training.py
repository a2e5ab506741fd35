import torch
from torch import nn

from archsmith.layers.sparse import SparseConv2d, SparseLinear, masks, set_keep_
from archsmith.train.sparse import hold_dropped_, learn_scores_, learn_weights_


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        SparseConv2d(3, 8, 3, padding=1, keep=0.2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SparseLinear(8, 4, keep=0.25),
    )


def learning(net):
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_what_learns():
    net = network()
    everything = {name for name, _ in net.named_parameters()}
    scores = {"0.score", "5.score"}
    learn_weights_(net)
    assert learning(net) == everything - scores
    learn_scores_(net)
    assert learning(net) == scores | {"1.weight", "1.bias"}
    learn_scores_(net, norms=False)
    assert learning(net) == scores


def test_dropped_weights_are_not_moved_and_kept_ones_are():
    net, x = network(), torch.rand(4, 3, 6, 6)
    learn_weights_(net)
    before = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, 0.9, weight_decay=0.1)
    hold_dropped_(optimizer, net)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        for name, mask in masks(net).items():
            assert not net.get_submodule(name).weight.grad[mask == 0].any()
        optimizer.step()
    for name, mask in masks(net).items():
        now, then = net.get_submodule(name).weight, before[f"{name}.weight"]
        assert torch.equal(now[mask == 0], then[mask == 0])
        assert bool((now[mask == 1] != then[mask == 1]).all())
        assert torch.equal(net.get_submodule(name).score, before[f"{name}.score"])
    assert not torch.equal(net[5].bias, before["5.bias"])


def test_without_a_mask_nothing_is_held():
    net, x = network(), torch.rand(4, 3, 6, 6)
    set_keep_(net, 1.0)
    learn_weights_(net)
    before = net[0].weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    hold_dropped_(optimizer, net)
    net(x).square().sum().backward()
    optimizer.step()
    assert bool((net[0].weight != before).any())

"""Export: what a graph says about a module, and that the module does not notice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archsmith.core.errors import UserError
from archsmith.graph import as_inputs, evaluating, export_graph


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 2))


def test_nodes_of_a_small_network():
    graph = export_graph(small_net(), torch.zeros(2, 3, 4, 4))
    calls = [node for node in graph.nodes if node.kind == "call"]
    assert [node.operator.split(".")[1] for node in calls] == ["conv2d", "batch_norm", "relu_", "flatten", "linear"]
    assert [node.module for node in calls] == ["0", "1", "2", "3", "4"]
    assert calls[0].values[0].shape == (2, 4, 2, 2) and calls[0].values[0].dtype == "float32"
    assert calls[1].storages == calls[2].storages == calls[3].storages != calls[4].storages
    assert [graph.storage_bytes[s] for s in graph.outputs] == [2 * 2 * 4]
    weights_and_statistics = [4 * 27, 4, 4, 4, 4, 4, 32, 2]
    tracked = 8
    assert sum(graph.storage_bytes[s] for s in graph.state) == 4 * sum(weights_and_statistics) + tracked
    assert [node.kind for node in graph.nodes].count("input") == 1 and graph.nodes[-1].kind == "output"


def test_module_is_left_as_it_is():
    net = small_net()
    net[1].eval()
    net[0].train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    export_graph(net, torch.ones(2, 3, 4, 4), training=True)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_meta_module_takes_real_inputs():
    with torch.device("meta"):
        net = small_net()
    real = export_graph(small_net(), torch.zeros(1, 3, 4, 4))
    assert export_graph(net, torch.zeros(1, 3, 4, 4)).storage_bytes == real.storage_bytes


def test_tied_weights_share_a_storage():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert len(export_graph(net, torch.zeros(1, 4)).state) == 1


def test_evaluating_restores_after_an_error():
    net = small_net().train()
    net[1].eval()
    with pytest.raises(RuntimeError), evaluating(net):
        assert not any(module.training for module in net.modules())
        raise RuntimeError
    assert [module.training for module in net] == [True, False, True, True, True] and net.training


SOMETIMES_VIEWS = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "dropout in training": lambda x: F.dropout(x, 0.5, training=True),
    "dropout2d": lambda x: F.dropout2d(x, 0.5, training=False),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "reshape": lambda x: x.reshape(4, -1),
    "reshape of transposed": lambda x: x.transpose(0, 1).reshape(-1),
    "flatten": lambda x: x.flatten(1),
    "contiguous": lambda x: x.contiguous(),
    "contiguous of transposed": lambda x: x.transpose(0, 1).contiguous(),
    "to same": lambda x: x.to(torch.float32),
    "to other": lambda x: x.double(),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "pad nothing": lambda x: F.pad(x, (0, 0)),
    "crop": lambda x: F.pad(x, (-1, 0)),
    "split": lambda x: x.split(2, 1)[1],
    "index": lambda x: x[:, [0, 1]],
    "slice": lambda x: x[:, 1:],
    "repeat once": lambda x: x.repeat(1, 1, 1, 1),
    "concatenate one": lambda x: torch.cat([x]),
    "einsum permute": lambda x: torch.einsum("bchw->bhwc", x),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "adaptive pool same size": lambda x: F.adaptive_avg_pool2d(x, 4),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "identity": lambda x: nn.Identity()(x),
}


@pytest.mark.parametrize("name", SOMETIMES_VIEWS)
def test_views_and_copies_are_those_of_the_real_execution(name):
    function = SOMETIMES_VIEWS[name]
    x = torch.randn(2, 4, 4, 4)
    shares = function(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()

    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    graph = export_graph(Net(), x, training=True)
    (given,) = [s for node in graph.nodes if node.kind == "input" for s in node.storages]
    assert (graph.outputs == {given}) == shares


class Remembers(nn.Module):
    def forward(self, x):
        self.last = x.exp()
        return self.last + 1


def test_attributes_that_forward_assigns_do_not_stay(recwarn):
    net = Remembers()
    export_graph(net, torch.zeros(3))
    assert not hasattr(net, "last") and not recwarn.list


class LooksAtData(nn.Module):
    def forward(self, x):
        return x.exp() if x.sum() > 0 else x


class DataDependentShape(nn.Module):
    def forward(self, x):
        return x[x > 0].exp()


def test_refusals(capsys):
    with pytest.raises(UserError, match=r"module: got LooksAtData, which torch.export refuses .*data-dependent"):
        export_graph(LooksAtData(), torch.zeros(3))
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"no fixed dense size"):
        export_graph(DataDependentShape(), torch.zeros(3))
    with pytest.raises(UserError, match=r"inputs: got \(3,\); allowed: a tensor"):
        as_inputs(nn.Identity(), (3,))

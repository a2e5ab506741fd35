"""Cells whose nodes are computed at once: what comes out, every gradient and every statistic, against the plain sum."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.families.cells import NasBench201Family
from archsmith.families.darts import DartsFamily
from archsmith.supernet import MixedOp, Relaxation, Softmax, batch_statistics, fused
from archsmith.supernet.fused import NodeSums, fusible


def darts(side=16, **changes):
    family = DartsFamily(image=(3, side, side), num_classes=4, channels=4, cells=3, nodes=2)
    return family.relaxed(seed=0, **changes).double()


def nas_bench_201(side=8, **changes):
    family = NasBench201Family(image=(3, side, side), num_classes=4, channels=4, cells=1)
    return family.relaxed(seed=0, **changes).double()


def worn(supernet):
    """Return the supernet with other statistics and clearer logits than at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, buffer in supernet.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
        for logits in supernet.logits.values():
            logits.add_(torch.randn_like(logits))
    return supernet


def evaluated(supernet, side, monkeypatch, *, at_once, mixing=None, exact=False):
    """Return the loss, the gradients of everything and the buffers after one call."""
    supernet = copy.deepcopy(supernet)
    asked = []
    monkeypatch.setattr(fused, "fusible", lambda *a: asked.append(1) or (at_once and fusible(*a)))
    torch.manual_seed(0)
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    logits = supernet(images) if mixing is None else supernet(images, mixing)
    assert asked
    loss = functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
    tensors = [*supernet.weights().values(), *supernet.logits.values()]
    if exact:
        first = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        loss = loss + sum(g.square().sum() for g in first if g is not None)
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [loss, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True))], [
        buffer for _, buffer in supernet.named_buffers()
    ]


def assert_equal_evaluations(supernet, side, monkeypatch, **options):
    plain, plain_buffers = evaluated(supernet, side, monkeypatch, at_once=False, **options)
    found, buffers = evaluated(supernet, side, monkeypatch, at_once=True, **options)
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(buffers, plain_buffers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


NETWORKS = {
    "darts": lambda: (darts(16), 16),
    "sides that are odd in the end": lambda: (darts(12), 12),
    "weights of edges": lambda: (darts(8, edge_weights=True), 8),
    "nas-bench-201": lambda: (nas_bench_201(), 8),
    "nas-bench-201 with edge weights": lambda: (nas_bench_201(edge_weights=True), 8),
    "affine": lambda: (nas_bench_201(affine=True), 8),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_search_network_as_it_is_trained(network, monkeypatch):
    supernet, side = NETWORKS[network]()
    assert_equal_evaluations(worn(supernet).train(), side, monkeypatch)


@pytest.mark.parametrize("make", [darts, nas_bench_201])
def test_other_modes(make, monkeypatch):
    supernet = worn(make(8))
    assert_equal_evaluations(supernet.eval(), 8, monkeypatch)
    with batch_statistics(supernet):
        assert_equal_evaluations(supernet, 8, monkeypatch)
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a cumulative average
    assert_equal_evaluations(supernet.train(), 8, monkeypatch)


@pytest.mark.parametrize("make", [darts, nas_bench_201])
def test_decided_edges_and_paths(make, monkeypatch):
    supernet = worn(make(8)).train()
    path = supernet.path(supernet.derive())
    assert_equal_evaluations(supernet, 8, monkeypatch, mixing=path)
    group = next(iter(supernet.options))
    supernet.fix_(group, 0, "skip_connect")
    supernet.fix_(group, 1, "none")
    supernet.fix_(group, 2, None)
    assert_equal_evaluations(supernet, 8, monkeypatch)
    nothing = {name: torch.zeros_like(row) for name, row in path.items()}
    assert_equal_evaluations(supernet, 8, monkeypatch, mixing=nothing)


@pytest.mark.parametrize("make", [darts, nas_bench_201])
def test_second_derivatives(make, monkeypatch):
    assert_equal_evaluations(worn(make(8)).train(), 8, monkeypatch, exact=True)


class Doubled(Relaxation):
    """Softmax that mixes in a way of its own."""

    def weights(self, logits_EO, generator=None):
        return logits_EO.softmax(-1)

    def mix(self, x, candidates, weights_O):
        return 2 * super().mix(x, candidates, weights_O)


class Half(nn.Module):
    """An edge around a mixed operation."""

    def __init__(self, mixed):
        super().__init__()
        self.mixed = mixed

    def forward(self, x, weights):
        return 0.5 * self.mixed(x, weights)


def test_relaxations_and_edges_of_another_kind(monkeypatch):
    assert_equal_evaluations(worn(darts(8, relaxation=Doubled())), 8, monkeypatch)
    wrapped = darts(8, make_edge=lambda candidates, channels, stride: Half(MixedOp(candidates(channels))))
    assert_equal_evaluations(worn(wrapped), 8, monkeypatch)


def test_changed_layers_are_called(monkeypatch):
    """Convolutions of another class, another activation and another pooling stay what they are."""
    supernet = worn(nas_bench_201())

    class Shifted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + x

    for module in supernet.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.in_channels == module.out_channels:
            module.__class__ = Shifted
    for name, module in list(supernet.named_modules()):
        if type(module) is nn.ReLU and "nor_conv_3x3" in name:
            parent = supernet.get_submodule(name.rpartition(".")[0])
            parent.relu = nn.GELU()
        if type(module) is nn.AvgPool2d and "edges" in name:
            module.count_include_pad = True
    assert_equal_evaluations(supernet, 8, monkeypatch)


def test_hooks_see_every_module(monkeypatch):
    supernet = nas_bench_201()
    cell = supernet.network.skeleton.stages[0][0]
    seen = []
    cell.edges[0].candidates["nor_conv_3x3"].conv.register_forward_hook(lambda *a: seen.append(1))
    assert not fusible(cell.edges, [torch.rand(1, 4, 8, 8)])
    assert fusible(supernet.network.skeleton.stages[1][0].edges, [torch.rand(1, 8, 4, 4)])
    supernet(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    assert seen == [1]


def test_where_nodes_are_not_computed_at_once():
    x = torch.rand(2, 4, 8, 8)
    assert fusible([], [x])
    assert not fusible([], [x.bfloat16()]) and not fusible([], [x.to("meta")])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fusible([], [x])
    inside = []
    torch.func.grad(lambda y: (inside.append(fusible([], [y])), y.sum())[1])(x)
    assert inside == [False]


def test_what_edges_have_in_common_is_computed_once():
    supernet = darts(8)
    with torch.profiler.profile() as profile:
        supernet(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    calls = {event.key: event.count for event in profile.key_averages()}
    # Of the two nodes of three cells only the first is read again: three states of each cell.
    assert calls["aten::max_pool2d_with_indices"] == calls["aten::avg_pool2d"] == 3 * 3


def test_fast_gradients_in_float32_are_as_near_to_float64_as_the_plain_ones(monkeypatch):
    exact = worn(darts(16))
    images = torch.randn(8, 3, 16, 16)
    results = {}
    for name, at_once in (("plain", False), ("at once", True), ("exact", False)):
        monkeypatch.setattr(fused, "fusible", lambda *a, at_once=at_once: at_once)
        dtype = torch.float64 if name == "exact" else torch.float32
        supernet = copy.deepcopy(exact).to(dtype)
        loss = functional.cross_entropy(supernet(images.to(dtype)), torch.arange(8) % 4)
        gradients = torch.autograd.grad(loss, [*supernet.logits.values(), *supernet.weights().values()])
        results[name] = torch.cat([gradient.flatten().double() for gradient in gradients])
    far = {name: float((results[name] - results["exact"]).norm()) for name in ("plain", "at once")}
    assert far["at once"] <= 3 * far["plain"] <= 0.01 * float(results["exact"].norm())


def test_errors_are_those_of_mixed_operations():
    edges = nn.ModuleList([MixedOp({"same": nn.Identity(), "smaller": nn.AvgPool2d(2)}, Softmax())])
    x = torch.rand(2, 4, 8, 8)
    with pytest.raises(UserError, match="operations that all give the same shape"):
        NodeSums(edges, [x])([x], edges, [torch.tensor([0.5, 0.5])])
    with pytest.raises(UserError, match="one for each of same, smaller"):
        NodeSums(edges, [x])([x], edges, [torch.tensor([0.5])])

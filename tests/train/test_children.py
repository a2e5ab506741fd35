"""Many children, one optimiser step."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.supernet.elastic import Elastic
from archsmith.supernet.sampling import Child, Sandwich, Uniform
from archsmith.train.children import ChildrenStep, decayed_weights, train_mode_
from archsmith.train.distill import soft_cross_entropy
from archsmith.train.loop import Diverged
from tests.elastic_samples import Mlp, SmallResNet


def mlp() -> tuple[Elastic, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    return Elastic(Mlp().double(), x.double(), {"width": [0.25, 0.5, 1.0]}), x.double(), torch.arange(8) % 3


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_gradients_are_the_sum_over_the_children_that_contain_them() -> None:
    elastic, x, y = mlp()
    children = Sandwich(elastic, 4).children(np.random.default_rng(3))
    step = ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0))
    figures = step(children, lambda forward: F.cross_entropy(forward(x), y))
    found = gradients(elastic.model)

    wanted = {name: torch.zeros_like(p) for name, p in elastic.model.named_parameters()}
    teacher = elastic.extract(children[0].architecture)(x).detach()
    losses = []
    for number, child in enumerate(children):
        alone = elastic.extract(child.architecture)
        logits = alone(x)
        loss = F.cross_entropy(logits, y) if number == 0 else soft_cross_entropy(logits, teacher)
        loss.backward()
        losses.append(loss.item())
        for name, p in alone.named_parameters():
            wanted[name][tuple(slice(n) for n in p.shape)] += p.grad  # first units: a corner of each tensor
    assert figures.losses == pytest.approx(losses, abs=1e-10) and figures.labels[1:] == (None, None, None)
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], atol=1e-10), name


def test_units_of_the_largest_alone_learn_from_the_labels_alone() -> None:
    elastic, x, y = mlp()
    children = Sandwich(elastic, 2).children(np.random.default_rng(0))
    ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0))(
        children, lambda forward: F.cross_entropy(forward(x), y)
    )
    both = gradients(elastic.model)
    elastic.zero_grad()
    F.cross_entropy(elastic.model(x), y).backward()
    labels = gradients(elastic.model)
    assert torch.allclose(both["enter.weight"][4:], labels["enter.weight"][4:], atol=1e-12)
    assert not torch.allclose(both["enter.weight"][:4], labels["enter.weight"][:4])


def test_the_optimiser_steps_once_and_every_parameter_is_whole() -> None:
    elastic, x, y = mlp()
    optimizer = torch.optim.Adam(elastic.parameters(), lr=1e-2)
    step = ChildrenStep(elastic, optimizer, clip_norm=0.1)
    shapes = [p.shape for p in elastic.model.parameters()]
    rule = Sandwich(elastic, 4)
    losses = []
    for number in range(30):
        figures = step(rule.children(np.random.default_rng(number)), lambda forward: F.cross_entropy(forward(x), y))
        losses.append(figures.labels[0])
        assert figures.norm is not None
    assert losses[-1] < losses[0] - 0.2  # type: ignore[operator]
    assert [p.shape for p in elastic.model.parameters()] == shapes
    assert all(int(state["step"]) == 30 for state in optimizer.state.values())


def test_weight_decay_belongs_to_the_regularised_pass() -> None:
    elastic, x, y = mlp()
    children = Sandwich(elastic, 3).children(np.random.default_rng(0))

    def loss(forward: Any) -> Tensor:
        return F.cross_entropy(forward(x), y)

    ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0))(children, loss)
    plain = gradients(elastic.model)
    ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0), weight_decay=0.3)(children, loss)
    decayed = gradients(elastic.model)
    for name, p in elastic.model.named_parameters():
        share = 0.3 if p.dim() > 1 else 0.0
        assert torch.allclose(decayed[name], plain[name] + share * p.detach(), atol=1e-12), name
    free = [Child(architecture=c.architecture, labels=1.0) for c in children]
    ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0), weight_decay=0.3)(free, loss)
    with_free = gradients(elastic.model)
    ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0))(free, loss)
    assert all(torch.equal(with_free[name], g) for name, g in gradients(elastic.model).items())


def test_normalisations_and_biases_are_not_decayed() -> None:
    net = SmallResNet()
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in decayed_weights(net)} == {name for name, p in net.named_parameters() if p.dim() > 1}


def test_dropout_is_on_in_regularised_passes_alone_and_normalisation_is_by_batch() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.TransformerEncoderLayer(4, 2, 8, 0.5))
    train_mode_(net, regularised=False)
    assert net[1].training and not net[2].training and not net[3].training and not net[3].dropout.training
    train_mode_(net, regularised=True)
    assert net[1].training and net[2].training and net[3].dropout.training


def test_running_statistics_are_not_accumulated() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    elastic = Elastic(SmallResNet(2), x)
    step = ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.01))
    step(Sandwich(elastic, 3).children(np.random.default_rng(0)), lambda forward: F.cross_entropy(forward(x), y))
    assert torch.equal(elastic.model.bn.running_mean, torch.zeros(8))  # type: ignore[union-attr]


def test_one_graph_is_alive_at_a_time_and_the_teacher_gets_no_gradient() -> None:
    elastic, x, y = mlp()
    graphs: list[weakref.ref[Tensor]] = []

    def distance(student: Tensor, target: Tensor) -> Tensor:
        assert not target.requires_grad
        gc.collect()
        assert not any(ref() is not None for ref in graphs), "the graph of an earlier child is alive"
        graphs.append(weakref.ref(student))
        return soft_cross_entropy(student, target)

    step = ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0), distance=distance)
    step(Sandwich(elastic, 4).children(np.random.default_rng(0)), lambda forward: F.cross_entropy(forward(x), y))
    assert len(graphs) == 3


def test_a_teacher_outside_teaches_with_its_own_weight() -> None:
    elastic, x, y = mlp()
    torch.manual_seed(7)
    teacher = Mlp().double().eval()
    child = Child(architecture=elastic.smallest(), labels=0.3, teacher=0.7)
    step = ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0), teacher=teacher)
    figures = step([child], lambda forward: F.cross_entropy(forward(x), y))
    logits = elastic.extract(elastic.smallest())(x)
    wanted = 0.3 * F.cross_entropy(logits, y) + 0.7 * soft_cross_entropy(logits, teacher(x))
    assert figures.losses[0] == pytest.approx(wanted.item(), abs=1e-10)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_that_is_no_number_takes_no_step() -> None:
    elastic, x, y = mlp()
    before = [p.detach().clone() for p in elastic.parameters()]
    step = ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.1))
    with pytest.raises(Diverged):
        step(
            Uniform(elastic).children(np.random.default_rng(0)),
            lambda forward: F.cross_entropy(forward(x), y) * float("nan"),
        )
    assert all(torch.equal(a, b) for a, b in zip(before, elastic.parameters(), strict=True))


def test_children_and_options_that_do_not_fit_are_refused() -> None:
    elastic, x, y = mlp()
    optimizer = torch.optim.SGD(elastic.parameters(), lr=0.0)
    step = ChildrenStep(elastic, optimizer)
    whole = elastic.largest()

    def loss(forward: Any) -> Tensor:
        return F.cross_entropy(forward(x), y)

    for children, text in (
        ([], "at least one child"),
        ([Child(architecture=whole, inplace=1.0)], "the first child shows the inputs"),
        ([Child(architecture=whole, labels=1.0), Child(architecture=whole)], "a weight above 0 on labels"),
        (
            [Child(architecture=whole, labels=1.0), Child(architecture=whole, inplace=1.0)],
            "before a child that teaches",
        ),
        ([Child(architecture=whole, labels=1.0, teacher=1.0)], "without a teacher"),
    ):
        with pytest.raises(UserError, match=text):
            step(children, loss)
    with pytest.raises(UserError, match="calls what it is given"):
        step([Child(architecture=whole, labels=1.0)], lambda forward: torch.zeros((), requires_grad=True))
    with pytest.raises(UserError, match="weight_decay"):
        ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.1, weight_decay=0.1), weight_decay=0.1)
    with pytest.raises(UserError, match="clip_norm"):
        ChildrenStep(elastic, optimizer, clip_norm=-1.0)

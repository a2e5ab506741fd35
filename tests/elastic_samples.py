"""Networks for the tests of elastic supernets, and what every one of them must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from archsmith.atoms.trace import call_arguments
from archsmith.supernet.elastic import Elastic


def outputs(model: nn.Module, inputs: Any, forward: Callable[..., Any] | None = None) -> list[Tensor]:
    """Return the floating outputs without gradient."""
    args, kwargs = call_arguments(model, inputs)
    with torch.no_grad():
        found = model(*args, **kwargs) if forward is None else forward(model, *args, **kwargs)
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def gap(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest number."""
    assert first and len(first) == len(second)
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    return worst


class Mlp(nn.Module):
    """Two hidden layers and a residual one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.hidden, self.leave = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.hidden(torch.relu(self.enter(x)))))


class Basic(nn.Module):
    """A residual block of two convolutions; a stride or another width has a convolution on the shortcut."""

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Sequential()
        if stride > 1 or before != width:
            self.short = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.short(x) + y)


class SmallResNet(nn.Module):
    """Stem, two stages of residual blocks, head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(*(Basic(8, 8) for _ in range(blocks)))
        self.layer2 = nn.Sequential(Basic(8, 16, 2), *(Basic(16, 16) for _ in range(blocks - 1)))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(F.relu(self.bn(self.stem(x))))).mean((2, 3)))


class Inverted(nn.Module):
    """MobileNet's block with squeeze and excitation."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.reduce, self.widen = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)
        self.project, self.bn3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn2(self.depthwise(F.hardswish(self.bn1(self.expand(x))))))
        y = y * F.hardsigmoid(self.widen(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return x + self.bn3(self.project(y))


class SmallMobile(nn.Module):
    """Stem, inverted residuals with kernels of 5, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(Inverted(8, 24, 5) for _ in range(3)))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.hardswish(self.bn(self.stem(x)))).mean((2, 3)))


def architectures(elastic: Elastic, number: int = 4, seed: int = 0) -> list[Any]:
    """Return the smallest, the largest and random architectures."""
    rng = np.random.default_rng(seed)
    return [elastic.smallest(), elastic.largest(), *(elastic.space.sample(rng) for _ in range(number))]


def keeps_the_contract(
    elastic: Elastic, inputs: Any, forward: Callable[..., Any] | None = None, number: int = 4
) -> None:
    """Check that the active path is the extracted network: outputs, gradients, costs; the rest gets no gradient."""
    model = elastic.model
    whole = outputs(model, inputs, forward)
    elastic.activate(elastic.largest())
    assert all(torch.equal(a, b) for a, b in zip(outputs(elastic, inputs), whole, strict=True))
    names = list(model.state_dict())
    smaller = 0
    for architecture in architectures(elastic, number):
        elastic.activate(architecture)
        active = outputs(elastic, inputs)
        alone = elastic.extract(architecture)
        at = elastic.resized(inputs, architecture["resolution"]) if "resolution" in architecture else inputs
        assert gap(outputs(alone, at, forward), active) < 1e-5
        params = sum(p.numel() for p in alone.parameters())
        assert elastic.costs(architecture)["params"] == params
        smaller += params < sum(p.numel() for p in model.parameters())
        if architecture != elastic.largest() and "resolution" not in architecture:
            assert gap(active, whole) > 1e-6, "the smaller network computes the same as the whole"
        gradients_agree(elastic, alone, inputs, forward)
        assert list(model.state_dict()) == names
    assert smaller
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs, forward), whole, strict=True))


def gradients_agree(elastic: Elastic, alone: nn.Module, inputs: Any, forward: Callable[..., Any] | None) -> None:
    """Check that every gradient of the extracted network is in the whole one, and all the rest is exactly zero."""
    args, kwargs = call_arguments(elastic.model, inputs)
    elastic.zero_grad()
    loss(elastic(*args, **kwargs)).backward()
    total = sum(float(p.grad.abs().sum()) for p in elastic.model.parameters() if p.grad is not None)
    nonzero = sum(int((p.grad != 0).sum()) for p in elastic.model.parameters() if p.grad is not None)
    alone.zero_grad()
    at = elastic.resized((args, kwargs), elastic.active["resolution"]) if "resolution" in elastic.active else None
    args, kwargs = at or (args, kwargs)
    loss(alone(*args, **kwargs) if forward is None else forward(alone, *args, **kwargs)).backward()
    own = sum(float(p.grad.abs().sum()) for p in alone.parameters() if p.grad is not None)
    count = sum(int((p.grad != 0).sum()) for p in alone.parameters() if p.grad is not None)
    kernels = any(dim.kind == "kernel" for dim in elastic.dims) and len(elastic.elastic_transforms) > 0
    if not kernels:  # a learned transform spreads the gradient of a kernel by its matrix
        assert abs(total - own) <= 1e-3 * own and abs(nonzero - count) <= 0.01 * count
        elements = sum(p.numel() for p in alone.parameters())
        assert nonzero <= elements
    elastic.zero_grad()


def loss(found: Any) -> Tensor:
    """Return a scalar of all outputs."""
    leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return sum(((leaf.double() + 0.3) ** 2).mean() for leaf in leaves)  # type: ignore[return-value]

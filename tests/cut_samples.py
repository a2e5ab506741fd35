"""Small networks with hand-declared units, for the tests of cuts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.units import Place, UnitGroup


def rows(tensor: str, axis: int, size: int, k: int = 1, offset: int = 0) -> Place:
    """Unit i owns rows ``offset + i * k`` to ``offset + (i + 1) * k - 1`` of one axis."""
    return Place(tensor, (axis,), offset + np.arange(size * k).reshape(size, k))


class Block(nn.Module):
    """Convolution, normalisation, depthwise convolution and a head; widths are free."""

    def __init__(self, a: int = 8, b: int = 6, pixels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, a, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.depth = nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.conv2 = nn.Conv2d(a, b, 1)
        self.bn2 = nn.BatchNorm2d(b)
        self.fc = nn.Linear(b * pixels, 5)
        self.width = a

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(self.depth(x))))
        x = nn.functional.adaptive_avg_pool2d(x, 2)
        return self.fc(x.flatten(1))


def block_groups() -> list[UnitGroup]:
    norm1, norm2 = (
        [rows(f"{bn}.{v}", 0, size) for v in ("weight", "bias", "running_mean", "running_var")]
        for bn, size in (("bn1", 8), ("bn2", 6))
    )
    first = (rows("conv1.weight", 0, 8), *norm1, rows("depth.weight", 0, 8), rows("depth.bias", 0, 8))
    second = (rows("conv2.weight", 0, 6), rows("conv2.bias", 0, 6), *norm2, rows("fc.weight", 1, 6, 4))
    return [UnitGroup("a", 8, (*first, rows("conv2.weight", 1, 8))), UnitGroup("b", 6, second)]


REMOVED = {"a": [0, 5, 6], "b": [2, 3]}
KEPT = {"a": [1, 2, 3, 4, 7], "b": [0, 1, 4, 5]}


def sliced(name: str, tensor: Tensor) -> Tensor:
    """Return what ``REMOVED`` leaves of one tensor of ``Block``, written out by name."""
    a, b = torch.tensor(KEPT["a"]), torch.tensor(KEPT["b"])
    if tensor.dim() == 0:
        return tensor
    if name == "conv2.weight":
        return tensor[b][:, a]
    if name == "fc.weight":
        return tensor.reshape(5, 6, 4)[:, b].reshape(5, 16)
    if name == "fc.bias":
        return tensor
    return tensor[a if name.startswith(("conv1", "bn1", "depth")) else b]


def batches(count: int, seed: int = 0, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 3, 6, 6, generator=generator)
    y = torch.randint(5, (count, size), generator=generator)
    return list(zip(x, y, strict=True))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    dtype = next(model.parameters()).dtype
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

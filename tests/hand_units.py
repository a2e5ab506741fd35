"""Small networks with their removable units written down by hand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsmith.atoms.declared import DeclaredAtoms
from archsmith.atoms.units import Place, UnitGroup

IMAGE = (2, 3, 8, 8)


def along(tensor: str, axis: int, units: int, k: int = 1, offset: int = 0) -> Place:
    """Unit i owns positions offset + i*k ... of one axis."""
    return Place(tensor, (axis,), offset + np.arange(units * k).reshape(units, k))


def vectors(units: int, *names: str) -> tuple[Place, ...]:
    return tuple(along(name, 0, units) for name in names)


def norm(units: int, *names: str) -> tuple[Place, ...]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return tuple(along(f"{name}.{leaf}", 0, units) for name in names for leaf in leaves)


class Branches(nn.Module):
    """A depthwise convolution, two branches, a concatenation, and a linear layer behind a flattening."""

    def __init__(self, stem: int = 8, left: int = 12, right: int = 6) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, stem, 3, padding=1), nn.BatchNorm2d(stem)
        self.dw, self.n2 = nn.Conv2d(stem, stem, 3, padding=1, groups=stem), nn.BatchNorm2d(stem)
        self.c2, self.n3 = nn.Conv2d(stem, left, 3, stride=2, padding=1), nn.BatchNorm2d(left)
        self.c3, self.n4 = nn.Conv2d(stem, right, 1, stride=2), nn.BatchNorm2d(right)
        self.head = nn.Linear((left + right) * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.c1(x)))
        x = F.silu(self.n2(self.dw(x)))
        y = torch.cat([torch.relu(self.n3(self.c2(x))), torch.relu(self.n4(self.c3(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(y, 2).flatten(1))


def branches_groups(stem: int = 8, left: int = 12, right: int = 6) -> list[UnitGroup]:
    return [
        UnitGroup(
            "c1",
            stem,
            (
                along("c1.weight", 0, stem),
                *vectors(stem, "c1.bias", "dw.weight", "dw.bias"),
                *norm(stem, "n1", "n2"),
                along("c2.weight", 1, stem),
                along("c3.weight", 1, stem),
            ),
        ),
        UnitGroup(
            "c2",
            left,
            (
                along("c2.weight", 0, left),
                *vectors(left, "c2.bias"),
                *norm(left, "n3"),
                along("head.weight", 1, left, k=4),
            ),
        ),
        UnitGroup(
            "c3",
            right,
            (
                along("c3.weight", 0, right),
                *vectors(right, "c3.bias"),
                *norm(right, "n4"),
                along("head.weight", 1, right, k=4, offset=4 * left),
            ),
        ),
    ]


def branches(seed: int = 0) -> DeclaredAtoms:
    torch.manual_seed(seed)
    return DeclaredAtoms(Branches(), torch.zeros(IMAGE), branches_groups())


class Attention(nn.Module):
    """One attention layer whose heads and inner widths can both go, and a feed-forward layer without any scale."""

    def __init__(self, heads: int = 4, width: int = 3, hidden: int = 10) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(6, heads * width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(heads * width, 6), nn.Linear(6, hidden), nn.Linear(hidden, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def attention_groups(heads: int = 4, width: int = 3, hidden: int = 10) -> list[UnitGroup]:
    columns = np.arange(heads)[None, :] * width + np.arange(width)[:, None]

    def rows(*names: str) -> tuple[Place, ...]:
        return tuple(along(f"{name}.{leaf}", 0, heads, k=width) for name in names for leaf in ("weight", "bias"))

    def cols(*names: str) -> tuple[Place, ...]:
        return tuple(Place(f"{name}.{leaf}", (0,), columns) for name in names for leaf in ("weight", "bias"))

    return [
        UnitGroup("heads", heads, (*rows("q", "k", "v"), along("out.weight", 1, heads, k=width))),
        UnitGroup("qk", width, cols("q", "k")),
        UnitGroup("v", width, (*cols("v"), Place("out.weight", (1,), columns))),
        UnitGroup(
            "ffn", hidden, (along("up.weight", 0, hidden), *vectors(hidden, "up.bias"), along("down.weight", 1, hidden))
        ),
    ]


def attention(seed: int = 0) -> DeclaredAtoms:
    torch.manual_seed(seed)
    return DeclaredAtoms(
        Attention(),
        torch.zeros(2, 5, 6),
        attention_groups(),
        attributes=lambda kept: {"heads": kept["heads"]},
    )


def batch(seed: int, shape: tuple[int, ...] = (16, *IMAGE[1:])) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randint(0, 10, (shape[0],), generator=generator)


def awaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give normalisations statistics and parameters as training would, so that no identity hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model

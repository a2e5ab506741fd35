"""Fifteen small networks, each with one way in which users' code moves channels, and what a cut of them must compute.

Every net has a layer ``first`` whose outputs 1 and 5 are asked to go. ``net(x, dead)`` is the whole network with the
outputs ``dead`` of ``first`` zeroed where they are consumed, written down by hand for each net: no tool decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Dead = Sequence[int]


def drop(x: Tensor, dead: Dead, axis: int = 1) -> Tensor:
    """Zero positions of one axis."""
    if not len(dead):
        return x
    keep = torch.ones(x.shape[axis], dtype=x.dtype)
    keep[list(dead)] = 0
    return x * keep.view([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


class Image(nn.Module):
    """A convolution ``first`` (8 outputs) and a normalisation."""

    def __init__(self, outputs: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, outputs, 3, padding=1)
        self.bn = nn.BatchNorm2d(outputs)

    def begin(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.first(x)))


class Residual(Image):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.bn2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        y = self.begin(x)
        y = torch.relu(y + self.bn2(self.second(drop(y, dead))))
        return self.fc(drop(y.mean((2, 3)), dead))


class Concat(Image):
    def __init__(self) -> None:
        super().__init__()
        self.beside, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return self.third(drop(torch.cat([self.begin(x), self.beside(x)], 1), dead)).mean((2, 3))


class Flatten(Image):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return self.fc(drop(F.max_pool2d(self.begin(x), 2), dead).flatten(1))


class GatedChunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(6, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        a, b = self.first(x).chunk(2, -1)
        return self.fc(drop(a * b.sigmoid(), [d % 8 for d in dead], -1))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        x = drop(torch.relu(self.stem(x)), dead, -1)
        for _ in range(2):
            x = drop(torch.relu(self.first(x)), dead, -1)
        return self.fc(x)


class FreeKernel(Image):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 8, 3, 3) / 8)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return F.conv2d(drop(self.begin(x), dead), self.kernel).mean((2, 3))


class ChannelScale(Image):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.second = nn.Parameter(torch.randn(8, 1, 1)), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return self.second(drop(self.begin(x) * self.scale, dead)).mean((2, 3))


class SqueezeExcite(Image):
    def __init__(self) -> None:
        super().__init__()
        self.se1, self.se2, self.second = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        y = drop(self.begin(x), dead)
        gate = self.se2(torch.relu(self.se1(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.second(drop(y * gate, dead)).mean((2, 3))


class NormAfterPermute(Image):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        y = self.begin(x).permute(0, 2, 3, 1)
        if not len(dead):
            return self.fc(self.norm(y)).mean((1, 2))
        living = [i for i in range(8) if i not in dead]  # the statistics of a smaller network
        y = F.layer_norm(y[..., living], (len(living),), self.norm.weight[living], self.norm.bias[living])
        return F.linear(y, self.fc.weight[:, living], self.fc.bias).mean((1, 2))


class Shuffle(Image):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        b, c, h, w = (y := self.begin(x)).shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.second(drop(y, [d % 4 * 2 + d // 4 for d in dead])).mean((2, 3))


class SilentScale(Image):
    """Outputs 1 and 5 have a scale of zero and a shift: without them the evaluation output must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return self.second(self.begin(x)).mean((2, 3))


class PixelShuffle(Image):
    def __init__(self) -> None:
        super().__init__(12)
        self.second = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return self.second(F.pixel_shuffle(drop(self.begin(x), dead), 2)).mean((2, 3))


class Grouped(Image):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.fc = nn.Conv2d(8, 6, 3, groups=2), nn.Linear(6, 5)

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return self.fc(self.second(drop(self.begin(x), dead)).mean((2, 3)))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        return torch.einsum("bc,co->bo", drop(torch.relu(self.first(x)), dead), self.mix)


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.heads, self.head_dim = nn.Linear(8, 24), nn.Linear(8, 5), 2, 4

    def forward(self, x: Tensor, dead: Dead = ()) -> Tensor:
        b, n, _ = x.shape
        y = drop(self.first(x), dead, -1).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (y[0] @ y[1].transpose(-1, -2) * 0.5).softmax(-1)
        return self.out((weights @ y[2]).transpose(1, 2).flatten(2))


Net = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


def _images() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def _vectors() -> Tensor:
    return torch.randn(4, 6)


NETS: dict[str, Net] = {
    "residual add": (Residual, _images),
    "concatenation": (Concat, _images),
    "flatten to linear": (Flatten, _images),
    "gated chunk": (GatedChunk, _vectors),
    "shared module": (Shared, _vectors),
    "F.conv2d with a free parameter": (FreeKernel, _images),
    "scale per channel": (ChannelScale, _images),
    "squeeze-excite": (SqueezeExcite, _images),
    "LayerNorm after permute": (NormAfterPermute, _images),
    "channel shuffle by view": (Shuffle, _images),
    "constant behind a zero scale": (SilentScale, _images),
    "pixel shuffle": (PixelShuffle, _images),
    "grouped convolution": (Grouped, _images),
    "einsum with a free parameter": (Einsum, _vectors),
    "attention from one qkv weight": (FusedAttention, lambda: torch.randn(4, 5, 8)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a net in evaluation mode, float64, with random statistics, and inputs."""
    torch.manual_seed(0)
    make, inputs = NETS[name]
    model = make().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        if isinstance(model, SilentScale):
            model.bn.weight[[1, 5]] = 0
            model.bn.bias[[1, 5]] = torch.tensor([0.8, 1.1], dtype=torch.float64)
    return model, inputs().double()

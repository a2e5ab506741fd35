"""Small networks that use their channels in every way users' networks do, for the tests of finding units."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from atoms_odd_nets import ODD
from torch import Tensor, nn


def _bn(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), _bn(6)
        self.a, self.bna = nn.Conv2d(6, 8, 3, padding=1, bias=False), _bn(8)
        self.b, self.bnb = nn.Conv2d(8, 6, 3, padding=1, bias=False), _bn(6)
        self.down = nn.Conv2d(6, 10, 1, stride=2)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bnb(self.b(F.relu_(self.bna(self.a(x))))))
        x = F.max_pool2d(F.gelu(self.down(x)), 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.c = nn.Conv2d(9, 6, 1)
        self.d = nn.Conv2d(15, 7, 3)
        self.fc = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), F.silu(self.b(x))], 1)
        y = torch.cat([self.c(y), y], 1)
        return self.fc(self.d(y).mean((2, 3)))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6 * 9, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.out(torch.tanh(self.fc(y.flatten(1))))


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 14), nn.Linear(7, 6)
        self.up2, self.down2 = nn.Linear(6, 10), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        x = self.down(F.silu(a) * b)
        return self.down2(F.glu(self.up2(x), -1))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.same, self.leave = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(self.same(torch.relu(self.same(x)))))


class FreeKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(7, 3, 3, 3) * 0.2)
        self.scale = nn.Parameter(torch.randn(1, 7, 1, 1))
        self.fc = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, padding=1) * self.scale
        return self.fc(torch.relu(y).sum((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), _bn(8)
        self.reduce, self.expand = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return self.last(x * gate).mean((2, 3))


class NormAfterPermute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gamma = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((-2, -1)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(4, 9, 1, bias=False), _bn(9)
        self.dw, self.bn2 = nn.Conv2d(9, 9, 3, padding=1, groups=9, bias=False), _bn(9)
        self.multi = nn.Conv2d(9, 18, 3, padding=1, groups=9)
        self.project, self.bn3 = nn.Conv2d(18, 4, 1, bias=False), _bn(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.multi(self.bn2(self.dw(y))))
        return self.bn3(self.project(y)).mean((2, 3))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = y.chunk(2, 1)
        y = torch.cat([left, F.relu(self.b(right))], 1)
        return self.fc(F.relu(self.c(y)).mean((2, 3)))


class ShuffleIntoConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.b(F.relu(y)).mean((2, 3))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(F.relu(self.a(x)), 2)
        y = F.pixel_unshuffle(F.relu(self.b(y)), 2)
        return self.c(y).mean((2, 3))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 3, padding=1, groups=3)
        self.bn, self.c = _bn(6), nn.Conv2d(6, 4, 1)
        self.t = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.g(F.relu(self.a(x)))))
        return self.last(F.relu(self.t(self.c(y)))).mean((2, 3))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 6) * 0.3)
        self.enter, self.leave = nn.Linear(3, 6), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("b n i, h o i -> b n h o", torch.relu(self.enter(x)), self.weight)
        return self.leave(torch.relu(y).sum(2))


class FusedQkv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 3
        self.qkv, self.proj, self.norm = nn.Linear(10, 36), nn.Linear(12, 10), nn.LayerNorm(10)
        self.enter, self.head = nn.Linear(5, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        b, n, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(b, n, self.heads * self.head_dim)
        return self.head(x + self.proj(y)).mean(1)


class ShapeScaledAttention(nn.Module):
    """The scale follows the width of the queries: columns can not go."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class DefaultScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 15), nn.Linear(15, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class GroupedQuery(nn.Module):
    def __init__(self, width: int, heads: int, kv: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv, self.head_dim, self.scaling = heads, kv, head_dim, head_dim**-0.5
        self.q, self.k = nn.Linear(width, heads * head_dim), nn.Linear(width, kv * head_dim)
        self.v, self.o = nn.Linear(width, kv * head_dim), nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.num_kv, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.num_kv, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeats = self.num_heads // self.num_kv
        k, v = (
            t[:, :, None].expand(b, self.num_kv, repeats, n, self.head_dim).reshape(b, self.num_heads, n, self.head_dim)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)
        return self.o(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class SmallDecoder(nn.Module):
    """Grouped queries, rotary positions, RMS norms, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        width = 10
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.attention = GroupedQuery(width, 4, 2, 6)
        self.norm1, self.norm2, self.norm3 = Rms(width), nn.RMSNorm(width), nn.LayerNorm(width)
        self.gate_up, self.down = nn.Linear(width, 16, bias=False), nn.Linear(8, width, bias=False)
        angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.5, 0.2])
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.norm1(x), self.cos, self.sin)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return self.head(self.norm3(x))


class GroupNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.b, self.n2 = nn.Conv2d(12, 8, 1), nn.GroupNorm(1, 8)
        self.c, self.n3 = nn.Conv2d(8, 5, 1), nn.InstanceNorm2d(5, affine=True)
        self.d, self.n4 = nn.Conv2d(5, 6, 1), nn.GroupNorm(6, 6)
        self.act, self.fc = nn.PReLU(12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.n1(self.a(x)))
        x = torch.relu(self.n3(self.c(torch.relu(self.n2(self.b(x))))))
        return self.fc(torch.tanh(self.n4(self.d(x))).amax((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2 = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 8, 3, padding=1)
        self.mid = nn.Conv2d(8, 9, 3, padding=1)
        self.up = nn.ConvTranspose2d(9, 8, 2, stride=2)
        self.u2, self.u1 = nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(11, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(F.max_pool2d(a, 2)))
        y = F.relu(self.mid(F.avg_pool2d(b, 2)))
        y = F.relu(self.u2(torch.cat([self.up(y), b], 1)))
        y = F.interpolate(y, scale_factor=2, mode="bilinear")
        return self.out(F.relu(self.u1(torch.cat([y, F.pad(a, (0, 0, 0, 0))], 1))))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([_bn(6 + 4 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3)])
        self.last, self.fc = _bn(18), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.fc(F.relu(self.last(torch.cat(features, 1))).mean((2, 3)))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y, (h, _) = self.lstm(self.embed(ids))
        return self.fc(y.mean(1)) + self.fc(torch.cat([h[-2], h[-1]], -1))


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gru, self.fc = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(torch.relu(self.enter(x)))
        return self.fc(y[:, -1])


class Gcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.w1, self.w2):
            messages = layer(x)[edges[0]]
            x = torch.relu(torch.zeros(x.shape[0], messages.shape[1]).index_add(0, edges[1], messages))
        return self.w3(x)


class Bottleneck(nn.Module):
    """The standard bottleneck block; its stride is in the 3x3 convolution."""

    def __init__(self, incoming: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(incoming, width, 1, bias=False), _bn(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), _bn(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), _bn(4 * width)
        self.downsample = None
        if stride != 1 or incoming != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(incoming, 4 * width, 1, stride, bias=False), _bn(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), _bn(width)
        incoming, layers = width, []
        for stage, count in enumerate(blocks):
            for index in range(count):
                layers.append(Bottleneck(incoming, width * 2**stage, 2 if stage and not index else 1))
                incoming = 4 * width * 2**stage
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(incoming, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1))


class ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            _bn(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            _bn(half),
            nn.Conv2d(half, half, 1, bias=False),
            _bn(half),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1, bias=False), _bn(12)
        self.units = nn.Sequential(ShuffleUnit(12), ShuffleUnit(12))
        self.last, self.fc = nn.Conv2d(12, 10, 1), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(F.relu(self.bn(self.stem(x))))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def images(channels: int = 3, pixels: int = 8) -> tuple[Tensor]:
    return (torch.randn(2, channels, pixels, pixels),)


def tokens(vocabulary: int = 11, length: int = 5) -> tuple[Tensor]:
    return (torch.randint(0, vocabulary, (2, length)),)


NETS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "residual": lambda: (Residual(), images()),
    "concat": lambda: (Concat(), images()),
    "flatten": lambda: (Flatten(), images()),
    "glu": lambda: (Glu(), (torch.randn(2, 6),)),
    "shared": lambda: (Shared(), (torch.randn(2, 5),)),
    "free kernel": lambda: (FreeKernel(), images()),
    "squeeze-excite": lambda: (SqueezeExcite(), images()),
    "norm after permute": lambda: (NormAfterPermute(), images()),
    "depthwise": lambda: (Depthwise(), images(4)),
    "shuffle": lambda: (Shuffle(), images()),
    "shuffle into conv": lambda: (ShuffleIntoConv(), images()),
    "pixel shuffle": lambda: (PixelShuffle(), images()),
    "grouped": lambda: (Grouped(), images()),
    "einsum": lambda: (Einsum(), (torch.randn(2, 4, 3),)),
    "fused qkv": lambda: (FusedQkv(), (torch.randn(2, 5, 5),)),
    "shape-scaled attention": lambda: (ShapeScaledAttention(), (torch.randn(2, 5, 6),)),
    "default scale": lambda: (DefaultScale(), (torch.randn(2, 5, 6),)),
    "decoder": lambda: (SmallDecoder(), tokens()),
    "group norms": lambda: (GroupNorms(), images()),
    "u-net": lambda: (UNet(), images()),
    "dense block": lambda: (DenseBlock(), images()),
    "lstm": lambda: (Lstm(), tokens()),
    "gru": lambda: (Gru(), (torch.randn(2, 5, 4),)),
    "gcn": lambda: (Gcn(), (torch.randn(4, 5), torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 2]]))),
    "bottlenecks": lambda: (ResNet((1, 1), 4, 5), images(3, 16)),
    "shufflenet": lambda: (ShuffleNet(), images()),
    **ODD,
}


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a net with random weights and running statistics, in evaluation mode, and inputs for it."""
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    return randomised(model), inputs


def randomised(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode with no scale, shift or statistic at its default."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()

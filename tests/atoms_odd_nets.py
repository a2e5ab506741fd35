"""Small networks with the less common operators, one rule each, for the tests of finding units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Named modules and parameters, and a function that uses them."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def shift(s: Any, x: Tensor) -> Tensor:
    """A temporal shift: written in place into slices of a fresh tensor."""
    y, out = s.a(x), torch.zeros_like(s.a(x))
    out[:, :2, 1:] = y[:, :2, :-1]
    out[:, 2:] = y[:, 2:]
    return s.b(out)


def standardised(s: Any, x: Tensor) -> Tensor:
    w = s.b.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return s.c(F.conv2d(s.a(x).relu(), w, s.b.bias).mean((2, 3)))


def hand_norm(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return s.b(F.normalize(s.c(y.softmax(-1)), dim=0))


def experts(s: Any, x: Tensor) -> Tensor:
    hidden = torch.einsum("bi,eio->ebo", x, s.w1).relu()
    return s.out(torch.einsum("ebo,be->bo", torch.bmm(hidden, s.w2), s.route(x).softmax(-1)))


def shared_key(s: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = s.q(x).view(b, n, 4, -1).transpose(1, 2)
    k, v = s.k(x)[:, None].expand(-1, 4, -1, -1), s.v(x)[:, None].expand(-1, 4, -1, -1)
    return s.o(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).reshape(b, n, -1))


def cells(s: Any, x: Tensor) -> Tensor:
    h, c = x.new_zeros(x.shape[0], s.lstm.hidden_size), torch.zeros(x.shape[0], s.lstm.hidden_size)
    for _ in range(2):
        h, c = s.lstm(x, (h, c))
    return s.out(s.gru(h))


def channel_attention(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    pooled = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
    return s.b(y * s.gate(pooled).sigmoid())


def stacked(s: Any, x: Tensor) -> Tensor:
    y = torch.stack([s.a(x), s.b(x)], -1)
    return s.c(y.flatten(1)) + s.d(y.amax(-1))


def checkpointed(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = torch.utils.checkpoint.checkpoint(lambda t: s.b(t).relu(), s.a(x), use_reentrant=False)
    return s.c(y)


def tied(s: Any, x: Tensor) -> Tensor:
    return s.o(F.linear(s.a(s.i(x)).relu(), s.a.weight.t(), s.bias))


def linear(a: int, b: int) -> nn.Linear:
    return nn.Linear(a, b)


def conv(a: int, b: int, size: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, padding=size // 2)


def flat(*size: int) -> tuple[Tensor]:
    return (torch.randn(*size),)


ODD: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "written in slices": lambda: (Net(shift, a=conv(3, 8), b=conv(8, 4)), flat(2, 3, 5, 5)),
    "weight standardisation": lambda: (
        Net(standardised, a=conv(3, 6, 3), b=conv(6, 5, 3), c=linear(5, 2)),
        flat(2, 3, 6, 6),
    ),
    "weight norm": lambda: (
        nn.Sequential(torch.nn.utils.parametrizations.weight_norm(linear(4, 8)), nn.ReLU(), linear(8, 5)),
        flat(2, 4),
    ),
    "normalised by hand": lambda: (Net(hand_norm, a=linear(4, 8), c=linear(8, 6), b=linear(6, 2)), flat(3, 4)),
    "experts": lambda: (
        Net(
            experts,
            route=linear(4, 3),
            out=linear(4, 2),
            w1=nn.Parameter(torch.randn(3, 4, 6)),
            w2=nn.Parameter(torch.randn(3, 6, 4)),
        ),
        flat(2, 4),
    ),
    "one key for all heads": lambda: (
        Net(shared_key, q=linear(6, 12), k=linear(6, 3), v=linear(6, 3), o=linear(12, 6)),
        flat(2, 5, 6),
    ),
    "cells": lambda: (Net(cells, lstm=nn.LSTMCell(4, 5), gru=nn.GRUCell(5, 6), out=linear(6, 2)), flat(2, 4)),
    "channel attention": lambda: (
        Net(channel_attention, a=conv(3, 6), gate=conv(2, 1, 3), b=conv(6, 2)),
        flat(2, 3, 5, 5),
    ),
    "stack": lambda: (Net(stacked, a=linear(4, 6), b=linear(4, 6), c=linear(12, 2), d=linear(6, 2)), flat(2, 4)),
    "checkpoint": lambda: (Net(checkpointed, a=linear(4, 8), b=linear(8, 8), c=linear(8, 3)), flat(2, 4)),
    "transposed twin": lambda: (
        Net(tied, a=linear(6, 8), i=linear(4, 6), o=linear(6, 3), bias=nn.Parameter(torch.randn(6))),
        flat(2, 4),
    ),
    "bilinear": lambda: (
        Net(
            lambda s, x: s.o(s.p(s.l(s.a(x), s.b(x)))),
            a=linear(4, 5),
            b=linear(4, 6),
            l=nn.Bilinear(5, 6, 7),
            p=nn.PReLU(7),
            o=linear(7, 2),
        ),
        flat(2, 4),
    ),
    "outer product": lambda: (
        Net(
            lambda s, x: s.o((s.a(x)[:, :, None] * s.b(x)[:, None, :]).flatten(1)),
            a=linear(4, 5),
            b=linear(4, 3),
            o=linear(15, 2),
        ),
        flat(2, 4),
    ),
    "one axis": lambda: (
        nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ConvTranspose1d(8, 4, 2, groups=4),
            nn.Conv1d(4, 6, 1, groups=2),
            nn.Conv1d(6, 2, 1),
        ),
        flat(2, 3, 6),
    ),
    "sorted rows": lambda: (
        Net(lambda s, x: s.b(s.a(x).sort(0)[0].cumsum(1)), a=linear(4, 6), b=linear(6, 3)),
        flat(3, 4),
    ),
    "padded shortcut": lambda: (
        Net(
            lambda s, x: s.c(s.b(s.a(x)) + F.pad(s.a(x), (0, 0, 0, 0, 2, 2))), a=conv(3, 4), b=conv(4, 8), c=conv(8, 3)
        ),
        flat(2, 3, 4, 4),
    ),
    "attention of torch": lambda: (
        nn.Sequential(linear(5, 12), nn.TransformerEncoderLayer(12, 3, 10, batch_first=True), linear(12, 4)),
        flat(2, 6, 5),
    ),
    "unfold": lambda: (
        Net(
            lambda s, x: s.o(s.w(F.unfold(s.a(x), 3, padding=1).transpose(1, 2)).relu()),
            a=conv(3, 4),
            w=linear(36, 5),
            o=linear(5, 2),
        ),
        flat(2, 3, 4, 4),
    ),
}

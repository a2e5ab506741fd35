"""The deterministic recipe of the DARTS facts: weights, images and logits in closed form, float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GOLDEN = json.loads((Path(__file__).parent / "golden" / "darts.json").read_text())


def cases(prefix: str) -> list[dict[str, Any]]:
    """Return the facts whose name starts so."""
    return [case for case in GOLDEN["cases"] if case["name"].startswith(prefix)]


def grid(*shape: int) -> list[Tensor]:
    """Return the index of every entry along each axis, float64."""
    return list(torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in shape), indexing="ij"))


def weighted_(network: nn.Module) -> nn.Module:
    """Give a network its closed-form weights and return it in training mode, float64."""
    network.double().train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                o, i, h, v = grid(*module.weight.shape)
                module.weight.copy_(0.3 * torch.sin(1 + o + 2 * i + 3 * h + 5 * v + 0.5 * o * i + 0.25 * h * v))
            elif isinstance(module, nn.Linear):
                o, i = grid(*module.weight.shape)
                module.weight.copy_(0.1 * torch.sin(1 + o + 2 * i + 0.5 * o * i))
                module.bias.copy_(0.05 * torch.cos(torch.arange(len(module.bias), dtype=torch.float64)))
    return network


def image(*shape: int) -> Tensor:
    """Return the closed-form images X(N, C, H, W)."""
    n, c, h, w = grid(*shape)
    return torch.sin(0.7 * n + 0.3 * c + 0.2 * h + 0.1 * w) + 0.5 * torch.cos(1.3 * c + 0.7 * h * w + 0.4 * n)


def alpha(edges: int = 14, operations: int = 8, scale: float = 0.5) -> Tensor:
    """Return the closed-form logits."""
    e, k = grid(edges, operations)
    return scale * torch.sin(1 + e + 0.3 * k * k)


def matches(actual: Tensor, expected: dict[str, Any], tolerance: float = 1e-7) -> None:
    """Compare a tensor with a summary of it."""
    assert list(actual.shape) == expected["shape"]
    flat = actual.detach().flatten()
    figures = {"sum": flat.sum(), "l2": flat.norm(), "first": flat[0], "last": flat[-1]}
    for name, figure in figures.items():
        assert abs(float(figure) - expected[name]) <= tolerance, name
    for index, value in expected["flat_samples"].items():
        assert abs(float(flat[int(index)]) - value) <= tolerance, index

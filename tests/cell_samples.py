"""NAS-Bench-201 cells in the table's text form, closed-form weights, and the real table where it is present."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared_data import cifar10_arrays, shared_data
from torch import nn

from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, nas_bench_201_space
from archsmith.space import Architecture

NB201_FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "nas-bench-201-networks.json").read_text())
"""Facts of the reference implementation; their origin is in the file."""


def operations_of(text: str) -> tuple[str, ...]:
    """Return the operations of ``|op~0|+|op~0|op~1|+...`` in the order of ``NB201_EDGES``."""
    groups = [re.findall(r"(\w+)~(\d+)", group) for group in text.split("+")]
    by_edge = {
        (int(source), target): operation for target, group in enumerate(groups, start=1) for operation, source in group
    }
    return tuple(by_edge[edge] for edge in NB201_EDGES)


def cell_of(operations: tuple[str, ...]) -> Architecture:
    """Return the architecture with these operations, in the order of ``NB201_EDGES``."""
    paths = [f"edge/{source}-{target}" for source, target in NB201_EDGES]
    return nas_bench_201_space().validate(dict(zip(paths, operations, strict=True)))


def cells_of_table(columns: np.ndarray) -> list[Architecture]:
    """Return the architectures of rows (n, 6) of codes."""
    return [cell_of(tuple(NB201_OPERATIONS[code] for code in row)) for row in columns]


def fill_closed_form_(module: nn.Module) -> nn.Module:
    """Turn a module into float64 with the weights of the ``fill`` entry of the facts; statistics included."""
    module.double()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                flat = torch.arange(layer.weight.numel(), dtype=torch.float64)
                fan_in = layer.weight[0].numel()
                layer.weight.copy_((torch.sin(flat + 1) * (2 / fan_in) ** 0.5).reshape(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.copy_(0.01 * torch.arange(layer.bias.numel(), dtype=torch.float64))
            elif isinstance(layer, nn.BatchNorm2d):
                i = torch.arange(layer.num_features, dtype=torch.float64)
                layer.weight.copy_(1 + 0.1 * torch.cos(i))
                layer.bias.copy_(0.1 * torch.sin(i))
                layer.running_mean.copy_(0.05 * torch.sin(i + 1))
                layer.running_var.copy_(1 + 0.2 * torch.cos(i) ** 2)
    return module


def nas_bench_201_columns() -> dict[str, np.ndarray]:
    """Return the real table's columns by name; skip where it is absent."""
    with np.load(shared_data("nas-benchmarks") / "nas-bench-201.npz") as file:
        return dict(file)


def zero_cost_columns() -> dict[str, np.ndarray]:
    """Return the published scores on CIFAR-10 by name, (15625,) float64; skip where they cannot be read."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(shared_data("nas-benchmarks") / "nas-bench-201-zero-cost.parquet")
    names = ("naswot", "synflow", "logsynflow", "nregions")
    return {name: table[f"{name}_cifar10"].to_numpy().astype(np.float64) for name in names}


def cifar10_batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``size`` normalised training images (size, 3, 32, 32) of real CIFAR-10 and their labels."""
    arrays = cifar10_arrays()
    rows = np.random.default_rng(seed).choice(len(arrays["x_train"]), size, replace=False)
    images = torch.from_numpy(arrays["x_train"][rows]).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.from_numpy(arrays["y_train"][rows]).long()

"""Parents with known nodes: closed-form weights, a small convolutional chain, and tasks to train them on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.tasks.base import Batch
from archsmith.tasks.vision import ImageClassification

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent / "golden" / "random-sparse.json").read_text())["cases"]
}


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    """Return a perceptron with ReLU behind a flatten."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def closed_form() -> tuple[nn.Sequential, Batch]:
    """Return the parent 6-8-8-3 of sines in float64, and its twelve examples."""

    def sines(scale: float, shift: float, *shape: int) -> Tensor:
        i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        return (scale * torch.sin(shift + 1.3 * i)).reshape(shape)

    network = chain(6, 8, 8, 3).double()
    values = [(0.7, 0.1, 8, 6), (0.3, 0.2, 8), (0.6, 0.4, 8, 8), (0.3, 0.5, 8), (0.8, 0.7, 3, 8), (0.1, 0.9, 3)]
    for parameter, value in zip(network.parameters(), values, strict=True):
        parameter.data = sines(*value)  # type: ignore[arg-type]
    inputs = torch.cos(0.37 * torch.arange(72, dtype=torch.float64)).reshape(12, 6)
    return network, Batch(inputs, torch.arange(12) % 3)


def small_cnn(seed: int = 0, *, classes: int = 3) -> nn.Sequential:
    """Return a chain for images (3, 8, 8), with normalisations whose statistics are not those of a new network."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid()),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, classes),
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def blobs(*, train: int = 120, test: int = 60, classes: int = 3, side: int = 8, seed: int = 0) -> ImageClassification:
    """Return noisy images of one pattern for each class."""
    rng = np.random.default_rng(seed)
    patterns = rng.random((classes, 3, side, side))
    arrays = {}
    for part, n in (("train", train), ("valid", test), ("test", test)):
        labels = np.arange(n) % classes
        images = 0.12 * patterns[labels] + 0.88 * rng.random((n, 3, side, side))
        arrays |= {f"x_{part}": images.astype(np.float32), f"y_{part}": labels}
    return ImageClassification.from_arrays(**arrays)

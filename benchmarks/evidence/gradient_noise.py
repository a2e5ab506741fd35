"""Gradient noise on a network of 16 hidden layers with weights that are too small, which plain SGD does not train.

    python benchmarks/evidence/gradient_noise.py --layers 16 --etas 0 0.01 0.05 --seeds 0 1 2 3

Ten Gaussian classes in 64 dimensions (centres N(0, 1), noise 0.8, 2,000 points); hidden ReLU layers of 50 units, all
weights N(0, 0.1^2), biases 0; batch 100, SGD at 0.1, the gradient's norm clipped to 1 and then noised. Prints the best
accuracy on the training points, taken every 100 steps.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import torch
from torch import Tensor, nn

from archsmith.methods.gradient_noise import Settings, attach


def points(seed: int, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Return the points (count, 64) and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return centres[labels] + 0.8 * torch.randn(count, 64, generator=generator), labels


def network(layers: int, seed: int) -> nn.Sequential:
    """Return the badly initialised network."""
    generator = torch.Generator().manual_seed(1000 + seed)
    widths = [64, *[50] * layers, 10]
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        with torch.no_grad():
            linear.weight.copy_(0.1 * torch.randn(outputs, inputs, generator=generator))
            linear.bias.zero_()
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def best_accuracy(layers: int, eta: float, seed: int, steps: int = 3000) -> float:
    """Train and return the best accuracy on the training points."""
    x, y = points(seed)
    model = network(layers, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, Settings(eta=eta, clip_norm=1.0), seed=seed)
    order = torch.Generator().manual_seed(2000 + seed)
    best = 0.0
    for step in range(steps):
        batch = torch.randint(len(x), (100,), generator=order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                best = max(best, float((model(x).argmax(1) == y).float().mean()))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--etas", type=float, nargs="+", default=[0.0, 0.01, 0.05])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for eta in arguments.etas:
        started = time.perf_counter()
        found = [best_accuracy(arguments.layers, eta, seed, arguments.steps) for seed in arguments.seeds]
        seconds = time.perf_counter() - started
        row = " ".join(f"{value:.2f}" for value in found)
        print(f"layers {arguments.layers}  eta {eta:<5g} best training accuracy {row}  ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

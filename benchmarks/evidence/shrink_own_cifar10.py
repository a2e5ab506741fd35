"""Shrink one trained CNN to half its MACs by several scores, on CIFAR-10 images: accuracy before, after, at the end.

    python benchmarks/evidence/shrink_own_cifar10.py --data cifar10.npz --out runs/shrink-cifar10

For every seed the network is trained once at full width; every score then starts from these weights, with the same
steps, the same order of images and the same budget. Typed again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from archsmith import open_task, shrink
from archsmith.cost.backends import threads_pinned
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.optim import decay_groups
from archsmith.train.schedules import annealed


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Cnn(nn.Module):
    """Two residual stages: 6.1 million MACs, 64 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = conv(3, 24, 2), nn.Sequential(conv(24, 24), conv(24, 24))
        self.down, self.two = conv(24, 48, 2), nn.Sequential(conv(48, 48), conv(48, 48))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images (B, 3, H, W)."""
        x = self.stem(x)
        x = self.down(x + self.one(x))
        return self.head((x + self.two(x)).mean((2, 3)))


def cnn() -> nn.Module:
    """The factory that ``archsmith shrink shrink_own_cifar10:cnn`` calls."""
    return Cnn()


def train_base(task, path: Path, *, epochs: int, seed: int) -> None:
    """Train the whole network and write its weights."""
    torch.manual_seed(seed)
    network = Cnn()
    optimizer = torch.optim.SGD(decay_groups(network, 5e-4), 0.05, momentum=0.9)
    position, steps = Position(), task.steps_per_epoch(64)
    hooks = LoopHooks(rate=lambda t: annealed(t, peak=0.05, total=epochs * steps, warmup=steps, shape="cosine"))
    while position.epoch < epochs:
        train_epoch(network, optimizer, task, position, hooks, batch_size=64, seed=seed)
        next_epoch(position)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scores", nargs="+", default=["scale", "l2", "taylor", "random"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", default="macs<=0.5x")
    parser.add_argument("--epochs", type=int, nargs=3, default=[12, 3, 8], metavar=("BEFORE", "SHRINK", "AFTER"))
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    before, cutting, after = given.epochs
    task = open_task("cifar10", data=given.data)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(given.seeds):
        weights = given.out / f"base-{seed}.safetensors"
        if not weights.exists():
            with threads_pinned(1):
                train_base(task, weights, epochs=before, seed=seed)
        for score in given.scores:
            outcome = shrink(
                "shrink_own_cifar10:cnn",
                task,
                budget=given.budget,
                score=score,
                weights=weights,
                seed=seed,
                settings={"epochs_shrink": cutting, "epochs_after": after},
                out=given.out / f"{score}-{seed}",
                threads=1,
                quiet=True,
            )
            costs, reference = outcome.best["costs"], outcome.result["reference"]
            row = {
                **outcome.result["figures"],
                "test": outcome.best["metrics"]["test_accuracy"],
                "macs": costs["macs"] / reference["macs"],
                "params": costs["params"] / reference["params"],
                "latency_ms": costs["latency"]["median_ms"],
                "seconds": outcome.result["seconds"],
            }
            rows.setdefault(score, []).append(row)
            print(json.dumps({"seed": seed, "score": score, **row}), flush=True)
    print(
        "| score | valid before | after the cut | at the end | test at the end | MACs | params |\n"
        "|---|---|---|---|---|---|---|"
    )
    for score, runs in rows.items():
        cells = []
        for key in ("accuracy_before", "accuracy_after_cut", "accuracy_final", "test"):
            values = [100 * run[key] for run in runs]
            cells.append(f"{sum(values) / len(values):.1f}" + f" ({min(values):.1f} to {max(values):.1f})")
        shares = [f"{sum(run[key] for run in runs) / len(runs):.3f}x" for key in ("macs", "params")]
        print(f"| {score} | {' | '.join([*cells, *shares])} |")


if __name__ == "__main__":
    main()

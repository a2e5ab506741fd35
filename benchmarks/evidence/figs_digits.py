"""FiGS on the digits: MACs and accuracy against the strength of the penalty, and uniformly scaled networks beside it.

    python benchmarks/evidence/figs_digits.py --out runs/figs-digits

For every penalty (lambda in units of one over the initial cost) and seed: structure learning, one cut, training from
new weights as published and from those the search left. Beside it the same network with all widths scaled to at most
the MACs that FiGS found, trained by the same recipe. Typed again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from archsmith import open_task, shrink
from archsmith.cost import count
from archsmith.cost.backends import threads_pinned
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.optim import decay_groups
from archsmith.train.schedules import annealed

WIDTHS = (16, 24, 24)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Net(nn.Module):
    """Four convolutions, a residual sum and a concatenation, for images of 8 x 8."""

    def __init__(self, stem: int, left: int, right: int) -> None:
        super().__init__()
        self.stem, self.inner = conv(1, stem), conv(stem, stem)
        self.left, self.right = conv(stem, left, 2), conv(stem, right, 2)
        self.head = nn.Linear(left + right, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images (B, 1, 8, 8)."""
        x = self.stem(x)
        x = x + self.inner(x)
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


def net() -> nn.Module:
    """The factory that ``archsmith shrink figs_digits:net`` calls."""
    return Net(*WIDTHS)


def scaled(macs: int) -> tuple[int, ...]:
    """Return the largest uniformly scaled widths within ``macs``."""
    for step in range(200, 0, -1):
        widths = tuple(max(1, round(width * step / 200)) for width in WIDTHS)
        if count(Net(*widths), torch.zeros(1, 1, 8, 8)).macs <= macs:
            return widths
    raise ValueError(f"nothing fits {macs} MACs")


def train_scaled(task, widths: tuple[int, ...], *, epochs: int, seed: int) -> float:
    """Train a scaled network as the found one is trained; return its test accuracy."""
    torch.manual_seed(seed)
    network = Net(*widths)
    optimizer = torch.optim.SGD(decay_groups(network, 5e-4), 0.05, momentum=0.9)
    position, steps = Position(), task.steps_per_epoch(64)
    hooks = LoopHooks(rate=lambda t: annealed(t, peak=0.05, total=epochs * steps, warmup=steps, shape="cosine"))
    while position.epoch < epochs:
        train_epoch(network, optimizer, task, position, hooks, batch_size=64, seed=seed)
        next_epoch(position)
    return float(task.evaluate(network.eval(), "test")["accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--penalties", nargs="+", type=float, default=[0.3, 1.0, 3.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs=2, default=[10, 15], metavar=("SEARCH", "AFTER"))
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    task = open_task("digits")
    search, after = given.epochs
    for penalty in given.penalties:
        rows = []
        for seed in range(given.seeds):
            row: dict[str, object] = {"penalty": penalty, "seed": seed}
            for retrain in ("scratch", "inherit"):
                outcome = shrink(
                    "figs_digits:net",
                    task,
                    method="figs",
                    seed=seed,
                    settings={
                        "epochs_shrink": search,
                        "epochs_after": after,
                        "penalty": penalty,
                        "retrain": retrain,
                        "lr_after": 0.05,
                    },
                    out=given.out / f"{retrain}-{penalty}-{seed}",
                    threads=1,
                    quiet=True,
                )
                row[retrain] = outcome.best["metrics"]["test_accuracy"]
                row["macs"] = outcome.best["costs"]["macs"]
            row["fraction"] = row["macs"] / outcome.result["reference"]["macs"]  # type: ignore[operator]
            widths = scaled(int(row["macs"]))  # type: ignore[call-overload]
            with threads_pinned(1):
                row["uniform"] = train_scaled(task, widths, epochs=after, seed=seed)
            rows.append(row)
            print(json.dumps(row), flush=True)
        shown = []
        for key in ("fraction", "scratch", "inherit", "uniform"):
            values = [100 * float(row[key]) for row in rows]  # type: ignore[arg-type]
            shown.append(f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {penalty} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()

"""In-context regression by one layer of attention: local linear, softmax and linear, with equal parameters.

A sequence holds pairs (x, y) of a map that is drawn anew for each sequence; the layer reads x with y of the past as
values and predicts y at each x from the pairs before it. Maps: ``linear`` (one matrix), ``piecewise`` (one of two
matrices by the sign of the first channel), ``drifting`` (a matrix that turns slowly along the sequence). Error: mean
squared error over the last quarter of the sequence, divided by the variance of y.

    OMP_NUM_THREADS=1 python benchmarks/evidence/local_linear_attention.py --seeds 5 --steps 400
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from archsmith.layers.local_linear_attention import local_linear_attention
from archsmith.layers.self_attention import linear_attention

KINDS = ("local_linear", "softmax", "linear")
MAPS = ("linear", "piecewise", "drifting")


class InContext(nn.Module):
    """Queries and keys are one learned map of x, values are y: the same parameters for every rule."""

    def __init__(self, kind: str, channels: int, heads: int) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.keys = nn.Linear(channels, heads * channels)
        self.ridge = nn.Parameter(torch.zeros(heads))
        self.sharpness = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(heads * channels, channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map x and y (B, T, D) to predictions (B, T - 1, D) of y[1:], each from the pairs before it."""
        k = self.keys(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = k * self.sharpness.exp()[:, None, None]
        v = y[:, None, :-1].expand(-1, self.heads, -1, -1)
        q, k = k[:, :, 1:], k[:, :, :-1]
        if self.kind == "local_linear":
            found = local_linear_attention(q, k, v, ridge=nn.functional.softplus(self.ridge))
        elif self.kind == "softmax":
            found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            found = linear_attention(q, k, v)
        return self.out(found.transpose(1, 2).flatten(-2))


def drawn(kind: str, batch: int, length: int, channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return x and y (B, T, D) of one map for each sequence."""
    x = torch.randn(batch, length, channels, generator=generator)
    one, two = (torch.randn(2, batch, channels, channels, generator=generator) / math.sqrt(channels)).unbind(0)
    first, second = x @ one, x @ two
    if kind == "linear":
        return x, first
    if kind == "piecewise":
        return x, torch.where(x[..., :1] > 0, first, second)
    angle = torch.linspace(0, math.pi / 2, length)[:, None]
    return x, angle.cos() * first + angle.sin() * second


def error(kind: str, rule: str, seed: int, args: argparse.Namespace) -> float:
    """Return the relative error of a trained layer on fresh sequences."""
    torch.manual_seed(seed)
    model = InContext(rule, args.channels, args.heads)
    generator = torch.Generator().manual_seed(1000 + seed)  # the same sequences for every rule
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps)
    for _ in range(args.steps):
        x, y = drawn(kind, args.batch, args.length, args.channels, generator)
        loss = (model(x, y) - y[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, y = drawn(kind, 256, args.length, args.channels, generator)
    last = args.length // 4
    with torch.no_grad():
        wrong = (model(x, y) - y[:, 1:])[:, -last:].square().mean()
    return float(wrong / y[:, -last:].var())


def interval(values: list[float]) -> str:
    """Return mean and half of the 95 % interval."""
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    """Train every rule on every kind of map and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"seeds": 5, "steps": 400, "batch": 32, "length": 64, "channels": 4, "heads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    print(f"| map | {' | '.join(KINDS)} | softmax minus local linear, paired |\n|{'---|' * (len(KINDS) + 2)}")
    for kind in MAPS:
        found = {rule: [error(kind, rule, seed, args) for seed in range(args.seeds)] for rule in KINDS}
        gap = [b - a for a, b in zip(found["local_linear"], found["softmax"], strict=True)]
        print(f"| {kind} | {' | '.join(interval(found[rule]) for rule in KINDS)} | {interval(gap)} |", flush=True)
    count = sum(p.numel() for p in InContext("softmax", args.channels, args.heads).parameters())
    print(f"{count} parameters each, {args.seeds} seeds, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

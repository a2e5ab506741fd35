"""RARTS against DARTS on the digits: time of a step, accuracy of what is found, and widths by penalty.

    python benchmarks/evidence/rarts.py --seeds 0 1 2 --out runs/rarts

- Time, DARTS space, four cells of four channels: steps of DARTS (first and second order) and of RARTS (fused and
  Gauss-Seidel), interleaved in one process, processor time; the goal is at most half of second order.
- Topology, space of NAS-Bench-201, three stages of one cell of four channels: for each seed the cells found by
  first-order DARTS and by RARTS, trained from scratch by the same recipe.
- Widths: for each seed and penalty, what is left of a small network, and its accuracy.

Typed again with the same folder it goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _rounds import interleaved, machine, ratio, spread

from archsmith import open_task
from archsmith.core.files import read_json, write_json
from archsmith.families.cells import NasBench201Family
from archsmith.families.darts import darts_family
from archsmith.methods import darts, rarts, rarts_width
from archsmith.run.intervals import mean_interval
from archsmith.run.own_model import OwnCosts, OwnModel
from archsmith.run.prepare import EarlyJournal
from archsmith.run.relaxed_search import RelaxedSearcher

SEARCH: dict[str, Any] = {
    "search_epochs": 6,
    "search_batch_size": 64,
    "search_channels": 4,
    "search_cells": 4,
    "search_lr": 0.1,
    "logit_lr": 0.01,
}
FINAL: dict[str, Any] = {"epochs": 6, "batch_size": 32, "lr": 0.05, "drop_path": 0.0, "auxiliary_weight": 0.0}
PENALTIES = (0.0, 0.01, 0.03, 0.1)
ROUNDS, WARMUP = 6, 1


class Steps:
    """A monitor that stops after some steps; None never does."""

    def __init__(self, left: int | None = None) -> None:
        self.left = left

    def step(self, total: int, **figures: float) -> None:
        """Count a step."""
        if self.left is not None:
            self.left -= 1

    def should_stop(self) -> bool:
        """Return whether all steps are done."""
        return self.left is not None and self.left <= 0


def searcher(name: str, seed: int, *, small: bool = False, **changes: Any) -> RelaxedSearcher:
    """Return a search in the DARTS space, or in the smaller one, in which it takes seconds."""
    task = open_task("digits")
    family: Any = darts_family(image=task.input_shape, num_classes=task.num_classes, channels=4, cells=4)
    if small:
        family = NasBench201Family(image=task.input_shape, num_classes=task.num_classes, channels=4, cells=1)
    method: Any = {"darts": darts, "rarts": rarts}[name]
    found: RelaxedSearcher = method.Searcher(
        family=family, task=task, settings=method.Settings(**SEARCH, **FINAL, **changes), seed=seed
    )
    return found


def times() -> list[str]:
    """Return lines on the time of a step."""
    made = {
        "DARTS, first order": searcher("darts", 0, order="first"),
        "DARTS, second order": searcher("darts", 0, order="second"),
        "RARTS, fused": searcher("rarts", 0, passes="fused"),
        "RARTS, Gauss-Seidel": searcher("rarts", 0, passes="gauss-seidel"),
    }
    seconds = interleaved(
        {name: lambda each=each: each.advance(Steps(1)) for name, each in made.items()},
        rounds=ROUNDS,
        warmup=WARMUP,
        clock="cpu",
    )
    lines = [machine(1, ROUNDS)]
    for name, values in seconds.items():
        middle, low, high = ratio(values, seconds["DARTS, second order"])
        lines.append(f"{name:22} {spread(values)}  of second order {middle:.2f} ({low:.2f} to {high:.2f})")
    return lines


def cells(seed: int) -> dict[str, float]:
    """Return test accuracies of the cells that both find."""
    found = {}
    for label, search in (
        ("DARTS, first order", searcher("darts", seed, small=True, order="first")),
        ("RARTS, fused", searcher("rarts", seed, small=True)),
    ):
        while not search.done:
            search.advance(Steps())
        network = search.deliver().network.eval()
        found[label] = float(open_task("digits").evaluate(network, "test")["accuracy"])
    return found


class Plain(nn.Module):
    """Three convolutions, for the search of widths."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 32)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, s in zip(widths, widths[1:], (1, 2, 1), strict=False)
            )
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.layers(x).mean((2, 3)))
        return logits


def widths(seed: int, penalty: float) -> dict[str, Any]:
    """Return what is left of the plain network under a penalty, and its accuracy."""
    task = open_task("digits")
    settings = {**rarts_width.PRESETS["small"], "penalty": penalty, "epochs_after": 5}
    search = rarts_width.Searcher(
        model=OwnModel("rarts:Plain", seed),
        task=task,
        settings=rarts_width.Settings(**settings),
        costs=OwnCosts(Plain(), task, None, {"minimum": 1, "divisor": 1}, EarlyJournal()),
        seed=seed,
    )
    figures: dict[str, Any] | None = None
    while not search.done:
        figures = search.advance(Steps())
    assert figures is not None
    network = search.deliver().network.eval()
    accuracy = float(task.evaluate(network, "test")["accuracy"])
    return {"channels": figures["atoms"], "macs": figures["macs_fraction"], "accuracy": accuracy}


def kept(file: Path, make: Any) -> Any:
    """Return what is in a file, made and written where there is none."""
    if not file.exists():
        write_json(file, make())
    return read_json(file)


def line(name: str, values: list[float]) -> str:
    """Return the mean with its interval, and every value."""
    mean, low, high = mean_interval(values) or (values[0],) * 3
    return f"{name:34} {mean:.4f} [{low:.4f}, {high:.4f}]  each " + ", ".join(f"{value:.4f}" for value in values)


def main() -> None:
    """Run what is missing and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    print("\n".join(kept(arguments.out / "times.json", times)), flush=True)
    rows = [kept(arguments.out / f"cells-{seed}.json", lambda seed=seed: cells(seed)) for seed in arguments.seeds]
    for name in rows[0]:
        print(line(name, [row[name] for row in rows]))
    first, second = rows[0]
    print(line("RARTS minus DARTS, paired", [row[second] - row[first] for row in rows]), flush=True)
    for penalty in PENALTIES:
        found = [
            kept(arguments.out / f"widths-{penalty}-{seed}.json", lambda s=seed, p=penalty: widths(s, p))
            for seed in arguments.seeds
        ]
        for figure in ("channels", "macs", "accuracy"):
            print(line(f"penalty {penalty}: {figure}", [float(row[figure]) for row in found]), flush=True)
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()

"""Selection by perturbation against selection by magnitude in restricted DARTS spaces, on the digits.

    python benchmarks/evidence/darts_pt.py --space s4 --seeds 0 1 2 3 4 --out runs/darts-pt-s4

For each seed, in the space "s2" (skip or separable convolution) or "s4" (noise or separable convolution):

- DARTS, first order, and its cells by magnitude;
- a supernet whose logits stay at their initial values, 1e-3 N(0, 1), and its cells by perturbation;

each trained from scratch by the same recipe; beside them magnitude among random logits of standard deviation 1. Prints
how many of the 28 edges chose the convolution, how many of the 16 that were kept, and test accuracies. Typed again it
goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from archsmith import open_task
from archsmith.core.files import read_json, write_json
from archsmith.families.darts import darts_family
from archsmith.methods import darts, darts_pt
from archsmith.run.intervals import mean_interval
from archsmith.run.relaxed_search import RelaxedSearcher

USEFUL = "sep_conv_3x3"
SEARCH: dict[str, Any] = {
    "order": "first",
    "search_epochs": 12,
    "search_batch_size": 64,
    "search_channels": 4,
    "search_cells": 4,
    "search_lr": 0.1,
    "selection_interval": 1,
}
FINAL: dict[str, Any] = {
    "epochs": 15,
    "batch_size": 32,
    "lr": 0.05,
    "drop_path": 0.0,
    "auxiliary_weight": 0.0,
}


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def chosen_by_magnitude(searcher: RelaxedSearcher, scale: float | None = None) -> list[str]:
    """Return the operation of every edge; with ``scale`` for random logits of that standard deviation."""
    assert searcher.supernet is not None
    mixing = searcher.supernet.probabilities()
    if scale is not None:
        generator = torch.Generator().manual_seed(searcher.seed)
        mixing = {name: scale * torch.randn(rows.shape, generator=generator) for name, rows in mixing.items()}
    options = searcher.supernet.options
    return [options[group][edge][int(row.argmax())] for group in options for edge, row in enumerate(mixing[group])]


def run(searcher: RelaxedSearcher) -> tuple[list[str], list[str], RelaxedSearcher]:
    """Run to the end; return the operations by magnitude and, where there is one, by the selection's decisions."""
    by_size: list[str] = []
    while not searcher.done:
        if searcher.supernet is not None:
            by_size = by_size if searcher.supernet.fixed else chosen_by_magnitude(searcher)
        searcher.advance(Silent())
    decided = []
    if searcher.selection is not None:
        machine = searcher.selection.machine
        decided = [machine.options[g][e][o] for g, chosen in machine.chosen.items() for e, o in sorted(chosen.items())]
    return by_size, decided, searcher


def one_seed(space: str, seed: int, limit: int | None) -> dict[str, Any]:
    """Return shares of edges that chose the convolution, and test accuracies."""
    task = open_task("digits", **({} if limit is None else {"limit": limit}))
    family = darts_family(image=task.input_shape, num_classes=task.num_classes, channels=4, cells=4, restricted=space)
    made = {
        "DARTS, magnitude": darts.Searcher(
            family=family, task=task, settings=darts.Settings(**SEARCH, **FINAL), seed=seed
        ),
        "fixed logits, perturbation": darts_pt.Searcher(
            family=family, task=task, settings=darts_pt.Settings(**SEARCH, **FINAL, fixed_alpha=True), seed=seed
        ),
    }
    result: dict[str, Any] = {}
    chance = chosen_by_magnitude(made["fixed logits, perturbation"], scale=1.0)
    result["random logits, magnitude"] = {"useful": chance.count(USEFUL) / len(chance)}
    for name, searcher in made.items():
        begun = time.perf_counter()
        by_size, decided, searcher = run(searcher)
        edges = decided or by_size
        network = searcher.deliver().network
        assert searcher.chosen is not None
        kept = [value for path, value in searcher.chosen.decisions.items() if "op" in path]
        result[name] = {
            "useful": edges.count(USEFUL) / len(edges),
            "kept": kept.count(USEFUL) / len(kept),
            "accuracy": float(task.evaluate(network.eval(), "test")["accuracy"]),
            "seconds": round(time.perf_counter() - begun),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="s4", choices=["s2", "s4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--limit", type=int, default=None, help="training images at most")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        file = arguments.out / f"{arguments.space}-{seed}.json"
        if not file.exists():
            write_json(file, one_seed(arguments.space, seed, arguments.limit))
        rows.append(read_json(file))
        print(f"seed {seed}: {rows[-1]}", flush=True)
    for name in rows[0]:
        line = f"{arguments.space}  {name:28}"
        for figure in ("useful", "kept", "accuracy"):
            if figure in rows[0][name]:
                values = [row[name][figure] for row in rows]
                mean, low, high = mean_interval(values) or (values[0],) * 3
                line += f"  {figure} {mean:.3f} [{low:.3f}, {high:.3f}]"
        print(line)


if __name__ == "__main__":
    main()

"""EAS on real images, at the size of one CPU core: what inheritance is worth, and what the controller learns.

For each seed a start network is trained once. Then episodes of networks are grown from it, once by the controller and
once by random actions (the baseline), each network trained for one epoch from its inherited weights; the controller's
networks are trained a second time from fresh weights, all else equal. Images are the digits in scikit-learn (8x8), or
the balanced subset of CIFAR-10 beside the checkout, reduced to 16x16 pixels.

    python benchmarks/evidence/eas.py --seeds 5
    python benchmarks/evidence/eas.py --data FOLDER --seeds 3 --space dense
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
from deeparchitect import cifar10_subset

from archsmith.evaluate.weights import MemoryWeightStore
from archsmith.methods.eas import Settings, evaluator, preset_settings, strategy
from archsmith.run.statistics import summarise
from archsmith.tasks.base import Task
from archsmith.tasks.catalogue import open_task


def searched(task: Task, settings: Settings, seed: int, *, compare: bool) -> dict[str, list[float]]:
    """Return the validation accuracies in percent of one search; "fresh" are its networks from fresh weights."""
    trainer, weights = evaluator(task, settings, costs=()), MemoryWeightStore()
    search = strategy(trainer.candidate.family.space, settings, seed)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {"start": [], "inherited": [], "fresh": []}
    before = search.action_probabilities()
    while not search.done:
        for trial in search.ask(settings.nets):
            result = trainer.evaluate(trial, weights=weights)
            found["start" if trial.parent is None else "inherited"].append(100 * result.metrics["valid_accuracy"])
            if compare and trial.parent is not None:
                found["fresh"].append(100 * trainer.evaluate(trial).metrics["valid_accuracy"])
            search.tell(trial.id, result)
    if settings.policy == "controller":
        after = search.action_probabilities(trainer.candidate.family.space.start())  # type: ignore[attr-defined]
        for kind in ("widen", "deepen"):
            pairs = zip(before[kind], after[kind], strict=True)
            print(f"  seed {seed} {kind}: " + ", ".join(f"{name} {p:.3f}->{q:.3f}" for (name, p), (_, q) in pairs))
    return found


def interval(values: list[float]) -> str:
    """Return mean and 95 % interval."""
    summary = summarise(values)
    return f"{summary.mean:.2f} [{summary.low:.2f}, {summary.high:.2f}]"


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the CIFAR-10 subset; without it the digits")
    parser.add_argument("--space", choices=["plain", "dense"], default="plain")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--nets", type=int, default=4)
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--no-fresh", action="store_true", help="leave out the second training from fresh weights")
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = open_task("digits") if given.data is None else cifar10_subset(given.data)
    preset = {**preset_settings(task.input_shape), "nets": given.nets, "episodes": given.episodes, "space": given.space}
    print(f"{task.name}, {given.space}, {given.nets} nets x {given.episodes} episodes, seeds 0..{given.seeds - 1}")
    print(f"{platform.machine()}, python {platform.python_version()}, torch {torch.__version__}, 1 thread")
    started = time.perf_counter()
    rows: dict[str, list[dict[str, list[float]]]] = {"controller": [], "random": []}
    for seed in range(given.seeds):
        for policy, runs in rows.items():
            settings = Settings(**{**preset, "policy": policy})
            runs.append(searched(task, settings, seed, compare=policy == "controller" and not given.no_fresh))
            figures = {name: round(float(np.mean(values)), 2) for name, values in runs[-1].items() if values}
            best = max(runs[-1]["inherited"])
            print(
                f"  seed {seed} {policy}: {figures}, best {best:.2f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    grown = rows["controller"]
    names = ("start", "inherited") if given.no_fresh else ("start", "inherited", "fresh")
    mean = {name: [float(np.mean(run[name])) for run in grown] for name in names}
    print("(late: the last third of the episodes)")
    print("| mean over seeds, % | value [95 % interval] |")
    print("|---|---|")
    for name, values in mean.items():
        print(f"| {name} | {interval(values)} |")
    if not given.no_fresh:
        pairs = [a - b for run in grown for a, b in zip(run["inherited"], run["fresh"], strict=True)]
        gains = [a - b for a, b in zip(mean["inherited"], mean["fresh"], strict=True)]
        print(f"| inherited - fresh | {interval(gains)}; {sum(p > 0 for p in pairs)} of {len(pairs)} networks |")
    late = max(1, given.episodes // 3) * given.nets
    for what, function in (("mean", np.mean), ("late", lambda values: np.mean(values[-late:])), ("best", np.max)):
        own, other = (
            [float(function(run["inherited"])) for run in rows[policy]] for policy in ("controller", "random")
        )
        difference = interval([a - b for a, b in zip(own, other, strict=True)])
        print(f"| {what} of a search: controller / random | {interval(own)} / {interval(other)} |")
        print(f"| {what} of a search: controller - random | {difference} |")


if __name__ == "__main__":
    main()

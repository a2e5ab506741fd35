"""ST-NAS on spoken digits: what it derives against random networks of the same space, each trained alike.

Real recordings (Free Spoken Digit Dataset, official split: 300 test recordings of six speakers whom training hears
too). For each seed the search runs once; then as many random architectures as asked are trained as its final stage
trains the derived one: same rule, same rates, same examples, the seed's own weights. Also printed: the probabilities of
the derived candidates, and what the straight-through step keeps for its backward pass beside a softmax mixture.

Every finished network is kept in ``--out``: type the same command again to go on.

Run: ``python benchmarks/evidence/st_nas.py --data FSDD --out runs/evidence-st-nas``
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from archsmith.core.files import read_json, write_json
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.families.tdnn import TdnnFamily
from archsmith.methods.st_nas import Searcher, Settings, preset_settings, rules_of
from archsmith.run.intervals import mean_interval
from archsmith.supernet import Softmax, StraightThrough
from archsmith.tasks import open_task
from archsmith.tasks.base import Task
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.milestones import Milestones

CHANGES = {"warmup_epochs": 6, "search_epochs": 8, "search_lr": 5e-3, "lr": 5e-3, "warmup_free": 3}
"""Settings that differ from the small recipe: a run is minutes on one core."""


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def searched(task: Task, family: TdnnFamily, settings: Settings, seed: int) -> dict[str, Any]:
    """Run the whole method; return its network's scores and how its probabilities went."""
    begun = time.process_time()
    searcher = Searcher(family=family, task=task, settings=settings, seed=seed)
    stages: dict[str, int] = {}
    probabilities = []
    until_chosen = 0.0
    while not searcher.done:
        figures = searcher.advance(Silent())
        assert figures is not None
        stages[figures["phase"]] = stages.get(figures["phase"], 0) + 1
        if "probabilities" in figures:
            probabilities.append(figures["probabilities"]["blocks"])
            until_chosen = time.process_time() - begun
    network = searcher.deliver().network
    return {
        "architecture": dict(searcher.deliver().architecture),
        "stages": stages,
        "probabilities": probabilities[-1],
        "entropy": [entropy(rows) for rows in probabilities],
        "search_seconds": until_chosen,
        "seconds": time.process_time() - begun,
        **scored(task, network),
    }


def trained(task: Task, family: TdnnFamily, settings: Settings, architecture: Any, seed: int) -> dict[str, Any]:
    """Train a network as the final stage trains the derived one."""
    begun = time.process_time()
    network = family.build(architecture, seed=seed_of(seed, "final-weights"))
    optimizer = torch.optim.Adam(network.parameters(), settings.lr)
    milestones, position, kept = Milestones(rules_of(settings)["final"]), Position(), network.state_dict()
    while position.epoch < settings.epochs and not milestones.stopped:
        hooks = LoopHooks(rate=lambda step: milestones.lr)
        train_epoch(network, optimizer, task, position, hooks, batch_size=settings.batch_size, seed=seed)
        next_epoch(position)
        loss = float(task.evaluate(network.eval(), "valid")["loss"])
        if milestones.tell(loss) == "new best":
            kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(kept)
    return {
        "architecture": dict(architecture),
        "epochs": position.epoch,
        "seconds": time.process_time() - begun,
        **scored(task, network),
    }


def scored(task: Task, network: nn.Module) -> dict[str, float]:
    """Return accuracies and token errors in percent."""
    network = network.eval()
    valid, test = task.evaluate(network, "valid"), task.evaluate(network, "test")
    return {
        "valid": 100 * valid["accuracy"],
        "test": 100 * test["accuracy"],
        "test_token_errors": 100 * test["token_error_rate"],
    }


def entropy(rows: list[list[float]]) -> float:
    """Return the mean entropy of the rows in nats."""
    p = np.asarray(rows)
    return float(-(p * np.log(np.maximum(p, 1e-12))).sum(1).mean())


def kept_elements(task: Task, family: TdnnFamily) -> dict[str, int]:
    """Return how many numbers a step on the logits keeps for its backward pass, batch of 64."""
    batch = next(iter(task.batches("train", batch_size=64)))
    counts = {}
    for name, relaxation in (("one path", None), ("straight-through", StraightThrough()), ("mixture", Softmax())):
        supernet = family.relaxed(seed=0, relaxation=relaxation or StraightThrough())
        mixing = supernet.mixing(generator=torch.Generator().manual_seed(0))
        if relaxation is None:
            mixing = {group: weights.detach() for group, weights in mixing.items()}
        seen: list[int] = []

        def pack(tensor: torch.Tensor, seen: list[int] = seen) -> torch.Tensor:
            seen.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            supernet(batch.inputs, mixing)
        counts[name] = sum(seen)
    return counts


def shown(values: list[float]) -> str:
    """Return mean and half the 95 % interval (t distribution)."""
    mean, low, _ = mean_interval(values) or (statistics.fmean(values), float("nan"), 0.0)
    return f"{mean:.2f} ± {mean - low:.2f}"


def main() -> None:
    """Run what is missing and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the recordings")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random", type=int, default=3, help="random networks for each seed")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=80, help="at most, of the final stage and of random networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = open_task("spoken-digits", data=options.data)
    family = TdnnFamily(
        image=task.input_shape, num_classes=task.num_classes, width=options.width, blocks=4, stride_after=2, dropout=0.1
    )
    settings = Settings(**{**preset_settings(task.input_shape), **CHANGES, "epochs": options.epochs})
    print(f"archsmith, torch {torch.__version__}; {settings.model_dump()}")
    print("numbers kept for a backward pass:", kept_elements(task, family))
    options.out.mkdir(parents=True, exist_ok=True)

    def once(name: str, run: Any) -> Any:
        path = options.out / f"{name}.json"
        if not path.exists():
            write_json(path, run())
        return read_json(path)

    derived, others = [], []
    for seed in range(options.seeds):
        ours = once(f"st-nas-{seed}", lambda seed=seed: searched(task, family, settings, seed))
        derived.append(ours)
        rng = numpy_stream(seed, "random-networks")
        group = []
        for number in range(options.random):
            architecture = family.space.sample(rng)
            row = once(
                f"random-{seed}-{number}",
                lambda architecture=architecture, seed=seed: trained(task, family, settings, architecture, seed),
            )
            group.append(row)
        others.append(group)
        names = " ".join(ours["architecture"].values())
        print(f"seed {seed}: {names} | stages {ours['stages']} | entropy {ours['entropy'][0]:.3f} to", end=" ")
        print(f"{ours['entropy'][-1]:.3f} | valid {ours['valid']:.1f} test {ours['test']:.1f}", end=" ")
        print(f"token errors {ours['test_token_errors']:.1f} | search {ours['search_seconds']:.0f} s of", end=" ")
        tests = ", ".join(f"{row['test']:.1f}" for row in group)
        print(f"{ours['seconds']:.0f} s | random test {tests}")
    print("\n| | test accuracy, % | token errors, % |\n|---|---|---|")
    flat = [row for group in others for row in group]
    for name, rows in (("derived", derived), ("random", flat)):
        print(f"| {name} ({len(rows)}) | {shown([r['test'] for r in rows])} |", end="")
        print(f" {shown([r['test_token_errors'] for r in rows])} |")
    paired = [
        ours["test"] - statistics.fmean(row["test"] for row in group)
        for ours, group in zip(derived, others, strict=True)
    ]
    print(f"derived minus mean random of the same seed: {shown(paired)}")


if __name__ == "__main__":
    main()

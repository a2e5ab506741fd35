"""ProxylessNAS on handwritten digits, with and without latency in the loss of the logits, against random networks.

One latency table is measured at the beginning and serves all runs. Every search has the small recipe (``PRESETS``) and
one thread; what it derives is trained from scratch. A random network of the space is trained by the same recipe for
every seed. At the end whole networks are timed, interleaved, beside what the table says of them: the derived ones, and
``--random`` sampled ones for the rank correlation of the table.

Every finished (variant, seed) is kept in ``--out``: type the same command again to go on; ``--read`` only prints.

Run: ``python benchmarks/evidence/proxylessnas.py --out runs/evidence-proxylessnas``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from archsmith.core.files import write_json
from archsmith.core.rng import numpy_stream
from archsmith.cost import LookupTable, measure_many, measure_table
from archsmith.families.mobile_chain import ChainFamily, chain_family
from archsmith.methods.proxylessnas import Searcher, Settings, preset_settings
from archsmith.run.costs import CostModel
from archsmith.run.prepare import EarlyJournal
from archsmith.space import Architecture
from archsmith.tasks import open_task
from archsmith.tasks.vision import ImageClassification
from archsmith.train.recipe import Training, TrainingRecipe

VARIANTS: dict[str, dict[str, Any]] = {
    "no cost": {"cost": "none"},
    "latency, weight 0.1": {"cost": "latency", "cost_weight": 0.1},
    "latency, weight 1": {"cost": "latency", "cost_weight": 1.0},
}
RANDOM = "random network"


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def found(
    variant: str, task: ImageClassification, family: ChainFamily, table: LookupTable, changes: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Run a search and the training of what it derives; return what came out."""
    costs = CostModel(family, None, EarlyJournal([{"kind": "latency_table", "table": table.to_json()}]))
    settings = Settings(**{**preset_settings(task.input_shape), **VARIANTS[variant], **changes})
    begun = time.process_time()
    search = Searcher(family=family, task=task, settings=settings, costs=costs, seed=seed)
    epochs = []
    while not search.done:
        figures = search.advance(Silent())
        assert figures is not None
        epochs.append({name: figures.get(name) for name in ("phase", "train_accuracy", "valid_accuracy", "entropy")})
        if "probabilities" in figures:
            probabilities = {"blocks": torch.tensor(figures["probabilities"]["blocks"])}
            epochs[-1]["expected_latency_ms"] = float(family.expected_latency(table)(probabilities))
    return {
        **outcome(search.deliver().network, search.chosen, task, family, table),
        "figures": search.figures,
        "epochs": epochs,
        "seconds": time.process_time() - begun,
    }


def drawn(
    task: ImageClassification, family: ChainFamily, table: LookupTable, changes: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Train one random network by the recipe of the derived ones."""
    settings = Settings(**{**preset_settings(task.input_shape), **changes})
    architecture = family.space.sample(numpy_stream(seed, "random-chain"))
    recipe = TrainingRecipe(
        epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, weight_decay=settings.weight_decay
    )
    begun = time.process_time()
    network = family.build(architecture, seed=seed)
    training = Training(network, task, recipe, seed=seed)
    training.run(settings.epochs)
    return {**outcome(network, architecture, task, family, table), "seconds": time.process_time() - begun}


def outcome(
    network: nn.Module, architecture: Any, task: ImageClassification, family: ChainFamily, table: LookupTable
) -> dict[str, Any]:
    """Return what is known of a trained network."""
    return {
        "architecture": architecture.to_json(),
        "chain": " ".join(family.chosen(architecture)),
        "valid": task.evaluate(network.eval(), "valid")["accuracy"],
        "test": task.evaluate(network.eval(), "test")["accuracy"],
        "table_ms": table.cost(family.keys(architecture)),
        **family.exact_costs(architecture),
    }


def whole_networks(family: ChainFamily, table: LookupTable, count: int) -> dict[str, Any]:
    """Time sampled networks whole, interleaved, and hold the table against them."""
    rng = numpy_stream(0, "whole-networks")
    architectures = [family.space.sample(rng) for _ in range(count)]
    targets = {str(number): family.build(each, seed=0).eval() for number, each in enumerate(architectures)}
    latencies = measure_many(targets, torch.zeros(1, *family.image), rounds=20, block_ms=3.0)
    measured = [min(latency.samples_ms) for latency in latencies.values()]  # as the table's rows
    summed = [table.cost(family.keys(each)) for each in architectures]
    fitted = table.fitted([family.keys(each) for each in architectures], measured)
    return {
        "measured_ms": measured,
        "table_ms": summed,
        "noisy": sum(latency.noisy for latency in latencies.values()),
        "spearman": float(spearmanr(measured, summed).statistic),
        "scale": fitted.scale,
        "overhead_ms": fitted.overhead,
    }


def report(
    results: dict[str, dict[int, Any]], family: ChainFamily, table: LookupTable, whole: dict[str, Any] | None
) -> None:
    """Print what came out, run by run; latencies by the present table."""
    for run in (run for runs in results.values() for run in runs.values()):
        run["table_ms"] = table.cost(family.keys(Architecture.from_json(run["architecture"])))
    print("\n| variant | seed | blocks | params | MACs | table ms | valid % | test % | supernet %, path % | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        for seed, run in sorted(runs.items()):
            figures = run.get("figures", {})
            pair = [figures.get("supernet_accuracy"), figures.get("selected_path_accuracy")]
            gap = ", ".join("-" if value is None else f"{100 * value:.1f}" for value in pair)
            print(
                f"| {name} | {seed} | {run['chain']} | {run['params']:,} | {run['macs']:,} | {run['table_ms']:.2f} | "
                f"{100 * run['valid']:.1f} | {100 * run['test']:.1f} | {gap} | {run['seconds']:.0f} |"
            )
    for name, runs in results.items():
        rows = list(runs.values())
        means = {key: statistics.fmean(run[key] for run in rows) for key in ("table_ms", "test", "macs")}
        print(
            f"{name}: {len(rows)} runs, table {means['table_ms']:.2f} ms, {means['macs']:,.0f} MACs, "
            f"test {100 * means['test']:.1f} %"
        )
    if whole is not None:
        print(
            f"{len(whole['measured_ms'])} whole networks: Spearman {whole['spearman']:.2f} with the table, "
            f"{whole['noisy']} noisy; least squares {whole['scale']:.2f} x sum + {whole['overhead_ms']:.2f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[*VARIANTS, RANDOM])
    parser.add_argument("--random", type=int, default=24, help="whole networks that are timed")
    parser.add_argument("--set", nargs="*", default=[], help="settings that differ from the recipe, name=integer")
    parser.add_argument("--read", action="store_true", help="only print what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    task = open_task("digits", label_smoothing=0.1)
    assert isinstance(task, ImageClassification)
    family = chain_family(image=task.input_shape, num_classes=task.num_classes)
    changes = {name: int(value) for name, value in (pair.split("=") for pair in given.set)}
    stored, timed = given.out / "table.json", given.out / "whole.json"
    if not stored.exists():
        write_json(stored, measure_table(family.measurable()).to_json())
    table = LookupTable.from_json(json.loads(stored.read_text()))
    results: dict[str, dict[int, Any]] = {}
    for seed in given.seeds:
        for name in [*VARIANTS, RANDOM]:
            file = given.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
            known = json.loads(file.read_text()) if file.exists() else None
            if not given.read and known is None and name in given.only:
                run = [task, family, table, changes, seed]
                known = drawn(*run) if name == RANDOM else found(name, *run)
                write_json(file, known)
                print(f"{name}, seed {seed}: {known['chain']} {100 * known['test']:.1f} %", flush=True)
            if known is not None:
                results.setdefault(name, {})[seed] = known
    if not given.read and not timed.exists() and given.random:
        write_json(timed, whole_networks(family, table, given.random))
    report(results, family, table, json.loads(timed.read_text()) if timed.exists() else None)


if __name__ == "__main__":
    main()

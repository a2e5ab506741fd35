"""SimQ-NAS against searching architecture and precision one after the other, at equal numbers of measured candidates.

For each seed one supernet (family "bignas") is trained on the digits by BigNAS's step. Then searches with
``--evaluations`` candidates each, all of them exported, calibrated on training images, quantised and run by ONNX
Runtime on the validation part:

- joint: LINAS over children and policies (SimQ-NAS), as published, and with half of the first batch in one policy for
  all layers;
- (i) architecture, then uniform int8: LINAS over children in fp32, then the children that it measured are quantised
  whole and measured again: half as many children, and, at twice the cost of the others, as many;
- (ii) policy alone: LINAS over the policies of the largest child.

Printed: the hypervolume of (accuracy, analytic size), relative to the box between nothing and the largest child in
fp32; for the fronts of the first seed accuracy, size and the measured latency of the quantised files beside the largest
child in fp32 and in uniform int8.

Run: ``OMP_NUM_THREADS=1 python benchmarks/evidence/simq_nas.py [--seeds 3] [--evaluations 100] [--epochs 30]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from archsmith.families.bignas import bignas_family
from archsmith.methods.simq_nas import JointSearch, Searcher, Settings, exact_size, preset_settings
from archsmith.run.intervals import mean_interval
from archsmith.space import (
    Architecture,
    Categorical,
    JointSpace,
    LayerPolicy,
    Objective,
    ProductSpace,
    Result,
    hypervolume_of,
    pareto_front,
)
from archsmith.strategies.inner_search import Evolution
from archsmith.strategies.linas import linas
from archsmith.tasks import open_task

INT8, FP32 = LayerPolicy("int8"), LayerPolicy("fp32")
Evaluate = Callable[[Architecture], Result]


class Silent:
    """A monitor that never stops."""

    def step(self, total: int, **figures: float) -> None:
        """Take no notice."""

    def should_stop(self) -> bool:
        """Return False."""
        return False


def searched(
    space: Any, evaluate: Evaluate, sizes: Any, objectives: Any, seed: int, given: Any, start: str | None = None
) -> list[tuple[Architecture, Result]]:
    """Return what LINAS measured."""
    shared: dict[str, Any] = {"objectives": objectives, "exact": {"size": sizes}, "seed": seed}
    if start is None:
        strategy = linas(space, population=20, evaluations=1_000, **shared)
    else:
        inner = Evolution(population=20, evaluations=1_000)
        strategy = JointSearch(space, start=start, batch=20, inner=inner, select="rank", **shared)
    found = []
    while len(found) < given.evaluations and (trials := strategy.ask()):
        (trial,) = trials
        result = evaluate(trial.architecture)
        strategy.tell(trial.id, result)
        found.append((trial.architecture, result))
    return found


def one_seed(seed: int, given: Any, task: Any) -> tuple[dict[str, float], Searcher, dict[str, list[Any]]]:
    """Train a supernet, run the four searches; return hypervolumes, the search, and points by name."""
    family = bignas_family("tiny", image=task.input_shape, num_classes=task.num_classes)
    settings = Settings(
        **{**preset_settings(task.input_shape), "epochs": given.epochs, "batch_size": 32, "ranges": "minmax"}
    )
    search = Searcher(family=family, task=task, settings=settings, seed=seed)
    begun = time.perf_counter()
    while not search.selecting:
        search.advance(Silent())
    joint, largest = search.joint, family.largest()
    whole = 4.0 * family.exact_costs(largest)["params"]
    objectives = (Objective("valid_accuracy", "maximize", 0.0), Objective("size", "minimize", whole))
    search.evaluator.kept = 2 * given.evaluations
    print(
        f"seed {seed}: trained in {time.perf_counter() - begun:.0f} s; the largest child: fp32 "
        f"{search.evaluate(joint.with_policy(largest, FP32)).accuracy:.4f}, "
        f"int8 {search.evaluate(joint.with_policy(largest, INT8)).accuracy:.4f}",
        flush=True,
    )

    def sizes(each: Any) -> np.ndarray:
        return np.array([exact_size(family, joint, one) for one in each], dtype=np.float64)

    points: dict[str, list[tuple[Architecture, Result]]] = {}
    for name, start in (("joint", "random"), ("joint, uniform start", "uniform")):
        points[name] = searched(joint, search.evaluator.result, sizes, objectives, seed, given, start)

    def in_fp32(child: Architecture) -> Result:
        return search.evaluator.result(joint.with_policy(child, FP32))

    def sizes_in_fp32(each: Any) -> np.ndarray:
        return sizes([joint.with_policy(one, FP32) for one in each])

    children = searched(family.space, in_fp32, sizes_in_fp32, objectives, seed, given)
    uniform = [joint.with_policy(child, INT8) for child, _ in children]
    rows = [(each, search.evaluator.result(each)) for each in uniform]
    points["(i) architecture, then int8"], points["(i) at twice the cost"] = rows[: given.evaluations // 2], rows

    policies = JointSpace(
        ProductSpace("largest", {"child": Categorical(("largest",))}),
        dict.fromkeys(joint.active_sites(largest)),
        schemes=settings.schemes,
    )

    def of_largest(policy: Architecture) -> Architecture:
        return joint.with_policy(largest, policies.policy(policy))

    found = searched(
        policies,
        lambda policy: search.evaluator.result(of_largest(policy)),
        lambda each: sizes([of_largest(one) for one in each]),
        objectives,
        seed,
        given,
    )
    points["(ii) policy alone"] = [(of_largest(policy), result) for policy, result in found]
    volumes = {
        name: hypervolume_of([result for _, result in rows], objectives).value / whole for name, rows in points.items()
    }
    print(
        f"  {time.perf_counter() - begun:.0f} s: " + ", ".join(f"{k} {v:.4f}" for k, v in volumes.items()), flush=True
    )
    return volumes, search, points


def gap_between(gaps: list[float]) -> str:
    """Return mean and half the 95 % interval (t distribution) of paired differences."""
    mean, low, _ = mean_interval(gaps) or (statistics.fmean(gaps), float("nan"), 0.0)
    return "" if not any(gaps) else f"{mean:+.4f} ± {mean - low:.4f}"


def show_front(search: Searcher, points: dict[str, list[Any]]) -> None:
    """Print measured latencies of fronts and of the uniform policies of the largest child."""
    objectives = (Objective("valid_accuracy"), Objective("size", "minimize"))
    largest = search.family.largest()
    rows = [
        ("largest, fp32", search.joint.with_policy(largest, FP32)),
        ("largest, int8", search.joint.with_policy(largest, INT8)),
    ]
    for name in ("joint, uniform start", "(i) architecture, then int8"):
        results = [result for _, result in points[name]]
        front = sorted(pareto_front(results, objectives), key=lambda at: -results[at].metrics["valid_accuracy"])
        rows += [(name, points[name][at][0]) for at in front[:8]]
    print("\n| point | accuracy | size, kB | int8 layers | latency, ms (ONNX Runtime, batch 1) | spread |")
    print("|---|---|---|---|---|---|")
    for name, architecture in rows:
        result = search.evaluator.result(architecture)
        latency = search.evaluator.measured(search.evaluator.file(architecture))
        policy = search.joint.policy(architecture)
        narrow = sum(each.precision == "int8" for each in policy.values())
        cells = [f"{result.metrics['valid_accuracy']:.4f}", f"{result.costs['size'] / 1e3:.1f}"]
        cells += [f"{narrow} of {len(policy)}", f"{latency.median_ms:.4f} (fastest {min(latency.samples_ms):.4f})"]
        print(f"| {name} | {' | '.join(cells)} | {latency.iqr_ms / latency.median_ms:.2f} |")


def main() -> None:
    """Run all seeds and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = open_task("digits")
    found, shown = [], None
    for seed in range(given.seeds):
        volumes, search, points = one_seed(seed, given, task)
        found.append(volumes)
        shown = shown or (search, points)
    print("\n| search | hypervolume | by seed | joint minus it | joint, uniform start, minus it |")
    print("|---|---|---|---|---|")
    for name in found[0]:
        values = [each[name] for each in found]
        joint = ("joint", "joint, uniform start")
        gaps = " | ".join(gap_between([each[other] - each[name] for each in found]) for other in joint)
        print(f"| {name} | {statistics.fmean(values):.4f} | {', '.join(f'{v:.4f}' for v in values)} | {gaps} |")
    if shown is not None:
        show_front(*shown)


if __name__ == "__main__":
    main()

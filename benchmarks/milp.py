"""Seconds to the proven optimum of the grouped knapsack: 80 layers x 54 alternatives under three limits.

Instances: "llm" as a block library gives them (6 attention x 9 FFN variants, divergences that grow with what is
removed, memory with a cache for each batch, a runtime with noise); "uncorrelated" random tables; "correlated": the
three costs follow the size of an alternative within 10 %, and its harm is the saved size plus noise; "strongly
correlated" without the noise: the hard cases of knapsacks; "independent": three unrelated costs and a harm that is
exactly their mean saving, as hard as it gets. Limits at 50, 70 and 90 % between the smallest and the largest sum.

Run: ``python benchmarks/milp.py [--seeds 3]``
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import scipy

from archsmith.core.errors import ArchsmithError
from archsmith.strategies.block_baselines import greedy
from archsmith.strategies.milp import solve

LAYERS, ATTENTION, FFN = 80, 6, 9
KINDS = ("llm", "uncorrelated", "correlated", "strongly correlated", "independent")
NAMES = ("memory", "runtime", "params")


def instance(kind: str, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return scores (80, 54) and three cost tables of the same shape."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, ATTENTION * FFN)
    if kind == "llm":
        kv = np.array([8, 4, 2, 1, 0, 0])
        ffn = np.array([1, 0.87, 0.75, 0.5, 0.25, 0.2, 0.1, 0.11, 0])
        attention = np.array([1.0, 0.9, 0.85, 0.82, 0.4, 0])
        width = 28672 * 8192 * 3
        parameters = (attention * 151e6)[:, None] + (ffn * width)[None, :]
        memory = 2 * parameters + (256 * kv * 128 * 4 * 4096.0)[:, None]
        runtime = (0.2 + attention + 0.1 * kv / 8)[:, None] + (0.1 + 2.2 * ffn)[None, :]
        noise = rng.uniform(0.98, 1.02, (LAYERS, ATTENTION, FFN))
        harm_a, harm_f = (1 - attention) ** 2 + 0.02 * (8 - kv) / 8, (1 - ffn) ** 1.5
        depth = rng.lognormal(0, 0.8, (2, LAYERS, 1, 1))
        score = depth[0] * harm_a[None, :, None] + depth[1] * harm_f[None, None, :]
        score = score * rng.uniform(0.8, 1.2, score.shape)
        tables = {"memory": memory * np.ones_like(noise), "runtime": runtime * noise, "params": parameters + 0 * noise}
        return score.reshape(shape), {name: table.reshape(shape) for name, table in tables.items()}
    if kind == "uncorrelated":
        return rng.random(shape), {name: rng.random(shape) for name in NAMES}
    if kind == "independent":
        costs = {name: rng.integers(1, 1000, shape).astype(float) for name in NAMES}
        return sum(1000 - table for table in costs.values()) / 3, costs
    size = rng.uniform(1, 1000, shape)
    costs = {name: size * rng.uniform(0.9, 1.1, shape) for name in NAMES}
    return 1000 - size + (rng.uniform(0, 100, shape) if kind == "correlated" else 0), costs


def main() -> None:
    """Print one line for each instance and the slowest of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of one programme")
    arguments = parser.parse_args()
    print(f"scipy {scipy.__version__}, {LAYERS} x {ATTENTION * FFN}, 3 limits; load {os.getloadavg()[0]:.2f}")
    print(f"{'kind':22}{'limits':>8}{'seed':>6}{'seconds':>10}{'optimal':>9}{'score':>14}{'gap':>11}{'greedy':>14}")
    slowest = dict.fromkeys(KINDS, 0.0)
    for kind in KINDS:
        for share in (0.9, 0.7, 0.5):
            for seed in range(arguments.seeds):
                scores, costs = instance(kind, seed)
                limits = {
                    name: share * table.max(1).sum() + (1 - share) * table.min(1).sum() for name, table in costs.items()
                }
                tables = {name: table.tolist() for name, table in costs.items()}
                start = time.perf_counter()
                found = solve(scores.tolist(), tables, limits, seconds=arguments.seconds)
                spent = time.perf_counter() - start
                slowest[kind] = max(slowest[kind], spent)
                try:
                    other = f"{greedy(scores.tolist(), tables, limits).score:14.6g}"
                except ArchsmithError:
                    other = f"{'nothing':>14}"
                gap = (found.score - found.bound) / abs(found.score) if found.score else 0.0
                print(
                    f"{kind:22}{share:8.0%}{seed:6}{spent:10.2f}{found.optimal!s:>9}{found.score:14.6g}{gap:11.1e}{other}",
                    flush=True,
                )
    print("slowest: " + ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in slowest.items()))


if __name__ == "__main__":
    main()

"""InstaTune against shrinking at equal optimiser steps, on a real encoder: accuracy over measured latency.

The encoder is all-MiniLM-L6-v2 with mean pooling and a linear layer, on SST-2, as in ``instatune.py``. Every arm makes
``--steps`` optimiser steps in all on the same sentences, with the same rates:

- instatune: one supernet for all sizes; a search (measure and refit) over accuracy on 256 sentences kept back and the
  latency of the extracted subnet, measured beside the whole network; nothing is trained afterwards
- random: subnets of the same supernet near a level's MACs, not searched
- uniform: half of the steps, then the same size in every layer, then the other half; one training for each level
- pruned: the same with the smallest heads and hidden units by their norms gone, at the level's MACs
- slices: all steps, then the same size in every layer, nothing afterwards

A level is a uniform network; the subnet that stands for InstaTune at a level is the best one on the kept sentences
whose latency, measured again beside it, is at most that network's. In the end all networks of a seed are measured once
more, in turn.

Latencies in the search and in the tables are those of the one thread that computes, by its processor time, so that
others on the machine take less part; what the wall clock said in the end is kept beside.

Run:   ``python benchmarks/evidence/instatune_pareto.py --weights FOLDER --data sst2 --out RUNS`` (see ``instatune.py``)
Every seed leaves ``SEED.json``; typed again, the command goes on, prints the tables and, with ``--picture FILE.html``,
draws them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from instatune import KEPT_BACK, elastic_of, plain, setting, tuned
from safetensors.torch import load_file
from shrink_minilm import LENGTH, Classifier, Sentences, cut, units
from torch import nn
from transformers import BertConfig

from archsmith.cost import measure_many
from archsmith.cost.backends import threads_pinned
from archsmith.evaluate.subnets import SubnetEvaluator
from archsmith.space import Objective, Result, pareto_front, sample_by_decisions
from archsmith.strategies.linas import MeasureRefitSearch
from archsmith.supernet.elastic import Elastic

LEVELS = {
    "small": {"depth": 3, "heads": 8, "ffn": 1024},
    "middle": {"depth": 4, "heads": 8, "ffn": 1024},
    "large": {"depth": 5, "heads": 10, "ffn": 1024},
}
OBJECTIVES = (Objective("valid_accuracy", "maximize"), Objective("latency", "minimize"))
ARMS = ("instatune", "random", "uniform", "pruned", "slices")
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's t for the interval of a mean, by the number of seeds."""


def searched(elastic: Elastic, kept_back: Sentences, example, given, seed: int) -> list[dict]:
    """Let the strategy measure subnets; return all of them with validation accuracy and relative latency."""
    order = np.argsort([len(each) for each in kept_back.tokens])
    parts = []
    for start in range(0, len(order), 64):
        ids, mask, classes = kept_back.batch(order[start : start + 64])
        parts.append(((ids, mask), classes))
    evaluator = SubnetEvaluator(elastic, parts)
    strategy = MeasureRefitSearch(elastic.space, objectives=OBJECTIVES, seed=seed, initial=20, batch=10)
    whole, found = copy.deepcopy(elastic.model).eval(), []
    while len(found) < given.evaluations:
        trials = strategy.ask(given.evaluations - len(found))
        scores = evaluator.metrics_of([trial.architecture for trial in trials])
        for trial, metrics in zip(trials, scores, strict=True):
            net = elastic.extract(trial.architecture).eval()
            timed = measure_many({"whole": whole, "subnet": net}, example, warmup=2, clock=time.thread_time)
            latency = timed["subnet"].median_ms / timed["whole"].median_ms
            strategy.tell(trial.id, Result(metrics=metrics, costs={"latency": latency}))
            found.append({"architecture": trial.architecture, "valid": metrics["valid_accuracy"], "latency": latency})
    return found


def picked(elastic: Elastic, found: list[dict], nets: dict[str, nn.Module], example) -> dict[str, dict]:
    """Return for every level the best subnet on the kept sentences that is as fast as the uniform network there."""
    names = ("whole", *(f"uniform/{level}" for level in LEVELS))
    first = measure_many({n: nets[n].eval() for n in names}, example, rounds=15, clock=time.thread_time)
    limits = {level: first[f"uniform/{level}"].median_ms / first["whole"].median_ms for level in LEVELS}
    near: list[dict] = []
    for limit in limits.values():
        below = sorted((e for e in found if e["latency"] <= 1.05 * limit), key=lambda e: -e["valid"])
        near += [each for each in below[:5] if each not in near]
    near += [each for each in [min(found, key=lambda e: e["latency"])] if each not in near]
    subnets = {str(i): elastic.extract(each["architecture"]).eval() for i, each in enumerate(near)}
    again = measure_many({**{n: nets[n].eval() for n in names}, **subnets}, example, rounds=15, clock=time.thread_time)
    chosen = {}
    for level in LEVELS:
        limit = again[f"uniform/{level}"].median_ms
        fits = [each for i, each in enumerate(near) if again[str(i)].median_ms <= limit]
        chosen[level] = max(fits, key=lambda e: e["valid"]) if fits else near[-1]
    return chosen


def one_seed(config: BertConfig, pretrained, training: Sentences, kept_back, test: Sentences, given, seed: int) -> dict:
    """Train, search and measure everything of one seed."""
    ids, mask, _ = test.batch(np.array([int(np.argmax([len(each) for each in test.tokens]))]))
    example = (ids[:, :LENGTH], mask[:, :LENGTH])
    seconds: dict[str, float] = {}
    nets: dict[str, nn.Module] = {}

    def fresh() -> Classifier:
        torch.manual_seed(seed)
        network = Classifier(config)
        network.bert.load_state_dict(pretrained, strict=False)
        network.bert.embeddings.requires_grad_(False)
        return network

    def timed(name: str, function, *args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        seconds[name] = round(time.process_time() - start, 1)
        print(seed, name, seconds[name], flush=True)
        return result

    half = SimpleNamespace(steps=given.steps // 2, batch=given.batch, rate=given.rate)
    # --- one training, all sizes
    elastic = timed("instatune, training", tuned, fresh(), config, training, given, seed, sort=False)
    found = timed("instatune, search", searched, elastic, kept_back, example, given, seed)
    # --- ordinary fine-tuning, whole and half way
    network = fresh()
    timed("whole, training", plain, network, training, given, seed)
    nets["whole"] = network
    sliced = elastic_of(network, config)
    begun = fresh()
    timed("half of the steps", plain, begun, training, half, seed)
    uniform = elastic_of(begun, config)
    whole_macs = elastic.costs(elastic.largest())["macs"]
    rng = np.random.default_rng(seed)
    pool = [sample_by_decisions(elastic.space, rng) for _ in range(300)]
    pool_macs = np.array([elastic.costs(each)["macs"] for each in pool])
    macs: dict[str, float] = {}
    for level, sizes in LEVELS.items():
        architecture = setting(uniform, sizes)
        level_macs = elastic.costs(architecture)["macs"]
        small = uniform.extract(architecture)
        timed(f"uniform, {level}", plain, small, training, half, seed + 1000)
        nets[f"uniform/{level}"] = small
        nets[f"slices/{level}"] = sliced.extract(architecture)
        pruned = copy.deepcopy(begun)
        atoms = units(pruned, config, (torch.cat([ids, ids]), torch.cat([mask, mask])))
        share = level_macs / whole_macs
        batches = training.endless(given.batch, seed + 1000)
        timed(f"cut, {level}", cut, pruned, atoms, batches, budget=f"macs<={share:.6f}x", score="l2", seed=seed)
        timed(f"pruned, {level}", plain, pruned, training, half, seed + 1000)
        nets[f"pruned/{level}"] = pruned
        near = np.argsort(abs(pool_macs - level_macs))[: given.random]
        for number, i in enumerate(near):
            nets[f"random/{level}/{number}"] = elastic.extract(pool[i])
            macs[f"random/{level}/{number}"] = pool_macs[i] / whole_macs
        for arm in ("uniform", "slices", "pruned"):
            macs[f"{arm}/{level}"] = share
    # --- what stands for InstaTune: by validation, below the uniform network's measured latency
    for level, best in picked(elastic, found, nets, example).items():
        nets[f"instatune/{level}"] = elastic.extract(best["architecture"])
        macs[f"instatune/{level}"] = elastic.costs(best["architecture"])["macs"] / whole_macs
    results = [Result(metrics={"valid_accuracy": e["valid"]}, costs={"latency": e["latency"]}) for e in found]
    front = sorted((found[i] for i in pareto_front(results, OBJECTIVES)), key=lambda e: e["latency"])
    for number, i in enumerate(sorted({round(x) for x in np.linspace(0, len(front) - 1, given.front)})):
        nets[f"front/{number}"] = elastic.extract(front[i]["architecture"])
        macs[f"front/{number}"] = elastic.costs(front[i]["architecture"])["macs"] / whole_macs
    nets["instatune/whole"] = copy.deepcopy(elastic.model)
    macs["whole"] = macs["instatune/whole"] = 1.0
    everything = {name: net.eval() for name, net in nets.items()}
    final = timed("latency of all", measure_many, everything, example, rounds=20, clock=time.thread_time)
    wall = measure_many(everything, example, rounds=20)
    rows = {
        name: {
            "test": test.right(net),
            "latency": final[name].median_ms / final["whole"].median_ms,
            "ms": final[name].median_ms,
            "noisy": final[name].noisy,
            "wall": wall[name].median_ms / wall["whole"].median_ms,
            "wall_noisy": wall[name].noisy,
            "macs": float(macs[name]),
        }
        for name, net in nets.items()
    }
    measured = [[e["latency"], e["valid"]] for e in found]
    return {"rows": rows, "cpu_seconds": seconds, "search": measured}


def interval(values: list[float]) -> str:
    """Return the mean with its 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    half = _T95[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def at(seed: dict, arm: str, level: str, figure: str) -> float:
    """Return a figure of an arm at a level; the mean over random subnets."""
    rows = [row for name, row in seed["rows"].items() if name == f"{arm}/{level}" or name.startswith(f"{arm}/{level}/")]
    return float(np.mean([row[figure] for row in rows]))


def table(seeds: list[dict]) -> str:
    """Return accuracies at three levels, and InstaTune's less every other arm's, paired by seed."""
    lines = [
        "| level | arm | test accuracy, % | each | latency of whole | MACs of whole | InstaTune's minus this, paired |",
        "|---|---|---|---|---|---|---|",
    ]
    for level in LEVELS:
        own = [100 * at(s, "instatune", level, "test") for s in seeds]
        for arm in ARMS:
            values = [100 * at(s, arm, level, "test") for s in seeds]
            each = ", ".join(f"{value:.1f}" for value in values)
            cost = [np.mean([at(s, arm, level, figure) for s in seeds]) for figure in ("latency", "macs")]
            gap = "" if arm == "instatune" else interval([a - b for a, b in zip(own, values, strict=True)])
            lines.append(f"| {level} | {arm} | {interval(values)} | {each} | {cost[0]:.2f} | {cost[1]:.3f} | {gap} |")
    for name, title in (("whole", "ordinary fine-tuning"), ("instatune/whole", "InstaTune's whole network")):
        values = [100 * s["rows"][name]["test"] for s in seeds]
        each = ", ".join(f"{value:.1f}" for value in values)
        cost = np.mean([s["rows"][name]["latency"] for s in seeds])
        lines.append(f"| whole | {title} | {interval(values)} | {each} | {cost:.2f} | 1 | |")
    noisy, wall = (sum(r[key] for s in seeds for r in s["rows"].values()) for key in ("noisy", "wall_noisy"))
    gap = max(abs(r["wall"] / r["latency"] - 1) for s in seeds for r in s["rows"].values())
    lines.append(
        f"\nOf {sum(len(s['rows']) for s in seeds)} latencies {noisy} were marked as noisy, of those by the wall clock "
        f"{wall}; the shares of the whole network's differ by at most {100 * gap:.0f} % between the two."
    )
    spent = {name: np.mean([s["cpu_seconds"][name] for s in seeds]) for name in seeds[0]["cpu_seconds"]}
    lines.append("Processor seconds, mean: " + "; ".join(f"{name} {value:.0f}" for name, value in spent.items()))
    return "\n".join(lines)


def picture(seeds: list[dict], path: Path) -> None:
    """Draw accuracy over measured latency, all seeds."""
    import plotly.graph_objects as go

    figure = go.Figure()
    colours = {
        "instatune": "#0072B2",
        "random": "#999999",
        "uniform": "#E69F00",
        "pruned": "#D55E00",
        "slices": "#CC79A7",
    }
    symbols = {"instatune": "circle", "random": "x", "uniform": "square", "pruned": "diamond", "slices": "triangle-up"}
    names = {
        "instatune": "InstaTune, searched",
        "random": "InstaTune, random subnets",
        "uniform": "uniform shrink, trained on",
        "pruned": "magnitude pruning, trained on",
        "slices": "uniform shrink, not trained on",
    }
    for arm in ("slices", "random", "uniform", "pruned", "instatune"):
        rows = [
            r for s in seeds for name, r in s["rows"].items() if name.startswith(f"{arm}/") and name[-5:] != "whole"
        ]
        figure.add_trace(_points(go, rows, names[arm], colours[arm], symbols[arm], 0.35))
        means = [
            {f: float(np.mean([at(s, arm, level, f) for s in seeds])) for f in ("latency", "test")} for level in LEVELS
        ]
        line = _points(go, means, "", colours[arm], symbols[arm], 1.0)
        line.update(mode="lines+markers", showlegend=False, line={"color": colours[arm], "width": 2}, marker_size=13)
        figure.add_trace(line)
    front = [r for s in seeds for name, r in s["rows"].items() if name.startswith("front/")]
    figure.add_trace(_points(go, front, "InstaTune, front of the search", "#56B4E9", "circle-open", 0.9))
    whole = [s["rows"]["whole"] for s in seeds]
    figure.add_trace(_points(go, whole, "ordinary fine-tuning, whole", "#000000", "star", 1.0))
    own = [s["rows"]["instatune/whole"] for s in seeds]
    figure.add_trace(_points(go, own, "InstaTune, whole", "#0072B2", "star", 1.0))
    figure.update_layout(
        template="simple_white",
        width=1000,
        height=620,
        font_size=15,
        title=f"MiniLM on SST-2, equal optimiser steps, {len(seeds)} seeds (large: means at three levels)",
        xaxis={
            "title": "measured latency, share of the whole network's (batch 1, 32 tokens, one thread)",
            "range": [0.2, 1.1],
        },
        yaxis_title="test accuracy in % (872 sentences)",
        legend={"x": 0.6, "y": 0.03, "yanchor": "bottom", "bgcolor": "rgba(255,255,255,0.8)"},
    )
    figure.write_html(path, include_plotlyjs=True, config={"displayModeBar": False})


def _points(go, rows: list[dict], name: str, colour: str, symbol: str, opacity: float):
    return go.Scatter(
        x=[row["latency"] for row in rows],
        y=[100 * row["test"] for row in rows],
        mode="markers",
        name=name,
        marker={"color": colour, "symbol": symbol, "size": 9, "opacity": opacity},
    )


def main() -> None:
    """Run the seeds that have not left their file, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps of every arm, in all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--sentences", type=int, default=4000)
    parser.add_argument("--evaluations", type=int, default=60, help="subnets that the search measures")
    parser.add_argument("--random", type=int, default=3, help="random subnets at every level")
    parser.add_argument("--front", type=int, default=4, help="further points of the search's front to test")
    parser.add_argument("--picture", type=Path, default=None)
    given = parser.parse_args()
    from tokenizers import Tokenizer

    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(given.weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    training = Sentences(given.data, "train", tokenizer, given.sentences + KEPT_BACK)
    kept_back = copy.copy(training)
    kept_back.tokens, kept_back.classes = training.tokens[:KEPT_BACK], training.classes[:KEPT_BACK]
    training.tokens, training.classes = training.tokens[KEPT_BACK:], training.classes[KEPT_BACK:]
    test = Sentences(given.data, "test", tokenizer, None)
    config = BertConfig.from_json_file(given.weights / "config.json")
    pretrained = load_file(given.weights / "model.safetensors")
    done = []
    with threads_pinned(1):
        for seed in range(given.seeds):
            file = given.out / f"{seed}.json"
            if not file.exists():
                row = one_seed(config, pretrained, training, kept_back, test, given, seed)
                file.write_text(json.dumps(row))
            done.append(json.loads(file.read_text()))
            print(table(done), flush=True)
    if given.picture is not None:
        picture(done, given.picture)


if __name__ == "__main__":
    main()

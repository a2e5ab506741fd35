"""Random recurrent cells on Penn Treebank: does the hidden covariance of the untrained cell foretell the loss?

    python benchmarks/evidence/training_free.py --data <folder with ptb.*.txt.xz> --cells 32 --steps 150

Draws cells, scores them untrained, trains each equally long, and gives Kendall's tau of every score with the validation
loss, with a 95 % percentile bootstrap interval over cells. Higher scores should go with lower losses (tau below zero).
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau
from torch.nn import functional

from archsmith.evaluate.zero_cost import TEXT_SCORES, Batch
from archsmith.evaluate.zero_cost.hidden import hidden_spectrum
from archsmith.families.nas_bench_nlp import RecurrentFamily
from archsmith.families.nas_bench_nlp_space import recipe_of

SCORES = ("hidden_covariance", "hidden_covariance_layer_2", "jacobian_covariance", "jacobian_cosine", "hidden_saliency")


def streams(folder: Path, words: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training and validation text as (rows, tokens); the ``words`` most frequent words, all else is 0."""
    texts = {}
    for part in ("train", "valid"):
        with lzma.open(folder / f"ptb.{part}.txt.xz", "rt", encoding="utf-8") as file:
            texts[part] = file.read().replace("\n", " <eos> ").split()
    frequent = [word for word, _ in Counter(texts["train"]).most_common(words)]
    numbers = {word: number for number, word in enumerate(w for w in frequent if w != "<unk>")}
    found = {}
    for part, text in texts.items():
        tokens = torch.tensor([numbers.get(word, -1) + 1 for word in text])
        found[part] = tokens[: len(tokens) // rows * rows].view(rows, -1)
    return found["train"], found["valid"]


def loss_after(
    network: torch.nn.Module, train: torch.Tensor, valid: torch.Tensor, steps: int, bptt: int, *, carry: bool
) -> float:
    """Return the validation loss (natural log, 40 windows) after training.

    Args:
        network: Trained in place.
        train: (rows, tokens).
        valid: (rows, tokens).
        steps: Of Adam.
        bptt: Tokens of a window.
        carry: Whether states go on from window to window (gradients do not); else they begin at zero.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    states, place = None, 0
    network.train()
    for _ in range(steps):
        if place + bptt + 1 > train.shape[1]:
            states, place = None, 0
        x, y = train[:, place : place + bptt], train[:, place + 1 : place + bptt + 1]
        logits, states = network.step(x, states if carry else None)
        states = [tuple(s.detach() for s in layer) for layer in states]
        loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        if not bool(loss.isfinite()):
            return math.nan
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.25)
        optimizer.step()
        place += bptt
    network.eval()
    total, states = 0.0, None
    with torch.no_grad():
        for window in range(40):
            at = window * bptt
            logits, states = network.step(valid[:, at : at + bptt], states if carry else None)
            total += float(functional.cross_entropy(logits.flatten(0, 1), valid[:, at + 1 : at + bptt + 1].flatten()))
    return total / 40


def interval(score: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of Kendall's tau over cells."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(loss), size=len(loss)) for _ in range(2000)]
    return tuple(np.nanpercentile([kendalltau(score[i], loss[i]).statistic for i in drawn], [2.5, 97.5]).tolist())


def main() -> None:
    """Draw, score, train, correlate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--carry", action="store_true", help="states go on from window to window")
    parser.add_argument("--seconds", type=float, default=420.0, help="no further cell is begun after so long")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    train, valid = streams(arguments.data, words=1000, rows=20)
    family = RecurrentFamily(image=(1, 1, 35), num_classes=1000, embedding=32, hidden=48, layers=2, nodes=8)
    batch = Batch(valid[:, -35:], torch.zeros(20, dtype=torch.int64))
    rng, seen, rows = np.random.default_rng(arguments.seed), set(), []
    while len(rows) < arguments.cells and time.perf_counter() - began < arguments.seconds:
        architecture = family.space.sample(rng)
        if architecture.network_digest in seen:
            continue
        seen.add(architecture.network_digest)
        network = family.build(architecture, seed=len(seen))
        row = {name: TEXT_SCORES[name].function(network, batch, torch.Generator().manual_seed(0)) for name in SCORES}
        row["params"] = float(family.exact_costs(architecture)["params"])
        row["singular"] = hidden_spectrum(network, batch.images, layer=1, constant="drop").singular
        row["loss"] = loss_after(network, train, valid, arguments.steps, bptt=20, carry=arguments.carry)
        rows.append(row)
        shown = "  ".join(f"{k} {v:.6g}" for k, v in row.items())
        print(f"{len(rows):3d}  nodes {len(recipe_of(architecture))}  {shown}", flush=True)
    loss = np.array([row["loss"] for row in rows])
    print(
        f"\n{len(rows)} cells, {int((~np.isfinite(loss)).sum())} diverged; loss {np.nanmin(loss):.3f} to "
        f"{np.nanmax(loss):.3f}; {time.perf_counter() - began:.0f} s\n"
    )
    print("| score | cells | tau | 95 % interval |\n|---|---|---|---|")
    for name in (*SCORES, "params"):
        score = np.array([row[name] for row in rows])
        known = np.isfinite(score) & np.isfinite(loss)
        low, high = interval(score[known], loss[known])
        tau = kendalltau(score[known], loss[known]).statistic
        print(f"| {name} | {known.sum()} | {tau:.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()

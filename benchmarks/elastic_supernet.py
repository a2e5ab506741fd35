"""An elastic supernet against what one would do without it: switching, scoring many subnets, one sandwich step.

Three questions, each with its limit. Switching from one subnet to another, its views put in and taken out: under 1 ms
for about 60 parameters. Scoring 100 subnets on validation batches that are kept, against extracting each and scoring
the extracted network: at least 3 times faster, the same accuracies. One sandwich step (four children, gradients added
up) against the sum of the forward and backward passes of the same four subnets as networks of their own, under the same
losses: at most 1.15 times.

Two networks: a residual CNN, and a small BERT with 4 layers (with ``transformers``). Rounds are interleaved, medians of
ratios with intervals.

Run: ``python benchmarks/elastic_supernet.py [--threads 1] [--rounds 15] [--subnets 100] [--net cnn|bert]``
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from _rounds import interleaved, machine, ratio, spread
from torch import nn

from archsmith.evaluate.subnets import SubnetEvaluator, classified
from archsmith.supernet.elastic import Elastic
from archsmith.supernet.sampling import Sandwich
from archsmith.train.children import ChildrenStep
from archsmith.train.distill import soft_cross_entropy


class Block(nn.Module):
    """A residual block with two convolutions."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Identity()
        if stride > 1 or before != width:
            self.short = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        """Map (B, C, H, W) to (B, C', H', W')."""
        return F.relu(self.short(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """ResNet-18's plan for small images: 62 parameters at two blocks a stage."""

    def __init__(self, widths=(32, 64, 128, 256), blocks: int = 2):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])
        stages, before = [], widths[0]
        for number, width in enumerate(widths):
            own = [Block(before if i == 0 else width, width, 1 + (number > 0 and i == 0)) for i in range(blocks)]
            stages.append(nn.Sequential(*own))
            before = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(before, 10)

    def forward(self, x):
        """Return logits (B, 10)."""
        return self.fc(self.stages(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


def cnn(batch: int):
    """Return the elastic CNN, a batch maker and labels."""
    torch.manual_seed(0)
    elastic = Elastic(ResNet(), torch.randn(2, 3, 32, 32), divisor=8)
    return elastic, lambda n: torch.randn(n, 3, 32, 32), batch


def bert(batch: int):
    """Return an elastic BERT with 4 layers of width 256 on 32 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024,
        max_position_embeddings=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)

    def logits(net, ids):
        return net(input_ids=ids).logits

    elastic = Elastic(model, torch.randint(0, 1000, (2, 32)), forward=logits)
    return elastic, lambda n: torch.randint(0, 1000, (n, 32)), batch


NETS = {"cnn": (cnn, 64), "bert": (bert, 32)}


def alone_call(elastic: Elastic):
    """Return how an extracted network is called for its logits."""
    return lambda net, inputs: elastic._call(net, inputs)


def switching(elastic: Elastic, number: int, seed: int) -> None:
    """Time the change from one subnet to another."""
    rng = np.random.default_rng(seed)
    subnets = [elastic.space.sample(rng) for _ in range(number)]
    parameters = sum(1 for _ in elastic.model.parameters())
    for kind in ("the first time", "again"):
        times, filling = [], []
        for subnet in subnets:
            start = time.perf_counter()
            elastic.activate(subnet)
            chosen = time.perf_counter()
            with elastic.slices.active():
                pass
            filling.append((time.perf_counter() - chosen) * 1e3)
            times.append((time.perf_counter() - start) * 1e3)
        print(
            f"switching, {kind}: {np.median(times):.3f} ms a subnet (quartiles {np.quantile(times, 0.25):.3f} to "
            f"{np.quantile(times, 0.75):.3f}; {parameters} parameters; {np.median(filling):.3f} ms of it in every call)"
        )


def scoring(elastic: Elastic, make, number: int, seed: int, sizes: tuple[int, ...]) -> None:
    """Score subnets on kept batches, and each extracted; both lists must agree."""
    rng = np.random.default_rng(seed)
    random = [elastic.space.sample(rng) for _ in range(number)]
    parents = random[: max(number // 20, 1)]
    children = [elastic.space.mutate(parents[i % len(parents)], rng) for i in range(number)]
    call = alone_call(elastic)

    class Alone(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, inputs):
            return call(self.net, inputs)

    for kind, subnets in (("random", random), (f"mutations of {len(parents)}", children)):
        for size in sizes:
            generator = torch.Generator().manual_seed(seed)
            batches = [(make(size), torch.randint(0, 10, (size,), generator=generator))]
            start = time.perf_counter()
            evaluator = SubnetEvaluator(elastic, batches)
            kept = evaluator.metrics_of(subnets)
            middle = time.perf_counter()
            one = SubnetEvaluator(elastic, batches)
            for subnet in subnets:
                one.metrics(subnet)
            then = time.perf_counter()
            elastic.eval()
            extracted = [classified(Alone(elastic.extract(subnet)), batches) for subnet in subnets]
            end = time.perf_counter()
            same = sum(a["valid_accuracy"] == b["valid_accuracy"] for a, b in zip(kept, extracted, strict=True))
            gap = max(abs(a["valid_loss"] - b["valid_loss"]) for a, b in zip(kept, extracted, strict=True))
            print(
                f"scoring {number} {kind} subnets, {size} examples: together {middle - start:.2f} s, one by one "
                f"{then - middle:.2f} s, extracted {end - then:.2f} s: {(end - then) / (middle - start):.2f}x and "
                f"{(end - then) / (then - middle):.2f}x; {same} of {number} accuracies equal, losses within {gap:.1e}"
            )


def sandwich(elastic: Elastic, make, batch: int, rounds: int, seed: int) -> None:
    """Time a sandwich step without its update, and the plain passes of the same subnets extracted."""
    inputs, labels = make(batch), torch.randint(0, 10, (batch,))
    children = Sandwich(elastic, 4).children(np.random.default_rng(seed))
    step = ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0))
    call = alone_call(elastic)
    nets = [elastic.extract(child.architecture).train() for child in children]
    with torch.no_grad():
        target = call(nets[0], inputs)

    def ours():
        elastic.zero_grad(set_to_none=True)
        step.backward(children, lambda forward: F.cross_entropy(forward(inputs), labels))

    def plain():
        for number, net in enumerate(nets):
            net.zero_grad(set_to_none=True)
            logits = call(net, inputs)
            loss = F.cross_entropy(logits, labels) if number == 0 else soft_cross_entropy(logits, target)
            loss.backward()

    times = interleaved({"ours": ours, "plain": plain}, rounds=rounds)
    middle, low, high = ratio(times["ours"], times["plain"])
    print(
        f"sandwich step, batch {batch}: ours {spread(times['ours'])}, four plain passes {spread(times['plain'])}: "
        f"{middle:.3f}x (quartiles {low:.3f} to {high:.3f})"
    )


def main() -> None:
    """Run everything for one or all networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--subnets", type=int, default=100)
    parser.add_argument("--net", choices=sorted(NETS), default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(arguments.threads, arguments.rounds))
    for name in [arguments.net] if arguments.net else sorted(NETS, reverse=True):
        make_net, batch = NETS[name]
        start = time.perf_counter()
        elastic, make, batch = make_net(arguments.batch or batch)
        print(
            f"\n{name}: {len(elastic.dims)} dimensions, {elastic.space.size:.3g} subnets, "
            f"made in {time.perf_counter() - start:.1f} s"
        )
        switching(elastic, arguments.subnets, arguments.seed)
        sandwich(elastic, make, batch, arguments.rounds, arguments.seed)
        scoring(elastic, make, arguments.subnets, arguments.seed, (8, 32))


if __name__ == "__main__":
    main()

"""One step of differentiable search (logits, then weights) against a textbook implementation of the same mathematics.

Textbook: ``benchmarks/_textbook.py``, torch's default layout, every candidate called by itself, ``w * op(x)`` added up;
gradients of the logits by ``autograd.grad``, so that it computes no gradient of weights there either. Ours: the
library's first-order step, channels-last, nodes computed at once (``archsmith.supernet.fused``). Both start from the
same weights and see the same batches; outputs and gradients must agree in float64.

Run: ``python benchmarks/darts_step.py [--network darts|nas-bench-201] [--rounds 10] [--threads 1] [--raised]``
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from _rounds import ROUNDS, interleaved, machine, ratio, spread
from _textbook import TextbookDarts, TextbookNasBench201

from archsmith.core.allocator import raise_malloc_thresholds
from archsmith.families.cells import NasBench201Family
from archsmith.families.darts import DartsFamily
from archsmith.supernet import fused
from archsmith.supernet.updaters import first_order
from archsmith.train.layout import use_memory_format_

BATCH, SIDE, CLASSES = 64, 32, 10


def pair(name: str, channels: int, cells: int):
    """Return the textbook's network and the library's supernet with the same weights and logits."""
    if name == "darts":
        family = DartsFamily(image=(3, SIDE, SIDE), num_classes=CLASSES, channels=channels, cells=cells)
        textbook = TextbookDarts(channels, cells, CLASSES)
    else:
        family = NasBench201Family(image=(3, SIDE, SIDE), num_classes=CLASSES, channels=channels, cells=cells)
        textbook = TextbookNasBench201(channels, cells, CLASSES)
    supernet = family.relaxed(seed=1)
    if name == "nas-bench-201":
        order = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
        assert list(supernet.options["cell"][0]) == order, supernet.options
    theirs, ours = list(textbook.parameters()), list(supernet.network.parameters())
    assert [p.shape for p in theirs] == [p.shape for p in ours]
    with torch.no_grad():
        for target, source in zip(theirs, ours, strict=True):
            target.copy_(source)
    textbook.alphas = {group: logits.detach().clone().requires_grad_() for group, logits in supernet.logits.items()}
    use_memory_format_(supernet.network, torch.channels_last)
    return textbook, supernet


def gaps(textbook, supernet, images, labels) -> tuple[float, float, float]:
    """Return relative differences in float64: outputs, gradients of weights, gradients of logits."""
    theirs, ours = copy.deepcopy(textbook).double(), copy.deepcopy(supernet).double()
    theirs.alphas = {name: alpha.detach().double().requires_grad_() for name, alpha in textbook.alphas.items()}
    results = []
    for network, logits in ((theirs, theirs.alphas), (ours, dict(ours.logits.items()))):
        outputs = network(images.double())
        wanted = [*(theirs if network is theirs else ours.network).parameters(), *logits.values()]
        gradients = torch.autograd.grad(F.cross_entropy(outputs, labels), wanted)
        cut = len(wanted) - len(logits)
        results.append(
            [outputs, *(torch.cat([g.flatten() for g in part]) for part in (gradients[:cut], gradients[cut:]))]
        )
    return tuple(float(((a - b).norm() / a.norm()).detach()) for a, b in zip(*results, strict=True))


def textbook_steps(network, batches):
    """Return the logit step and the weight step as a textbook has them."""
    weights = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    logits = torch.optim.Adam(network.alphas.values(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    (images, labels), (others, their_labels) = batches

    def logit_step():
        alphas = list(network.alphas.values())
        for alpha, gradient in zip(
            alphas, torch.autograd.grad(F.cross_entropy(network(others), their_labels), alphas), strict=True
        ):
            alpha.grad = gradient
        logits.step()

    def weight_step():
        weights.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        weights.step()

    return logit_step, weight_step


def our_steps(supernet, batches):
    """Return the same two steps as ``archsmith.train.bilevel`` takes them."""
    weights = torch.optim.SGD(supernet.weights().values(), 0.025, momentum=0.9, weight_decay=3e-4)
    logits = torch.optim.Adam(supernet.logits.values(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    (images, labels), (others, their_labels) = [
        (x.contiguous(memory_format=torch.channels_last), y) for x, y in batches
    ]

    def logit_step():
        found = first_order(
            lambda w, a: F.cross_entropy(supernet.functional(others, w, a), their_labels),
            supernet.weights(),
            dict(supernet.logits.items()),
        )
        for name, tensor in supernet.logits.items():
            tensor.grad = found[name]
        logits.step()

    def weight_step():
        weights.zero_grad(set_to_none=True)
        fixed = {name: tensor.detach() for name, tensor in supernet.logits.items()}
        F.cross_entropy(supernet.functional(images, supernet.weights(), fixed), labels).backward()
        torch.nn.utils.clip_grad_norm_(list(supernet.weights().values()), 5.0)
        weights.step()

    return logit_step, weight_step


def one_by_one(step):
    """Return a step of the library that calls every candidate by itself, as a line between the two."""

    def run():
        asked, fused.fusible = fused.fusible, lambda *_: False
        try:
            step()
        finally:
            fused.fusible = asked

    return run


def compare(name: str, channels: int, cells: int, rounds: int) -> None:
    """Check that both do the same, then time them in processor time and on the wall."""
    textbook, supernet = pair(name, channels, cells)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(BATCH, 3, SIDE, SIDE, generator=generator),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(2)
    ]
    found = gaps(textbook, supernet, batches[0][0][:8], batches[0][1][:8])
    assert max(found) < 1e-6, found
    print(f"\n{name}: C={channels}, {cells} cells, batch {BATCH}, {SIDE}x{SIDE}")
    print("  relative gaps in float64: outputs {:.0e}, weights {:.0e}, logits {:.0e}".format(*found), flush=True)
    theirs, ours = textbook_steps(textbook, batches), our_steps(supernet, batches)
    runs = {}
    for number, step in enumerate(("logits", "weights")):
        runs[f"{step}, textbook"] = theirs[number]
        runs[f"{step}, one by one"] = one_by_one(ours[number])
        runs[f"{step}, archsmith"] = ours[number]
    seconds = interleaved(runs, rounds=rounds, warmup=1, clock="cpu")
    for run, values in seconds.items():
        print(f"  {run:22s}{spread(values)}")
    for other in ("textbook", "one by one"):
        for step in (("logits",), ("weights",), ("logits", "weights")):
            sums = [
                [sum(values) for values in zip(*(seconds[f"{part}, {side}"] for part in step), strict=True)]
                for side in (other, "archsmith")
            ]
            middle, low, high = ratio(*sums)
            what = f"{' + '.join(step)} against {other}"
            print(f"  {what:40s}{middle:.2f}x (quartiles {low:.2f} to {high:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("darts", "nas-bench-201"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cells", type=int, help="cells of DARTS, or of each stage of NAS-Bench-201")
    parser.add_argument("--raised", action="store_true", help="allocator thresholds raised, on both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    raised = arguments.raised and raise_malloc_thresholds()
    print("differentiable search step, processor time:", machine(arguments.threads, arguments.rounds))
    print("allocator thresholds raised (both sides):", raised)
    for name, cells in (("darts", 8), ("nas-bench-201", 5)):
        if arguments.network in (None, name):
            compare(name, 16, arguments.cells or cells, arguments.rounds)


if __name__ == "__main__":
    main()

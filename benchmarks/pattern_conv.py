"""A pattern-pruned 3x3 convolution: multiplications and time of its executions, as ratios to the dense convolution.

Four of nine weights in each kernel, four patterns in equal shares, and a part of the kernels gone. The zeros of a
masked dense convolution save nothing; what an execution saves in multiplications it may lose in time, so both are
shown. Interleaved rounds, no gradient. With one thread on the CPU the clock counts processor seconds, in which waiting
for other programs is left out; else it is the wall's.

Run: ``python benchmarks/pattern_conv.py [--threads 1] [--device cpu]``
"""

from __future__ import annotations

import argparse

import torch
from _rounds import interleaved, machine, ratio, spread
from torch import nn

from archsmith.atoms.weight_masks import FIXED_POOL, Kernels, Patterns
from archsmith.layers.pattern_conv import Execution, PatternConv2d

CASES = ((64, 32, 1), (64, 32, 16), (256, 8, 1), (256, 8, 16))
"""Channels in and out, height and width, batch: layers of VGG on CIFAR images."""
PERCENTS = (0, 50, 85, 95)
POOL = FIXED_POOL[:4]
REPEATS = 3


def pruned(channels: int, percent: int) -> tuple[nn.Conv2d, PatternConv2d]:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    scores = conv.weight.detach().double().square()
    kept, patterns = Kernels(percent).choose_kernels(scores), Patterns(POOL)
    ids = patterns.choose_ids(scores)
    conv.weight.data.mul_(patterns.mask_of(ids) & kept[:, :, None, None])
    return conv, PatternConv2d.from_dense(conv, kept, ids, POOL)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("pattern-pruned convolutions:", machine(arguments.threads), arguments.device)
    clock = "cpu" if arguments.threads == 1 and arguments.device == "cpu" else "wall"
    print(f"clock: {clock}; MACs and time as ratios to the dense convolution, quartiles in brackets")
    print("| channels, side, batch | kernels gone | dense | sparse: MACs, time | patterns: MACs, time |")
    print("|---|---|---|---|---|")
    for channels, side, batch in CASES:
        x = torch.randn(batch, channels, side, side, device=arguments.device)
        for percent in PERCENTS:
            conv, layer = (module.to(arguments.device) for module in pruned(channels, percent))
            expected = conv(x)
            dense_macs = channels * channels * 9 * side * side
            cells = []
            runs = {"dense": lambda conv=conv, x=x: repeated(conv, x)}
            macs = {}
            for execution in ("sparse", "patterns"):
                layer.execution = execution
                assert float((layer(x) - expected).abs().max() / expected.abs().max()) < 1e-5
                macs[execution] = layer.macs(side, side)
                runs[execution] = lambda layer=layer, x=x, how=execution: run_as(layer, how, x)
            seconds = interleaved(runs, clock=clock)
            for execution in ("sparse", "patterns"):
                middle, low, high = ratio(seconds[execution], seconds["dense"])
                cells.append(f"{macs[execution] / dense_macs:.3f}, {middle:.2f} ({low:.2f} to {high:.2f})")
            where = f"{channels}, {side}x{side}, {batch}"
            print(f"| {where} | {percent} % | {spread(seconds['dense'])} | {' | '.join(cells)} |", flush=True)


def run_as(layer: PatternConv2d, execution: Execution, x: torch.Tensor) -> None:
    layer.execution = execution
    repeated(layer, x)


def repeated(module: nn.Module, x: torch.Tensor) -> None:
    """Run a module a few times and wait until the device is done."""
    for _ in range(REPEATS):
        module(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

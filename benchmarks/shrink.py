"""One cut of the full AtomNAS supernet (31,392 searchable atoms) with RMSprop state and moving average.

Half of the atoms go. Timed: the transaction alone, without the copy that each round needs to start from the whole.

Run: ``python benchmarks/shrink.py [--threads 1]``
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from _rounds import ROUNDS, machine, spread

from archsmith.atoms.surgery import cut_
from archsmith.families.mobile import collapse_, mobile_family
from archsmith.train.average import MovingAverage
from archsmith.train.layout import use_memory_format_
from archsmith.train.optim import RMSprop, decay_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    family = mobile_family("atomnas-c", image=(3, 224, 224), num_classes=1000)
    whole = family.build(family.largest(), seed=0)
    use_memory_format_(whole, torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(ROUNDS):
        network = copy.deepcopy(whole)
        optimizer = RMSprop(decay_groups(network, 1e-5), 0.01)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        average = MovingAverage(network, 0.99)
        atoms = family.atoms(network)
        keep = {g.name: torch.rand(g.size, generator=generator) < 0.5 for g in atoms}
        start = time.perf_counter()
        report = cut_(network, atoms, keep, collapse=collapse_, optimizer=optimizer, tables=[average.tensors])
        seconds.append(time.perf_counter() - start)
    print("one cut of the supernet:", machine(arguments.threads))
    print(f"  {sum(report.removed.values()):,} of {len(atoms):,} atoms removed: {spread(seconds)}")


if __name__ == "__main__":
    main()

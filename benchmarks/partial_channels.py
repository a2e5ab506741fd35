"""A step of the PC-DARTS search network against one of DARTS: time, memory and arithmetic at K = 4.

Both are this library's search networks with the same channels, cells, batch and images; PC-DARTS has its edge weights.
A step is forward, backward to weights and logits, and momentum SGD. Each is timed in the memory layout that is the
faster one for it. Of the mixed operations, counted one by one, the bytes that they keep for the backward pass must be
one K-th, the MACs of depthwise convolutions one K-th and those of full ones one K^2-th, exactly.

Run: ``python benchmarks/partial_channels.py [--threads 1] [--rounds 10]``
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from _rounds import ROUNDS, interleaved, machine, ratio, spread
from torch import nn

from archsmith.families.darts import DartsFamily
from archsmith.families.darts_supernet import DartsSupernet
from archsmith.supernet.mixed import MixedOp
from archsmith.supernet.partial import partial_edge

K = 4
SIZES = ((16, 8, 8, 32), (64, 4, 4, 32))
"""Channels, cells, batch and side."""

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def search_network(channels: int, cells: int, side: int, divisor: int) -> DartsSupernet:
    """Return the search network; ``divisor`` 1 is DARTS."""
    family = DartsFamily(image=(3, side, side), num_classes=10, channels=channels, cells=cells)
    return family.relaxed(seed=0, make_edge=partial(partial_edge, divisor=divisor), edge_weights=divisor > 1)


def step_of(supernet: DartsSupernet, images: torch.Tensor, labels: torch.Tensor):
    """Return a function that does one step."""
    optimizer = torch.optim.SGD(supernet.network.parameters(), 0.025, 0.9, weight_decay=3e-4)

    def step() -> None:
        supernet.zero_grad(set_to_none=True)
        F.cross_entropy(supernet(images), labels).backward()
        nn.utils.clip_grad_norm_(supernet.network.parameters(), 5.0)
        optimizer.step()

    return step


class Kept:
    """Within the block, bytes of distinct storages that are kept for a backward pass and are no parameters.

    Args:
        parameters: What is not counted.
        maps: Count feature maps alone, tensors with four axes.
    """

    def __init__(self, parameters, maps: bool = False) -> None:
        self.own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.kept: dict[int, tuple[torch.Tensor, int]] = {}
        self.maps = maps
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own and (tensor.dim() == 4 or not self.maps):
            self.kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(size for _, size in self.kept.values())


def of_mixed_operations(supernet: DartsSupernet, images: torch.Tensor) -> dict[str, int]:
    """Return what all mixed operations keep, each by itself, and their MACs for one image, by kind of convolution."""
    found = {"kept": 0, "depthwise": 0, "full": 0}
    mixed = [module for module in supernet.network.modules() if isinstance(module, MixedOp)]
    inputs: list[tuple[MixedOp, torch.Tensor, torch.Tensor]] = []
    handles = [
        m.register_forward_pre_hook(lambda m, given: inputs.append((m, given[0].detach(), given[1]))) for m in mixed
    ]
    with torch.no_grad():
        supernet(images)
    for handle in handles:
        handle.remove()

    def count(layer: nn.Conv2d, given: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        products = y[0].numel() * layer.weight[0].numel()
        found["depthwise" if layer.groups == layer.in_channels and layer.groups > 1 else "full"] += products

    for edge, x, weights in inputs:
        counting = [m.register_forward_hook(count) for m in edge.modules() if isinstance(m, nn.Conv2d)]
        with Kept(edge.parameters(), maps=True) as kept:
            edge(x.clone().requires_grad_(), weights.detach().clone().requires_grad_())
        found["kept"] += kept.bytes
        for handle in counting:
            handle.remove()
    return found


def compare(channels: int, cells: int, batch: int, side: int, rounds: int) -> float:
    """Check the fractions, time both in their best layouts, print everything; return the ratio of the step times."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    print(f"\nC {channels}, {cells} cells, batch {batch}, {side}x{side}")
    supernets = {name: search_network(channels, cells, side, k) for name, k in (("DARTS", 1), ("PC-DARTS", K))}
    mixed = {name: of_mixed_operations(supernet, images[:1]) for name, supernet in supernets.items()}
    darts, ours = mixed["DARTS"], mixed["PC-DARTS"]
    assert ours["kept"] * K == darts["kept"], mixed
    assert ours["depthwise"] * K == darts["depthwise"] and ours["full"] * K**2 == darts["full"], mixed
    macs = {name: row["depthwise"] + row["full"] for name, row in mixed.items()}
    print(
        f"  mixed operations, one image: keep {darts['kept']:,} and {ours['kept']:,} bytes, exactly 1/{K}; "
        f"{macs['DARTS']:,} and {macs['PC-DARTS']:,} MACs ({macs['PC-DARTS'] / macs['DARTS']:.4f}: depthwise 1/{K}, "
        f"full 1/{K**2}, exactly)"
    )
    whole = {}
    for name, supernet in supernets.items():
        with Kept(supernet.parameters()) as kept:
            supernet(images)
        whole[name] = kept.bytes
        kept.kept.clear()
    print(
        f"  whole network, batch {batch}: keeps {whole['DARTS'] / 2**20:.1f} and {whole['PC-DARTS'] / 2**20:.1f} MiB "
        f"({whole['PC-DARTS'] / whole['DARTS']:.3f})"
    )
    steps, seconds = {}, {}
    for name, supernet in supernets.items():
        state = supernet.state_dict()
        for layout, memory_format in LAYOUTS.items():
            twin = search_network(channels, cells, side, K if name == "PC-DARTS" else 1)
            twin.load_state_dict(state)
            twin.network.to(memory_format=memory_format)
            steps[name, layout] = step_of(twin, images.contiguous(memory_format=memory_format), labels)
    tried = interleaved({f"{name} {layout}": step for (name, layout), step in steps.items()}, rounds=2, warmup=1)
    best = {name: min(LAYOUTS, key=lambda layout, name=name: min(tried[f"{name} {layout}"])) for name in supernets}
    seconds = interleaved({name: steps[name, layout] for name, layout in best.items()}, rounds=rounds, warmup=1)
    for name, values in seconds.items():
        print(f"  {name:10s}{spread(values)}  ({best[name]})")
    middle, low, high = ratio(seconds["DARTS"], seconds["PC-DARTS"])
    print(f"  ratio     {middle:.2f}x (quartiles {low:.2f} to {high:.2f})", flush=True)
    return middle


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sizes", type=int, nargs=4, action="append", metavar=("C", "CELLS", "BATCH", "SIDE"))
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    print(f"PC-DARTS, K = {K}, against DARTS:", machine(given.threads, given.rounds))
    for size in given.sizes or SIZES:
        compare(*size, rounds=given.rounds)


if __name__ == "__main__":
    main()

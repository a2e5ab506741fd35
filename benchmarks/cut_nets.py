"""Fifteen ways of moving channels: is a cut correct, wrong, or refused? Ours beside torch-pruning.

Outputs 1 and 5 of the first layer are asked to go (and whatever goes with them). The result is compared with the whole
network with these outputs zeroed where they are consumed, written by hand for each net (``_cut_nets.py``).

Run: ``python benchmarks/cut_nets.py`` (torch-pruning, for the comparison only: ``pip install torch-pruning``)
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter

import numpy as np
import torch
from _cut_nets import NETS, build
from torch import Tensor, nn

from archsmith.atoms.absorb import Absorber
from archsmith.atoms.finding import find
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.transaction import apply_

ASKED = (1, 5)

FREE_AXES = {"kernel": 1, "scale": 0, "mix": 0}
"""Axes of the free parameters' channels: torch-pruning has to be told them."""


def verdict(model: nn.Module, x: Tensor, expected: Tensor) -> str:
    """Compare a cut network with what it must compute."""
    try:
        with torch.no_grad():
            found = model(x)
    except Exception as error:
        return f"breaks: {type(error).__name__}"
    if found.shape != expected.shape:
        return "wrong: another shape"
    gap = float((found - expected).abs().max() / expected.abs().max())
    return "correct" if gap < 1e-5 else f"wrong: off by {gap:.2f}"


def ours(name: str) -> str:
    """Remove the units that hold the outputs asked for; the smallest ones where there is a choice."""
    model, x = build(name)
    whole = copy.deepcopy(model)
    try:
        atoms = find(model, x)
        removed: dict[str, list[int]] = {}
        for output in ASKED:
            holders = [
                (place.index.shape[1], group.name, int(np.flatnonzero((place.index == output).any(1))[0]))
                for group in atoms.groups
                for place in group.places
                if place.tensor == "first.weight" and place.axes == (0,) and (place.index == output).any()
            ]
            if not holders:
                return "refused: " + "; ".join(pinned.reason for pinned in atoms.pinned[:1])
            _, group_name, unit = min(holders)
            removed.setdefault(group_name, []).append(unit)
        cut = atoms.plan(removed)
    except CutRefused as refusal:
        return f"refused: {refusal.reason}"
    size = whole.first.weight.shape[0]
    dead = sorted(set(range(size)) - set(cut.tensors["first.weight"].axes[0].tolist()))
    with torch.no_grad():
        expected = whole(x, dead)
    apply_(model, cut, absorb=Absorber(model, cut, x) if "scale" in name and "zero" in name else None)
    return verdict(model, x, expected) + ("" if dead == list(ASKED) else f" (with them went {set(dead) - set(ASKED)})")


def theirs(name: str) -> str:
    """Do the same with torch-pruning's low-level call, the axes of free parameters declared."""
    import torch_pruning

    model, x = build(name)
    whole = copy.deepcopy(model)
    try:
        free = [(p, FREE_AXES[n]) for n, p in model.named_parameters() if n in FREE_AXES]
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x, unwrapped_parameters=free)
        prune = torch_pruning.prune_conv_out_channels
        if isinstance(model.first, nn.Linear):
            prune = torch_pruning.prune_linear_out_channels
        group = graph.get_pruning_group(model.first, prune, idxs=list(ASKED))
        if not graph.check_pruning_group(group):
            return "refused: check_pruning_group"
        group.prune()
    except Exception as error:
        return f"breaks: {type(error).__name__} while pruning"
    with torch.no_grad():
        expected = whole(x, list(ASKED))
    return verdict(model, x, expected)


def main() -> None:
    """Print the table and the counts."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        import torch_pruning

        print(f"archsmith beside torch-pruning {torch_pruning.__version__}, torch {torch.__version__}")
        tools = {"archsmith": ours, "torch-pruning": theirs}
    except ImportError:
        print("torch-pruning is not installed: its column is skipped")
        tools = {"archsmith": ours}
    counts: dict[str, Counter[str]] = {tool: Counter() for tool in tools}
    print(f"\n| net | {' | '.join(tools)} |\n|---|{'---|' * len(tools)}")
    for name in NETS:
        row = [run(name) for run in tools.values()]
        for tool, text in zip(tools, row, strict=True):
            counts[tool][text.split(":")[0].split(" (")[0]] += 1
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    for tool, count in counts.items():
        print(f"{tool}: " + ", ".join(f"{number} {what}" for what, number in sorted(count.items())))


if __name__ == "__main__":
    main()

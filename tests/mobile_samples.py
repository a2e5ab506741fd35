"""Mobile networks with weights that no initialisation gives, and the facts they are held against."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.groups import Atoms, tensors_of
from archsmith.families.mobile import BlockPlan, MobileFamily, mobile_family
from archsmith.layers.mobile import MixedInvertedResidual, MobileNet

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "atomnas.json").read_text())["cases"]
"""Facts of the reference implementation by case; their origin is in the file."""


def fact(name: str) -> tuple[Any, Any]:
    """Return (input, expected) of a case."""
    return FACTS[name]["input"], FACTS[name]["expected"]


def wave(shape: Sequence[int], factor: float, phase: float = 0.0) -> Tensor:
    """Return ``sin(factor * i + phase)`` over the flat index, float64."""
    size = int(np.prod(shape))
    return torch.sin(factor * torch.arange(size, dtype=torch.float64) + phase).reshape(tuple(shape))


def closed_form_block(case: dict[str, Any]) -> tuple[MixedInvertedResidual, Tensor]:
    """Return the float64 block and input of a ``block_forward`` case.

    Tensor number g of the block (branch by branch: expansion, its normalisation, depthwise, its normalisation,
    projection; then the output normalisation) holds ``0.5 sin(1.3 i + g)``, running means ``0.1 cos(0.3 i + g)``,
    running variances ``1 + 0.5 |sin(0.7 i + g)|``; the input is ``sin(0.37 i)``, two images.
    """
    atoms = tuple(zip(case["kernels"], case["atoms"], strict=True))
    block = MixedInvertedResidual(case["cin"], case["cout"], case["stride"], atoms).double()
    tensors: list[Tensor] = []
    for branch in block.atom_branches():
        expansion = branch.expand
        tensors += [expansion.conv.weight, *norm_tensors(expansion.norm), branch.depthwise.weight]
        tensors += [*norm_tensors(branch.norm), branch.project.weight]
    tensors += norm_tensors(block.norm)
    names = {id(tensor): name for name, tensor in tensors_of(block).items()}
    with torch.no_grad():
        for g, tensor in enumerate(tensors):
            index = torch.arange(tensor.numel(), dtype=torch.float64)
            leaf = names[id(tensor)].rpartition(".")[2]
            if leaf == "running_mean":
                value = 0.1 * torch.cos(0.3 * index + g)
            elif leaf == "running_var":
                value = 1 + 0.5 * torch.sin(0.7 * index + g).abs()
            else:
                value = 0.5 * torch.sin(1.3 * index + g)
            tensor.copy_(value.reshape(tensor.shape))
    return block, wave((2, case["cin"], case["H"], case["H"]), 0.37)


def norm_tensors(norm: nn.Module) -> list[Tensor]:
    """Return weight, bias, running mean and variance of a normalisation."""
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def worn_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give weights and statistics values as after training: nothing is zero, one or shared."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            leaf = name.rpartition(".")[2]
            if leaf == "running_var":
                drawn = 0.5 + drawn.abs()
            elif leaf == "running_mean":
                drawn = 0.3 * drawn
            elif tensor.dim() == 1 and leaf == "weight":
                drawn = (0.3 + drawn.abs()) * drawn.sign()
            elif tensor.dim() > 1:
                drawn = drawn * (2.0 / max(1, tensor[0].numel())) ** 0.5
            tensor.copy_(drawn)
    return model


def small_family(**settings: Any) -> MobileFamily:
    """Return a family for 1x8x8 images: a fixed block, two stages of two blocks, all kinds of branches."""
    rows = ((1, 4, 1, 1, (3,)), (2, 6, 2, 2, (3, 5, 7)), (2, 8, 2, 1, (3, 5)))
    settings = {"image": (1, 8, 8), "num_classes": 3, "stem_channels": 4, "last_channels": 10, "rows": rows} | settings
    return mobile_family("tiny", **settings)


def random_family(rng: np.random.Generator) -> MobileFamily:
    """Return a family with random blocks, some fixed, some without expansion, with or without squeeze-excitation."""
    plan, channels = [], int(rng.integers(2, 6))
    stem = channels
    for _ in range(int(rng.integers(1, 5))):
        kernels = sorted(rng.choice([3, 5, 7], size=int(rng.integers(1, 4)), replace=False).tolist())
        expand = bool(rng.random() < 0.75)
        out = channels if rng.random() < 0.5 else int(rng.integers(2, 7))
        atoms = tuple((kernel, int(rng.integers(1, 6)) if expand else channels) for kernel in kernels)
        plan.append(BlockPlan(out, int(rng.integers(1, 3)), atoms, expand, searched=expand))
        channels = out
    return MobileFamily(
        image=(int(rng.integers(1, 4)), int(rng.integers(7, 14)), int(rng.integers(7, 14))),
        num_classes=int(rng.integers(2, 5)),
        stem_channels=stem,
        stem_stride=int(rng.integers(1, 3)),
        plan=tuple(plan),
        last_channels=int(rng.integers(2, 9)),
        squeeze_ratio=float(rng.choice([0.0, 0.5, 1.0])),
        activation=str(rng.choice(["relu", "swish"])),
    )


def everything(atoms: Atoms) -> dict[str, Tensor]:
    """Return the mask that keeps every unit."""
    return {group.name: torch.ones(group.size, dtype=torch.bool) for group in atoms}


def without(atoms: Atoms, **dead: Iterable[int]) -> dict[str, Tensor]:
    """Return a mask; ``b1k3=[0, 2]`` kills units 0 and 2 of ``blocks.1.branches.k3``, ``...`` for all of them."""
    keep = everything(atoms)
    for short, units in dead.items():
        block, kernel = short.removeprefix("b").split("k")
        name = f"blocks.{block}.branches.k{kernel}"
        keep[name][slice(None) if units is ... else list(units)] = False
    return keep


def silence_(model: nn.Module, atoms: Atoms, keep: dict[str, Tensor], value: float = 0.0) -> None:
    """Set the scales outside ``keep`` to ``value``."""
    named = tensors_of(model)
    with torch.no_grad():
        for group in atoms:
            named[group.scale][~keep[group.name]] = value


def random_keep(atoms: Atoms, rng: np.random.Generator, share: float = 0.5) -> dict[str, Tensor]:
    """Return a random mask that respects the blocks' minimum."""
    keep = {g.name: torch.from_numpy(rng.random(g.size) < share) for g in atoms}
    for block in atoms.blocks:
        if block.groups and sum(int(keep[name].sum()) for name in block.groups) < block.minimum:
            keep[block.groups[0]][0] = True
    return keep


def images(network_or_family: Any, count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random images for a family."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *network_or_family.image, generator=generator, dtype=dtype)


def built(family: MobileFamily, seed: int = 0, dtype: torch.dtype = torch.float32) -> MobileNet:
    """Return the family's largest network with worn weights."""
    network = family.build(family.largest()).to(dtype)
    worn_(network, seed)
    return network

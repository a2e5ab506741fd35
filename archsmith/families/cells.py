"""Cell-based families: networks stacked from one searched cell.

The spaces themselves are in ``archsmith.families.cell_spaces``, which needs no torch.

Source: NAS-Bench-201, arXiv 2001.00326.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from archsmith.core.errors import Shown, UserError
from archsmith.cost import count
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, nas_bench_201_space
from archsmith.families.nas_bench_201_supernet import MixedNasBench201, NasBench201Supernet
from archsmith.layers.cells import DenseCell, NasBench201Network, make_edge_operation
from archsmith.space import Architecture, ProductSpace
from archsmith.supernet import SinglePathSupernet, Switch
from archsmith.supernet.mixed import Relaxation
from archsmith.supernet.relaxed import MakeEdge, mixed_edge

FAMILIES = (
    {
        "name": "nas-bench-201",
        "title": "NAS-Bench-201 networks: a cell of six edges and five operations (15,625 cells)",
        "task": "images",
        "relaxed": True,
    },
)

EDGE_PATHS = tuple(f"edge/{source}-{target}" for source, target in NB201_EDGES)
"""Paths of the space in the order of the network's ``operations``."""


@dataclass(frozen=True, kw_only=True)
class NasBench201Family:
    """The networks of NAS-Bench-201 for one image size.

    Attributes:
        image: Shape of one image, (C, H, W), H and W multiples of 4.
        num_classes: Number of classes.
        channels: Channels C of the first stage.
        cells: Cells N of each stage.

    The benchmark has C = 16 and N = 5, the defaults.

    Raises:
        UserError: An image that two reductions do not halve evenly, or a size below 1.
    """

    image: tuple[int, int, int]
    num_classes: int
    channels: int = 16
    cells: int = 5

    def __post_init__(self) -> None:
        for name in ("num_classes", "channels", "cells"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"family.{name}", value, allowed="an integer of at least 1")
        if min(self.image) < 1 or self.image[1] % 4 or self.image[2] % 4:
            raise UserError(
                "image size",
                Shown(f"{self.image[1]}x{self.image[2]}"),
                allowed="sides that are multiples of 4 pixels, because the network halves them twice",
                hint="Resize the images (task option resolution).",
            )

    @property
    def space(self) -> ProductSpace:
        """The 15,625 cells, see ``nas_bench_201_space``."""
        return nas_bench_201_space()

    def largest(self) -> Architecture:
        """Return the most expensive cell: 3x3 convolutions on every edge."""
        return self.space.validate(dict.fromkeys(EDGE_PATHS, "nor_conv_3x3"))

    def smallest(self) -> Architecture:
        """Return the cheapest cell that lets the image through: one skip from input to output."""
        return self.space.validate(dict.fromkeys(EDGE_PATHS, "none") | {"edge/0-3": "skip_connect"})

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> NasBench201Network:
        """Return the network of a cell with torch's own initialisation.

        Args:
            architecture: Operation by path, all six edges present.
            seed: Seed of the initialisation; None draws from torch's global generator (for weights that are loaded
                next).
        """
        operations = tuple(str(architecture[path]) for path in EDGE_PATHS)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return NasBench201Network(self.image[0], self.num_classes, self.channels, self.cells, operations)

    def supernet(self, *, seed: int | None = None, affine: bool = False) -> SinglePathSupernet:
        """Return a supernet: every edge of every cell holds all five operations, with weights of their own.

        A path extracts to the network that ``build`` gives. Train it with ``archsmith.train.single_path`` on paths from
        ``random_path``: random search with parameter sharing (RSPS).

        Args:
            seed: Seed of the initialisation; None draws from torch's global generator.
            affine: Whether normalisations of cells and reductions have a scale and a shift; the benchmark's own
                weight-sharing searches have none.
        """
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            nothing = ("none",) * len(EDGE_PATHS)
            network = NasBench201Network(
                self.image[0], self.num_classes, self.channels, self.cells, nothing, affine=affine
            )
            switches: dict[str, list[str]] = {path: [] for path in EDGE_PATHS}
            for name, cell in list(network.named_modules()):
                if isinstance(cell, DenseCell):
                    width = self.channels * 2 ** int(name.split(".")[1])
                    for index, path in enumerate(EDGE_PATHS):
                        cell.edges[index] = Switch(
                            {option: make_edge_operation(option, width, affine) for option in NB201_OPERATIONS}
                        )
                        switches[path].append(f"{name}.edges.{index}")
        return SinglePathSupernet(network, self.space, switches, self.build)

    def relaxed(
        self,
        *,
        seed: int | None = None,
        relaxation: Relaxation | None = None,
        make_edge: MakeEdge = mixed_edge,
        edge_weights: bool = False,
        affine: bool = False,
        operations: Sequence[str] = NB201_OPERATIONS,
    ) -> NasBench201Supernet:
        """Return the supernet that differentiable searches train: every edge mixes all operations.

        Args:
            seed: Seed of weights and logits; None draws the weights from torch's global generator.
            relaxation: From logits to mixing weights; softmax if None.
            make_edge: Makes an edge of its candidates.
            edge_weights: Whether the edges of a node are weighted against each other.
            affine: Whether normalisations of cells have a scale and a shift; those of the reductions always have.
            operations: Candidates of every edge.

        Raises:
            UserError: An operation that the space does not have, or none at all.
        """
        if not operations or not set(operations) <= set(NB201_OPERATIONS):
            raise UserError("operations", operations, allowed=f"some of {', '.join(NB201_OPERATIONS)}")
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            nothing = ("none",) * len(EDGE_PATHS)
            skeleton = NasBench201Network(self.image[0], self.num_classes, self.channels, self.cells, nothing)
            network = MixedNasBench201(skeleton, operations, make_edge, affine)
        first = 0 if seed is None else seed
        return NasBench201Supernet(network, self.space, operations, self.build, relaxation, first, edge_weights)

    def search_form(self, channels: int, cells: int) -> NasBench201Family:
        """Return the family of the search network: itself, as in the benchmark."""
        return self

    def final_form(self, *, auxiliary: bool) -> NasBench201Family:
        """Return the family of the final network: itself, it has no auxiliary classifier."""
        return self

    def architecture_of(self, network: NasBench201Network) -> Architecture:
        """Return the point of the space that ``network`` is."""
        return self.space.validate(dict(zip(EDGE_PATHS, network.operations, strict=True)))

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return ``macs`` (standard convention, one image) and ``params`` in closed form; nothing is built.

        Per stage of width w and map h x h', a convolution of kernel k adds ``w^2 k^2 h h'`` MACs and ``w^2 k^2 + 2 w``
        parameters to each cell; all other operations are free.
        """
        channels, height, width = self.image
        macs = params = 0
        for stage in range(3):
            wide = self.channels * 2**stage
            before = wide // 2
            area = height * width // 4**stage
            if stage:
                weights = 9 * before * wide + 9 * wide * wide + before * wide
                norms = 4 * wide
            else:
                weights, norms = 9 * channels * wide, 2 * wide
            for path in EDGE_PATHS:
                kernel = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}.get(str(architecture[path]), 0)
                weights += self.cells * kernel**2 * wide * wide
                norms += self.cells * 2 * wide if kernel else 0
            macs += weights * area
            params += weights + norms
        last = 4 * self.channels
        return {
            "macs": macs + last * self.num_classes,
            "params": params + 2 * last + (last + 1) * self.num_classes,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"name": "nas-bench-201", **fields, "image": list(self.image)}


def random_path(rng: np.random.Generator) -> Architecture:
    """Return a uniformly sampled cell in which every node has an operation other than ``none`` coming in.

    Cells with a node that all edges leave empty are drawn again, as the benchmark's weight-sharing random search does.
    """
    space = nas_bench_201_space()
    while True:
        cell = space.sample(rng)
        fed = {path[-1] for path in EDGE_PATHS if cell[path] != "none"}
        if len(fed) == 3:
            return cell


def family_from_json(data: Mapping[str, Any]) -> NasBench201Family:
    """Return the family that ``NasBench201Family.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image")}
    channels, height, width = data["image"]
    return NasBench201Family(image=(channels, height, width), **fields)


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> NasBench201Family:
    """Return the family called ``name`` for a task's images.

    Args:
        name: "nas-bench-201".
        image: (C, H, W).
        num_classes: Number of classes.
        settings: ``channels`` (C, 16) and ``cells`` (N, 5).

    Raises:
        UserError: Another name, or sizes that the network cannot have.
    """
    if name != "nas-bench-201":
        raise UserError("family", name, allowed="nas-bench-201", hint="See archsmith families.")
    return NasBench201Family(image=(image[0], image[1], image[2]), num_classes=num_classes, **settings)


def published_flops(network: nn.Module, image: tuple[int, int, int]) -> int:
    """Return the "FLOPs" of the benchmark's tables: MACs of convolutions and linear layers, plus linear biases.

    Normalisation, pooling and additions count nothing. ``archsmith.cost.count`` in its standard convention gives the
    same number without the biases.

    Args:
        network: Network for such images, on any device.
        image: (C, H, W).
    """
    device = next(network.parameters()).device
    macs = count(network, torch.zeros(1, *image, device=device)).macs
    biases = [m.bias for m in network.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    return macs + sum(bias.numel() for bias in biases)

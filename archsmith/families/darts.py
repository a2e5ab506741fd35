"""DARTS networks: any pair of cells of the space, stacked for small images or for large ones.

With other primitives they are the networks of sharpDARTS: the same cells, other operations behind the names.

Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", arXiv 1806.09055; Hundt, Jain, Hager,
"sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from archsmith.core.errors import Shown, UserError
from archsmith.cost import count
from archsmith.families.darts_space import (
    CELLS,
    DARTS_OPERATIONS,
    EXTRA_OPERATIONS,
    NODES,
    OPERATION_SETS,
    RESTRICTED,
    EdgeOperations,
    Genotype,
    architecture_of,
    darts_space,
    edges_of,
    genotype_of,
)
from archsmith.families.darts_supernet import DartsSupernet, SearchNetwork
from archsmith.layers.darts import DartsNetwork, DenseLayers, reduction_cells
from archsmith.layers.sharp import CHOKE, SHARP_CONVOLUTIONS, SharpPrimitives, sharp_size
from archsmith.space import Architecture, ProductSpace
from archsmith.supernet.mixed import Relaxation
from archsmith.supernet.relaxed import MakeEdge, mixed_edge

FAMILIES = (
    {
        "name": "darts",
        "title": "Two cells of four nodes with two edges each, stacked (DARTS)",
        "task": "images",
        "relaxed": True,
    },
    {
        "name": "sharpdarts",
        "title": "DARTS cells of balanced separable convolutions, with narrow and wide middles (sharpDARTS)",
        "task": "images",
        "relaxed": True,
    },
)

PRIMITIVES = {"darts": "darts", "sharp": "sharpdarts"}
"""What makes operations, and the name of the family that it gives."""

SHARP_NAMES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", *SHARP_CONVOLUTIONS)
"""Operations that the sharp primitives can make."""

SKELETONS: dict[str, dict[str, Any]] = {
    "cifar": {"channels": 36, "cells": 20, "stem": "cifar"},
    "imagenet": {"channels": 48, "cells": 14, "stem": "imagenet"},
    "search": {"channels": 16, "cells": 8, "stem": "cifar"},
    "tiny": {"channels": 8, "cells": 5, "stem": "cifar"},
}
"""Published settings of the final networks and of the search network; and ours for images below 24 pixels."""

AUXILIARY_WEIGHT = 0.4
"""Weight of the auxiliary classifier's loss."""


@dataclass(frozen=True, kw_only=True)
class DartsFamily:
    """Networks of one skeleton for one image size.

    Attributes:
        image: Shape of one image, (C, H, W); H and W multiples of 4, or of 32 with the stem "imagenet"; of any size
            with the primitives "sharp".
        num_classes: Number of classes.
        channels: C, channels of the nodes of the first cells, even.
        cells: Number of cells, from 3; those at one and at two thirds of the depth halve the resolution.
        stem: "cifar" or "imagenet".
        auxiliary: Whether networks have the auxiliary classifier (for training only; images of 32 to 43 pixels with the
            stem "cifar", 224 with the other).
        nodes: Own nodes of a cell.
        operations: Candidates of the search network's edges.
        edge_operations: Candidates of each edge of a normal and of a reduction cell, in place of ``operations``.
        primitives: "darts", or "sharp" for the blocks of sharpDARTS behind the names of operations.
        choke: Middle width of the choke convolutions of "sharp" (published: 32, and 96 for large images). The published
            searches have 32 whatever the final network has, and so has ``search_form``.

    Build one with ``darts_family(skeleton, image=..., num_classes=...)``.

    Raises:
        UserError: A value that the networks cannot have.
    """

    image: tuple[int, int, int]
    num_classes: int
    channels: int = 36
    cells: int = 20
    stem: str = "cifar"
    auxiliary: bool = False
    nodes: int = NODES
    operations: tuple[str, ...] = DARTS_OPERATIONS
    edge_operations: EdgeOperations | None = None
    primitives: str = "darts"
    choke: int = CHOKE

    def __post_init__(self) -> None:
        if self.primitives not in PRIMITIVES:
            raise UserError("family.primitives", self.primitives, allowed=", ".join(PRIMITIVES))
        if self.stem not in ("cifar", "imagenet"):
            raise UserError("family.stem", self.stem, allowed="'cifar' or 'imagenet'")
        for name, least in (("num_classes", 1), ("channels", 2), ("cells", 3), ("nodes", 1), ("choke", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"family.{name}", value, allowed=f"an integer from {least}")
        if self.channels % 2:
            raise UserError("family.channels", self.channels, allowed="an even number: half of a halved image's each")
        unit = 4 if self.stem == "cifar" else 32
        uneven = self.primitives == "darts" and (self.image[1] % unit or self.image[2] % unit)
        if min(self.image) < 1 or uneven:
            raise UserError(
                "image size",
                Shown(f"{self.image[1]}x{self.image[2]}"),
                allowed=f"sides that are multiples of {unit} pixels, because the network halves them evenly",
                hint="Resize the images (task option resolution).",
            )
        allowed = (8, 10) if self.stem == "cifar" else (7, 8)
        if self.auxiliary and not all(allowed[0] <= side // unit <= allowed[1] for side in self.image[1:]):
            raise UserError(
                "family.auxiliary",
                self.auxiliary,
                allowed=f"images of {allowed[0] * unit} to {allowed[1] * unit} pixels: it pools to 2x2",
                hint="Train without it.",
            )
        known = (*DARTS_OPERATIONS, *EXTRA_OPERATIONS) if self.primitives == "darts" else SHARP_NAMES
        for names in {self.operations, *(edge for cell in self.edge_operations or () for edge in cell)}:
            if set(names) - set(known) or not set(names) - {"none"}:
                raise UserError("family.operations", names, allowed=", ".join(known))
        if self.edge_operations is not None:
            if self.primitives != "darts":
                raise UserError("family.edge_operations", "given", allowed="None with the blocks of sharpDARTS")
            darts_space(self.nodes, edge_operations=self.edge_operations)

    @property
    def space(self) -> ProductSpace:
        """The space of cell pairs."""
        return darts_space(self.nodes, self.operations, self.edge_operations, name=PRIMITIVES[self.primitives])

    def largest(self) -> Architecture:
        """Return the most expensive cells: the operation with most weights on every edge.

        That an edge halves the resolution changes the cost of skips alone, which then have weights. Where the heaviest
        kernels are left out this is a good guess, because the order of the others depends on the width.
        """
        if self.edge_operations is not None:
            return self._extreme(self.edge_operations, heavy=True)
        heavy = self._by_weight()[-1]
        return self._uniform(heavy, from_inputs=heavy == "skip_connect")

    def smallest(self) -> Architecture:
        """Return the cheapest cells: operations without weights wherever there are any, else the lightest."""
        if self.edge_operations is not None:
            return self._extreme(self.edge_operations, heavy=False)
        light = self._by_weight()[0]
        return self._uniform(light, from_inputs=light != "skip_connect")

    def _by_weight(self) -> list[str]:
        """Return the operations by their cost, ascending; sharp convolutions by their cost over all cells."""
        if self.primitives == "darts":
            return [name for name in _BY_WEIGHT if name in self.operations]
        free = [name for name in ("max_pool_3x3", "avg_pool_3x3", "skip_connect") if name in self.operations]
        widths = [
            self.channels * 2 ** sum(cell >= halving for halving in reduction_cells(self.cells))
            for cell in range(self.cells)
        ]

        def macs(name: str) -> float:  # in units of the first cells' pixels
            return sum(sharp_size(name, width, width, self.choke)[0] * (self.channels / width) ** 2 for width in widths)

        return free + sorted((name for name in self.operations if name in SHARP_CONVOLUTIONS), key=macs)

    def _uniform(self, operation: str, *, from_inputs: bool) -> Architecture:
        """Return cells of one operation, whose nodes read both inputs, or the two nodes before them."""
        sources = [(0, 1) if from_inputs else (node, node + 1) for node in range(self.nodes)]
        edges = tuple((operation, source) for pair in sources for source in pair)
        concat = tuple(range(2, self.nodes + 2))
        return architecture_of(Genotype(edges, edges, concat, concat), self.space)

    def _extreme(self, edge_operations: EdgeOperations, *, heavy: bool) -> Architecture:
        """Return cells whose nodes keep their two heaviest or lightest edges, by the weights of the first cells."""
        c = self.channels

        def weight(name: str, cell: str, source: int) -> int:
            if name == "skip_connect":
                return c * c if cell == "reduce" and source < 2 else 0
            kernel = int(name[-1]) if name.startswith(("sep", "dil")) else 0
            return (2 if name.startswith("sep") else 1) * (kernel * kernel * c + c * c) if kernel else 0

        sign = -1 if heavy else 1
        cells = {}
        for cell, of_cell in zip(CELLS, edge_operations, strict=True):
            best: dict[int, list[tuple[int, int, str]]] = {}
            for (source, target), names in zip(edges_of(self.nodes), of_cell, strict=True):
                ranked = sorted((sign * weight(name, cell, source), name) for name in names if name != "none")
                best.setdefault(target, []).append((ranked[0][0], source, ranked[0][1]))
            cells[cell] = tuple((name, source) for edges in best.values() for _, source, name in sorted(edges)[:2])
        concat = tuple(range(2, self.nodes + 2))
        return architecture_of(Genotype(**cells, normal_concat=concat, reduce_concat=concat), self.space)

    def build(
        self, architecture: Mapping[str, Any], *, seed: int | None = None, layers: DenseLayers | None = None
    ) -> DartsNetwork:
        """Return the network of a point of the space, with torch's own initialisation, as the published runs.

        Args:
            architecture: Decisions by path, all dimensions present.
            seed: Seed of the initialisation; None draws from torch's global generator (for weights loaded next).
            layers: Makes convolutions and classifier; ordinary ones if None.
        """
        return self.network(genotype_of(architecture), seed=seed, layers=layers)

    def network(
        self, genotype: Genotype, *, seed: int | None = None, layers: DenseLayers | None = None
    ) -> DartsNetwork:
        """Return the network of a genotype, also of one that is no point of the space; arguments as of ``build``."""
        with _seeded(seed):
            return DartsNetwork(
                **self._skeleton(layers),
                normal=genotype.normal,
                reduce=genotype.reduce,
                normal_concat=genotype.normal_concat,
                reduce_concat=genotype.reduce_concat,
                auxiliary=self.auxiliary,
            )

    def supernet(
        self,
        *,
        seed: int | None = None,
        relaxation: Relaxation | None = None,
        options: Mapping[str, tuple[tuple[str, ...], ...]] | None = None,
        layers: DenseLayers | None = None,
        make_edge: MakeEdge = mixed_edge,
        edge_weights: bool = False,
    ) -> DartsSupernet:
        """Return the search network: all operations on every edge, weights of their own.

        Args:
            seed: Seed of weights and logits; None draws the weights from torch's global generator.
            relaxation: From logits to mixing weights; softmax if None.
            options: Candidates of each edge by kind of cell ("normal", "reduce"); by default those of the family.
            layers: Makes convolutions and classifier; ordinary ones if None.
            make_edge: Makes an edge of its candidates.
            edge_weights: Whether the edges of a node are weighted against each other.

        Raises:
            UserError: ``options`` has another number of edges.
        """
        edges = len(edges_of(self.nodes))
        own = self.edge_operations or ((self.operations,) * edges,) * len(CELLS)
        chosen = dict(zip(CELLS, own, strict=True)) if options is None else dict(options)
        if set(chosen) != set(CELLS) or any(len(of_cell) != edges for of_cell in chosen.values()):
            raise UserError("options", options, allowed=f"candidates of {edges} edges for each of {', '.join(CELLS)}")
        skeleton = self._skeleton(layers)
        with _seeded(seed):
            network = SearchNetwork(
                **{**skeleton, "layers": layers or DenseLayers()},
                nodes=self.nodes,
                options=chosen,
                make_edge=make_edge,
            )
        first = 0 if seed is None else seed
        return DartsSupernet(
            network, skeleton, self.space, self.nodes, chosen, relaxation, first, edge_weights=edge_weights
        )

    def relaxed(self, **options: Any) -> DartsSupernet:
        """Return the supernet that differentiable searches train; arguments as of ``supernet``."""
        return self.supernet(**options)

    def search_form(self, channels: int, cells: int) -> DartsFamily:
        """Return the family of the search network: as wide and deep as said, without the auxiliary classifier."""
        return replace(self, auxiliary=False, channels=channels, cells=cells, choke=CHOKE)

    def final_form(self, *, auxiliary: bool) -> DartsFamily:
        """Return the family of the final network, with or without the auxiliary classifier."""
        return replace(self, auxiliary=auxiliary)

    def architecture_of(self, network: DartsNetwork) -> Architecture:
        """Return the point of the space that ``network`` is."""
        arguments = network.constructor()
        names = ("normal", "reduce", "normal_concat", "reduce_concat")
        return architecture_of(Genotype(**{name: arguments[name] for name in names}), self.space)

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return "macs" and "params" for this image size, without the auxiliary classifier; nothing is computed."""
        return published_counts(self, genotype_of(architecture))

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain: dict[str, Any] = {"image": list(self.image), "operations": list(self.operations)}
        if self.edge_operations is not None:
            plain["edge_operations"] = [[list(edge) for edge in cell] for cell in self.edge_operations]
        return {"name": PRIMITIVES[self.primitives], **fields, **plain}

    def _skeleton(self, layers: DenseLayers | None) -> dict[str, Any]:
        return {
            "in_channels": self.image[0],
            "num_classes": self.num_classes,
            "channels": self.channels,
            "cells": self.cells,
            "stem": self.stem,
            "layers": layers,
            "primitives": None if self.primitives == "darts" else SharpPrimitives(self.choke),
        }


_BY_WEIGHT = (
    "noise",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "sep_conv_3x3",
    "sep_conv_5x5",
)
"""Operations by their cost, ascending."""


def published_counts(family: DartsFamily, genotype: Genotype) -> dict[str, int]:
    """Return "macs" (convolutions and linear layers, one image) and "params" of a genotype as papers count them.

    The auxiliary classifier, which is not part of the deployed network, counts nothing.
    """
    with torch.device("meta"):
        network = family.network(genotype)
        network.auxiliary = None
        counted = count(network, torch.zeros(1, *family.image))
    return {"macs": counted.macs, "params": counted.params}


def family_from_json(data: Mapping[str, Any]) -> DartsFamily:
    """Return the family that ``DartsFamily.to_json`` described."""
    fields = {key: value for key, value in data.items() if key not in ("name", "image")}
    channels, height, width = data["image"]
    return DartsFamily(image=(channels, height, width), **_as_tuples(fields))


def darts_family(
    skeleton: str = "auto", *, image: tuple[int, int, int], num_classes: int, restricted: str = "", **settings: Any
) -> DartsFamily:
    """Return the family of a skeleton for one image size.

    Args:
        skeleton: A name of ``SKELETONS``, or "auto": "tiny" below 24 pixels, "cifar" below 96, else "imagenet".
        image: (C, H, W).
        num_classes: Number of classes.
        restricted: A name of ``darts_space.RESTRICTED``, "s1" to "s5", for its candidates; "" for all operations.
        settings: Any attribute of ``DartsFamily``, in place of the skeleton's; ``operations`` may be the name of a
            published set ("darts", "sharp", "sharper").

    Raises:
        UserError: Unknown skeleton or setting, or a value that is not allowed.
    """
    if skeleton == "auto":
        skeleton = "tiny" if min(image[1:]) < 24 else "cifar" if min(image[1:]) < 96 else "imagenet"
    if skeleton not in SKELETONS:
        raise UserError("family.skeleton", skeleton, allowed=", ".join(["auto", *SKELETONS]))
    if unknown := sorted(set(settings) - set(DartsFamily.__dataclass_fields__)):
        allowed = ", ".join(name for name in DartsFamily.__dataclass_fields__ if name not in ("image", "num_classes"))
        raise UserError("family", unknown, allowed=f"skeleton, restricted, {allowed}")
    if restricted and restricted not in RESTRICTED:
        raise UserError("family.restricted", restricted, allowed=", ".join(RESTRICTED))
    if isinstance(named := settings.get("operations"), str):
        if named not in OPERATION_SETS:
            raise UserError("family.operations", named, allowed=f"{', '.join(OPERATION_SETS)}, or a list of names")
        settings["operations"] = OPERATION_SETS[named]
    given = {**SKELETONS[skeleton], **RESTRICTED.get(restricted, {}), **_as_tuples(settings)}
    return DartsFamily(image=image, num_classes=num_classes, **given)


def _as_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with candidates as tuples, as they come from JSON or a command line."""
    result = dict(settings)
    if "operations" in result:
        result["operations"] = tuple(result["operations"])
    if result.get("edge_operations") is not None:
        result["edge_operations"] = tuple(
            tuple(tuple(edge) for edge in of_cell) for of_cell in result["edge_operations"]
        )
    return result


def open_family(name: str, *, image: tuple[int, int, int], num_classes: int, **settings: Any) -> DartsFamily:
    """Return the family called ``name`` ("darts" or "sharpdarts") for a task's images; settings as of ``darts_family``.

    The default operations of "sharpdarts" are those of its set "sharp".
    """
    if name not in PRIMITIVES.values():
        raise UserError("family", name, allowed=", ".join(PRIMITIVES.values()), hint="See archsmith families.")
    if name == "sharpdarts":
        settings = {"operations": "sharp", **settings, "primitives": "sharp"}
    return darts_family(image=image, num_classes=num_classes, **settings)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a stream of this seed within the block, and leave torch's global one where it was."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield

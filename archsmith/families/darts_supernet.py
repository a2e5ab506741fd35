"""The search network of DARTS: every edge of every cell holds all operations, mixed by weights that the cells share.

Normalisations inside cells have no scale and shift, so that no operation can make itself larger, and poolings are
followed by one. What an architecture extracts to keeps both; what is trained from scratch afterwards has neither.

Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", arXiv 1806.09055.
"""

# B batch, C channels, H height, W width; E edges, O candidates

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.families.darts_space import CELLS, Genotype, architecture_of, edges_of, genotype_of
from archsmith.layers.darts import (
    DartsNetwork,
    DartsPrimitives,
    DenseLayers,
    input_layer,
    make_stem,
    reduction_cells,
    stem_outputs,
)
from archsmith.layers.partial_nets import PartialDartsNetwork
from archsmith.space import Architecture, ProductSpace
from archsmith.supernet.fused import NodeSums
from archsmith.supernet.mixed import Relaxation
from archsmith.supernet.partial import partial_form
from archsmith.supernet.relaxed import MakeEdge, SearchSupernet, mixed_edge
from archsmith.supernet.selection import magnitude

Options = tuple[tuple[str, ...], ...]
"""Candidates of each edge of a cell."""

FREE = ("skip_connect", "max_pool_3x3", "avg_pool_3x3", "none")
"""Operations without weights; a search whose cells hold little else has collapsed."""


class SearchCell(nn.Module):
    """A cell with a mixed operation on every edge; its output is the concatenation of its own nodes.

    Args:
        options: Candidates of every edge, see ``edges_of``.
        nodes: Own nodes.
        before_channels: Channels of node 0's input (B, C, H, W).
        previous_channels: Channels of node 1's input.
        channels: Channels of every own node.
        reduction: Whether edges that read an input have stride 2.
        after_reduction: Whether node 0's input has twice the resolution of node 1's.
        layers: Makes the convolutions.
        make_edge: Makes an edge of its candidates.
        primitives: Makes the operations; those of DARTS if None.
    """

    def __init__(
        self,
        options: Options,
        nodes: int,
        before_channels: int,
        previous_channels: int,
        channels: int,
        reduction: bool,
        after_reduction: bool,
        layers: DenseLayers,
        make_edge: MakeEdge = mixed_edge,
        primitives: DartsPrimitives | None = None,
    ) -> None:
        super().__init__()
        made = DartsPrimitives() if primitives is None else primitives
        self.nodes = nodes
        self.before = input_layer(before_channels, channels, after_reduction, False, layers, made)
        self.previous = input_layer(previous_channels, channels, False, False, layers, made)
        self.edges = nn.ModuleList()
        for (source, _), names in zip(edges_of(nodes), options, strict=True):
            stride = 2 if reduction and source < 2 else 1

            def candidates(width: int, names: Sequence[str] = names, stride: int = stride) -> dict[str, nn.Module]:
                return {name: made.operation(name, width, stride, False, layers, True) for name in names}

            self.edges.append(make_edge(candidates, channels, stride))

    def forward(
        self, before: Tensor, previous: Tensor, mixing_EO: Tensor, edge_weights_E: Tensor | None = None
    ) -> Tensor:
        """Map both inputs to (B, nodes * C, H', W'); every edge counts by its weight, where they have any."""
        states = [self.before(before), self.previous(previous)]
        nodes = NodeSums(self.edges, states)
        edge = 0
        for _ in range(self.nodes):
            own = range(edge, edge + len(states))
            states.append(
                nodes(
                    states,
                    [self.edges[edge] for edge in own],
                    [mixing_EO[edge] for edge in own],
                    None if edge_weights_E is None else [edge_weights_E[edge] for edge in own],
                )
            )
            edge = own.stop
        nodes.finish_()
        return torch.cat(states[2:], dim=1)


class SearchNetwork(nn.Module):
    """The stacked search cells; called with the mixing weights of "normal" and "reduce".

    Args:
        in_channels: Channels of the images (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        channels: Channels of the nodes of the first cells.
        cells: Number of cells.
        nodes: Own nodes of a cell.
        options: Candidates of every edge, by kind of cell.
        stem: "cifar" or "imagenet".
        layers: Makes convolutions and classifier.
        make_edge: Makes an edge of its candidates.
        primitives: Makes the operations; those of DARTS if None.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int,
        cells: int,
        nodes: int,
        options: Mapping[str, Options],
        stem: str,
        layers: DenseLayers,
        make_edge: MakeEdge = mixed_edge,
        primitives: DartsPrimitives | None = None,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.stem = make_stem(stem, in_channels, channels, layers)
        before = previous = 3 * channels if stem == "cifar" else channels
        after_reduction = stem == "imagenet"
        self.cells = nn.ModuleList()
        self.kinds = tuple(CELLS[index in reduction_cells(cells)] for index in range(cells))
        for kind in self.kinds:
            reduction = kind == "reduce"
            channels = 2 * channels if reduction else channels
            self.cells.append(
                SearchCell(
                    options[kind],
                    nodes,
                    before,
                    previous,
                    channels,
                    reduction,
                    after_reduction,
                    layers,
                    make_edge,
                    primitives,
                )
            )
            before, previous, after_reduction = previous, nodes * channels, reduction
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = layers.linear(previous, num_classes)

    def forward(self, x: Tensor, mixing: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        before, previous = stem_outputs(self.stem, x)
        for cell, kind in zip(self.cells, self.kinds, strict=True):
            before, previous = previous, cell(before, previous, mixing[kind], mixing.get(f"{kind}_edges"))
        logits: Tensor = self.classifier(self.pool(previous).flatten(1))
        return logits


class DartsSupernet(SearchSupernet):
    """The search network with its architecture logits, "normal" and "reduce", each (14, 8) as published.

    Made by ``DartsFamily.supernet``. Until ``activate`` it is called with relaxed logits; with an architecture active
    it computes that one's path alone.

    Args:
        network: The stacked search cells.
        arguments: Of the ``DartsNetwork`` that extracted architectures become, without its cells.
        space: Its architectures.
        nodes: Own nodes of a cell.
        options: Candidates of every edge, by kind of cell.
        relaxation: From logits to mixing weights; softmax if None.
        seed: Seed of the initial logits.
        edge_weights: Whether the edges of a node are weighted against each other.
    """

    def __init__(
        self,
        network: SearchNetwork,
        arguments: Mapping[str, Any],
        space: ProductSpace,
        nodes: int,
        options: Mapping[str, Options],
        relaxation: Relaxation | None,
        seed: int,
        edge_weights: bool = False,
    ) -> None:
        edges = edges_of(nodes)
        super().__init__(
            network,
            options,
            space=space,
            labels=dict.fromkeys(CELLS, tuple(f"{_node(source)} to {_node(target)}" for source, target in edges)),
            targets=dict.fromkeys(CELLS, tuple(target for _, target in edges)),
            per_node=2,
            relaxation=relaxation,
            seed=seed,
            edge_weights=edge_weights,
        )
        self.nodes = nodes
        self._arguments = dict(arguments)

    def path(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mixing weights of an architecture: one on the operations of its edges, zero everywhere else.

        Raises:
            UserError: It is not of the space.
        """
        genotype = genotype_of(self.space.validate(architecture))
        return self.one_hot({cell: self._on_edges(getattr(genotype, cell)) for cell in CELLS})

    def extract(self, architecture: Mapping[str, Any]) -> DartsNetwork:
        """Return the architecture's path as a network of its own, with copies of weights and running statistics.

        Raises:
            UserError: It is not of the space.
        """
        genotype = genotype_of(self.space.validate(architecture))
        cells = {"normal": genotype.normal, "reduce": genotype.reduce, **_outputs(genotype)}
        edge_form = partial_form(self.network)
        network = (
            DartsNetwork(**self._arguments, **cells, **_SEARCH_FORM)
            if edge_form is None
            else PartialDartsNetwork(**edge_form, **self._arguments, **cells, **_SEARCH_FORM)
        )
        own = self.network.state_dict()
        state = {}
        for name in network.state_dict():
            first, _, rest = name.partition(".operations.")
            if rest:
                number, _, leaf = rest.partition(".")
                assert isinstance(self.network, SearchNetwork)
                edges: Sequence[tuple[str, int]] = getattr(genotype, self.network.kinds[int(first.split(".")[1])])
                operation, source = edges[int(number)]
                edge = edges_of(self.nodes).index((source, int(number) // 2 + 2))
                through = "inner." if leaf.startswith("inner.") else ""
                own_leaf = f"{through}candidates.{operation}.{leaf.removeprefix(through)}"
                state[name] = own[f"{first}.edges.{edge}.{leaf if leaf == 'order' else own_leaf}"]
            else:
                state[name] = own[name]
        network.load_state_dict(state)
        example = next(self.network.parameters())
        return network.to(example.device, example.dtype).train(self.training)

    def genotype(self, mixing: Mapping[str, Tensor] | None = None) -> Genotype:
        """Return the cells by magnitude: two strongest edges into each node, the strongest operation other than none.

        Args:
            mixing: Strength of every operation by kind of cell; the relaxed logits if None. See ``derive``.
        """
        strengths = self.strengths(mixing)
        cells = {cell: magnitude(strengths[cell], self.options[cell], edges_of(self.nodes)) for cell in CELLS}
        concat = tuple(range(2, self.nodes + 2))
        return Genotype(**cells, normal_concat=concat, reduce_concat=concat)

    def derive(self, mixing: Mapping[str, Tensor] | None = None) -> Architecture:
        """Return ``genotype(mixing)`` as a point of the space."""
        return architecture_of(self.genotype(mixing), self.space)

    def places(self) -> dict[str, tuple[str, int]]:
        """Return the kind of cell and the number of every edge, by the edge's name in ``network``."""
        assert isinstance(self.network, SearchNetwork)
        return {
            f"cells.{index}.edges.{edge}": (kind, edge)
            for index, kind in enumerate(self.network.kinds)
            for edge in range(len(edges_of(self.nodes)))
        }

    def weightless(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return for each kind of cell how many operations have no weights."""
        genotype = genotype_of(architecture)
        return {cell: sum(name in FREE for name, _ in getattr(genotype, cell)) for cell in CELLS}

    def _on_edges(self, chosen: Sequence[tuple[str, int]]) -> list[str | None]:
        operations: dict[tuple[int, int], str] = {
            (source, number // 2 + 2): operation for number, (operation, source) in enumerate(chosen)
        }
        return [operations.get(edge) for edge in edges_of(self.nodes)]


def _node(number: int) -> str:
    """Return the name of a node in reports: the inputs are those of cells k-2 and k-1, own nodes are counted from 0."""
    return ("k-2", "k-1")[number] if number < 2 else str(number - 2)


_SEARCH_FORM: dict[str, Any] = {"affine": False, "pool_norm": True}


def _outputs(genotype: Genotype) -> dict[str, Any]:
    return {"normal_concat": genotype.normal_concat, "reduce_concat": genotype.reduce_concat}

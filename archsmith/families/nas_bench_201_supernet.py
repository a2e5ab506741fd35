"""The relaxed supernet of NAS-Bench-201: every edge of every cell holds all five operations, mixed by shared weights.

Source: NAS-Bench-201, arXiv 2001.00326 (its DARTS, GDAS and SETN baselines search this network).
"""

# B batch, C channels, H height, W width; E edges, O candidates

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.families.cell_spaces import NB201_EDGES, NB201_PATHS
from archsmith.layers.cells import NasBench201Network, make_edge_operation
from archsmith.layers.partial_nets import PartialNasBench201Network
from archsmith.space import Architecture, ProductSpace
from archsmith.supernet.fused import NodeSums
from archsmith.supernet.mixed import Relaxation
from archsmith.supernet.partial import partial_form
from archsmith.supernet.relaxed import MakeEdge, SearchSupernet
from archsmith.supernet.selection import strongest

GROUP = "cell"
"""The one group of logits, (6, 5): all cells share them."""

FREE = ("none", "skip_connect", "avg_pool_3x3")
"""Operations without weights."""


class MixedCell(nn.Module):
    """A dense cell of four nodes with a mixed operation on every edge.

    Args:
        options: Candidates of every edge.
        channels: Channels of every node.
        affine: Whether normalisations have a scale and a shift.
        make_edge: Makes an edge of its candidates.
    """

    def __init__(self, options: Sequence[str], channels: int, affine: bool, make_edge: MakeEdge) -> None:
        super().__init__()

        def candidates(width: int) -> dict[str, nn.Module]:
            return {name: make_edge_operation(name, width, affine) for name in options}

        self.edges = nn.ModuleList(make_edge(candidates, channels, 1) for _ in NB201_EDGES)

    def forward(self, x: Tensor, mixing_EO: Tensor, edge_weights_E: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to the same shape; every edge counts by its weight, where they have any."""
        states = [x]
        nodes = NodeSums(self.edges, states)
        for target in range(1, 4):
            own = [edge for edge, (_, end) in enumerate(NB201_EDGES) if end == target]
            states.append(
                nodes(
                    [states[NB201_EDGES[edge][0]] for edge in own],
                    [self.edges[edge] for edge in own],
                    [mixing_EO[edge] for edge in own],
                    None if edge_weights_E is None else [edge_weights_E[edge] for edge in own],
                )
            )
        nodes.finish_()
        return states[-1]


class MixedNasBench201(nn.Module):
    """The benchmark's skeleton with mixed cells; called with the mixing weights of "cell".

    Args:
        skeleton: The skeleton; its cells are replaced.
        options: Candidates of every edge.
        make_edge: Makes an edge of its candidates.
    """

    def __init__(self, skeleton: NasBench201Network, options: Sequence[str], make_edge: MakeEdge) -> None:
        super().__init__()
        self.skeleton = skeleton
        for stage, cells in enumerate(skeleton.stages):
            assert isinstance(cells, nn.ModuleList)
            width = skeleton.stem.out_channels * 2**stage
            for index in range(len(cells)):
                cells[index] = MixedCell(options, width, skeleton.affine, make_edge)

    def forward(self, x: Tensor, mixing: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        net = self.skeleton
        weights, edges = mixing[GROUP], mixing.get(f"{GROUP}_edges")
        x = net.stem_norm(net.stem(x))
        for stage, cells in enumerate(net.stages):
            x = net.reductions[stage - 1](x) if stage else x
            assert isinstance(cells, nn.ModuleList)
            for cell in cells:
                x = cell(x, weights, edges)
        logits: Tensor = net.classifier(net.pool(net.last_relu(net.last_norm(x))).flatten(1))
        return logits


class NasBench201Supernet(SearchSupernet):
    """The mixed network with its logits "cell", (6, 5).

    Made by ``NasBench201Family.relaxed``.

    Args:
        network: The mixed network.
        space: The 15,625 cells.
        options: Candidates of every edge.
        build: Returns the standalone network of an architecture.
        relaxation: From logits to mixing weights; softmax if None.
        seed: Seed of the initial logits.
        edge_weights: Whether the edges of a node are weighted against each other.
    """

    def __init__(
        self,
        network: MixedNasBench201,
        space: ProductSpace,
        options: Sequence[str],
        build: Callable[[Architecture], nn.Module],
        relaxation: Relaxation | None,
        seed: int,
        edge_weights: bool,
    ) -> None:
        super().__init__(
            network,
            {GROUP: (tuple(options),) * len(NB201_EDGES)},
            space=space,
            labels={GROUP: tuple(f"{source} to {target}" for source, target in NB201_EDGES)},
            targets={GROUP: tuple(target for _, target in NB201_EDGES)},
            relaxation=relaxation,
            seed=seed,
            edge_weights=edge_weights,
        )
        self._build = build

    def path(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mixing weights of a cell: one on its operations, zero everywhere else.

        Raises:
            UserError: It is not of the space.
        """
        cell = self.space.validate(architecture)
        return self.one_hot({GROUP: [str(cell[path]) for path in NB201_PATHS]})

    def derive(self, mixing: Mapping[str, Tensor] | None = None) -> Architecture:
        """Return the cell of the strongest operation on every edge, ``none`` among them, as the benchmark does.

        Args:
            mixing: Strength of every operation; the relaxed logits if None.
        """
        names = strongest(self.strengths(mixing)[GROUP], self.options[GROUP])
        return self.space.validate(dict(zip(NB201_PATHS, names, strict=True)))

    def places(self) -> dict[str, tuple[str, int]]:
        """Return the group and the number of every edge, by the edge's name in ``network``."""
        return {
            f"{name}.edges.{edge}": (GROUP, edge)
            for name, module in self.network.named_modules()
            if isinstance(module, MixedCell)
            for edge in range(len(NB201_EDGES))
        }

    def weightless(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return how many of the six operations have no weights."""
        return {GROUP: sum(architecture[path] in FREE for path in NB201_PATHS)}

    def extract(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return a network of its own with a copy of the path's weights and statistics, in the supernet's mode.

        Normalisations that have no scale and shift here get the neutral ones there.

        Raises:
            UserError: It is not of the space.
        """
        cell = self.space.validate(architecture)
        chosen = [str(cell[path]) for path in NB201_PATHS]
        state: dict[str, Tensor] = {}
        for name, tensor in self.network.state_dict().items():
            name = name.removeprefix("skeleton.")
            edge, inside, rest = name.partition(".candidates.")
            if not inside:
                state[name] = tensor
            elif rest.startswith(f"{chosen[int(edge.removesuffix('.inner').rpartition('.')[2])]}."):
                state[f"{edge}.{rest.partition('.')[2]}"] = tensor
        network = self._build(cell)
        edge_form = partial_form(self.network)
        if edge_form is not None:
            assert isinstance(network, NasBench201Network)
            network = PartialNasBench201Network(**edge_form, **network.constructor())
        missing, unexpected = network.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm) and f"{name}.weight" in missing:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        example = next(self.network.parameters())
        return network.to(example.device, example.dtype).train(self.training)

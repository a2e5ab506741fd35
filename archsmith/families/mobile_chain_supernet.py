"""The search network of a chain: in every place all candidates side by side, one row of logits for each place.

The shortcut is outside of the mixture: a place computes ``x + sum_o weights[o] * candidate_o(x)`` where the shape stays
the same, so the weight of the candidate "zero" is the weight of the shortcut alone.

Source: ProxylessNAS, arXiv 1812.00332.
"""

# B batch, C channels, H height, W width; E places with a choice, O candidates

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from archsmith.families.mobile_chain_space import ZERO, Place, kernel_and_expansion
from archsmith.layers.cells import Zero
from archsmith.layers.mobile import ConvNormAct
from archsmith.layers.mobile_chain import MobileChain, inverted_residual
from archsmith.space import Architecture
from archsmith.supernet.mixed import MixedOp, Relaxation
from archsmith.supernet.relaxed import SearchSupernet

if TYPE_CHECKING:
    from archsmith.families.mobile_chain import ChainFamily

GROUP = "blocks"
"""The group of all logits."""


class SearchBlock(nn.Module):
    """A place with a choice: the mixture of its candidates, and the shortcut where there is one.

    Args:
        edge: Mixture of the candidates, without their shortcuts.
        residual: Whether the input is added.
    """

    def __init__(self, edge: nn.Module, residual: bool) -> None:
        super().__init__()
        self.edge = edge
        self.residual = residual

    def forward(self, x: Tensor, weights_O: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        y: Tensor = self.edge(x, weights_O)
        return y + x if self.residual else y


class ChainSearchNetwork(nn.Module):
    """The chain of search blocks; called with the mixing weights of "blocks".

    Args:
        chain: The places; those with a single candidate are ordinary blocks.
        in_channels: Channels of the images (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        stem_channels: Width of the stem.
        stem_stride: Its stride.
        last_channels: Width of the last 1x1 convolution.
        activation: Of all layers.
        dropout: Drop probability in front of the classifier.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of the running statistics.
    """

    def __init__(
        self,
        chain: Sequence[Place],
        in_channels: int,
        num_classes: int,
        stem_channels: int,
        stem_stride: int,
        last_channels: int,
        activation: str,
        dropout: float,
        norm_eps: float,
        norm_momentum: float,
    ) -> None:
        super().__init__()
        norm = (norm_eps, norm_momentum)
        self.stem = ConvNormAct(in_channels, stem_channels, 3, stem_stride, activation, *norm)
        self.blocks = nn.ModuleList()
        for place in chain:

            def made(name: str, shortcut: bool, place: Place = place) -> nn.Module:
                if name == ZERO:
                    return Zero()
                shape = (place.in_channels, place.out_channels, place.stride)
                return inverted_residual(*shape, *kernel_and_expansion(name), activation, *norm, shortcut)

            if len(place.candidates) == 1:
                self.blocks.append(made(place.candidates[0], True))
            else:
                candidates = {name: made(name, False) for name in place.candidates}
                self.blocks.append(SearchBlock(MixedOp(candidates), place.residual))
        self.last = ConvNormAct(chain[-1].out_channels, last_channels, 1, 1, activation, *norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last_channels, num_classes)

    def forward(self, x: Tensor, mixing: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        x, row = self.stem(x), 0
        for block in self.blocks:
            if isinstance(block, SearchBlock):
                x = block(x, mixing[GROUP][row])
                row += 1
            else:
                x = block(x)
        x = self.pool(self.last(x)).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x))
        return logits


class ChainSupernet(SearchSupernet):
    """The search network with its logits "blocks", one row for each place with a choice.

    Made by ``ChainFamily.supernet``.

    Args:
        network: The chain of search blocks.
        family: Builds what architectures extract to.
        relaxation: From logits to mixing weights; softmax if None.
        seed: Seed of the initial logits.
        edge_weights: See ``SearchSupernet``.
    """

    def __init__(
        self,
        network: ChainSearchNetwork,
        family: ChainFamily,
        *,
        relaxation: Relaxation | None = None,
        seed: int = 0,
        edge_weights: bool = False,
    ) -> None:
        searched = family.searched
        super().__init__(
            network,
            {GROUP: [family.places[number][2] for number in searched]},
            space=family.space,
            labels={GROUP: [f"block {number}" for number in searched]},
            targets={GROUP: searched},
            relaxation=relaxation,
            seed=seed,
            edge_weights=edge_weights,
        )
        self.family = family

    def path(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mixing weights of an architecture: one on what stands in each place, zero everywhere else.

        Raises:
            UserError: It is not of the space.
        """
        chosen = self.space.validate(architecture)
        return self.one_hot({GROUP: [str(chosen[f"blocks/{number}"]) for number in self.family.searched]})

    def extract(self, architecture: Mapping[str, Any]) -> MobileChain:
        """Return the architecture's path as a network of its own, with copies of weights and running statistics.

        Raises:
            UserError: It is not of the space.
        """
        chosen = self.family.chosen(self.space.validate(architecture))
        network = self.family.build(self.space.validate(architecture))
        own, state = self.network.state_dict(), {}
        for name in network.state_dict():
            first, _, rest = name.partition(".")
            place, _, leaf = rest.partition(".")
            if first == "blocks" and int(place) in self.family.searched:
                state[name] = own[f"blocks.{place}.edge.candidates.{chosen[int(place)]}.{leaf}"]
            else:
                state[name] = own[name]
        network.load_state_dict(state)
        example = next(self.network.parameters())
        return network.to(example.device, example.dtype).train(self.training)

    def derive(self, mixing: Mapping[str, Tensor] | None = None) -> Architecture:
        """Return the strongest candidate of every place, "zero" included; of equal ones the first."""
        rows = zip(self.strengths(mixing)[GROUP].tolist(), self.options[GROUP], self.family.searched, strict=True)
        return self.space.validate(
            {f"blocks/{number}": names[row.index(max(row[: len(names)]))] for row, names, number in rows}
        )

    def places(self) -> dict[str, tuple[str, int]]:
        """Return the number of every place's row of mixing weights, by the edge's name in ``network``."""
        return {f"blocks.{number}.edge": (GROUP, row) for row, number in enumerate(self.family.searched)}

    def weightless(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return how many places are empty."""
        return {GROUP: sum(architecture[f"blocks/{number}"] == ZERO for number in self.family.searched)}

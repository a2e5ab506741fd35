"""The grid network: every way through the HyperCuboid at once, each step weighted against all others of its layer.

Source: Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900.
"""

# B batch, C channels, H height, W width; L steps of a path, N candidates of a step

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.families.hypercuboid_space import Grid, candidate_name, chain_of
from archsmith.layers.darts import DenseLayers
from archsmith.layers.hypercuboid import PathNetwork, grid_stem
from archsmith.layers.sharp import SharpSepConv, make_sharp_primitive
from archsmith.space import Architecture
from archsmith.supernet.grid_paths import GridCosts, bottom_up_path, longest_path, priced_path, top_down_path
from archsmith.supernet.mixed import Relaxation, Weights
from archsmith.supernet.relaxed import SearchSupernet

GROUP = "grid"
"""The one group of logits, a row of N for each step."""

Rule = Literal["longest", "bottom_up", "top_down", "priced"]
"""How a path is taken out of the grid."""

_RULES = {"longest": longest_path, "bottom_up": bottom_up_path, "top_down": top_down_path}

States = list[Tensor | None]
"""The map of every width; None where nothing was written."""


class GridStep(nn.Module):
    """All ways from each width to each width: each output is the weighted sum of all candidates that lead to it.

    Args:
        grid: Widths and operations.
        stride: Of every candidate.
        choke: Middle width of choke convolutions.
        layers: Makes the convolutions.
    """

    def __init__(self, grid: Grid, stride: int, choke: int, layers: DenseLayers) -> None:
        super().__init__()
        self.ways = [
            (source, target, candidate_name(before, behind, operation))
            for source, before in enumerate(grid.widths)
            for target, behind in enumerate(grid.widths)
            for operation in grid.operations
        ]
        self.candidates = nn.ModuleDict(
            {
                candidate_name(before, behind, operation): make_sharp_primitive(
                    operation, before, behind, stride, True, layers, choke
                )
                for before in grid.widths
                for behind in grid.widths
                for operation in grid.operations
            }
        )

    def forward(self, states: States, weights_N: Weights) -> States:
        """Map what was written to the next maps; candidates of weight zero, or whose input nobody wrote, do not run."""
        outputs: States = [None] * len(states)
        alive = weights_N.detach().tolist() if isinstance(weights_N, Tensor) else weights_N
        for (source, target, name), weight, number in zip(self.ways, weights_N, alive, strict=True):
            state = states[source]
            if number != 0.0 and state is not None:
                term = weight * self.candidates[name](state)
                before = outputs[target]
                outputs[target] = term if before is None else before + term
        return outputs

    def read(self, weights_N: Weights) -> set[int]:
        """Return the numbers of the widths that candidates of a weight other than zero read."""
        alive = weights_N.detach().tolist() if isinstance(weights_N, Tensor) else weights_N
        return {source for (source, _, _), number in zip(self.ways, alive, strict=True) if number != 0.0}


class GridNetwork(nn.Module):
    """Stem for each width, steps, block for each width, summed; pooling and classifier.

    Args:
        in_channels: Channels of the images (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        grid: What paths go through.
        filters: Channels of the blocks in front of the classifier.
        choke: Middle width of choke convolutions.
        layers: Makes convolutions and classifier.
    """

    def __init__(
        self, in_channels: int, num_classes: int, grid: Grid, filters: int, choke: int, layers: DenseLayers
    ) -> None:
        super().__init__()
        self.filters = filters
        self.stems = nn.ModuleList(grid_stem(in_channels, width, layers) for width in grid.widths)
        self.steps = nn.ModuleList(GridStep(grid, 1 + step % 2, choke, layers) for step in range(grid.steps))
        self.tails = nn.ModuleList(SharpSepConv(width, filters, 3, layers=layers) for width in grid.widths)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = layers.linear(filters, num_classes)

    def forward(self, x: Tensor, mixing: Mapping[str, Any]) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W), given the weights "grid" of all candidates."""
        rows = mixing[GROUP]
        first = self.steps[0]
        assert isinstance(first, GridStep)
        read = first.read(rows[0])
        states: States = [stem(x) if width in read else None for width, stem in enumerate(self.stems)]
        for step, weights in zip(self.steps, rows, strict=True):
            states = step(states, weights)
        features: Tensor | None = None
        for tail, state in zip(self.tails, states, strict=True):
            if state is not None:
                features = tail(state) if features is None else features + tail(state)
        if features is None:  # no path of weights above zero goes all the way
            features = x.new_zeros(len(x), self.filters, 1, 1)
        logits: Tensor = self.classifier(self.pool(features).flatten(1))
        return logits


class HyperCuboidSupernet(SearchSupernet):
    """The grid network with its logits "grid": all candidates of a step compete in one softmax.

    Made by ``HyperCuboidFamily.relaxed``. Candidates whose probability is at most 1 / N^2 are not run and get no
    gradient of their own.

    Args:
        network: The grid network.
        arguments: Of the ``PathNetwork`` that extracted architectures become, without its path.
        grid: What paths go through.
        costs: MACs of paths.
        relaxation: From logits to mixing weights; softmax if None.
        seed: Seed of the initial logits.
        prune: Whether improbable candidates are left out.
    """

    def __init__(
        self,
        network: GridNetwork,
        arguments: Mapping[str, Any],
        grid: Grid,
        costs: GridCosts,
        relaxation: Relaxation | None,
        seed: int,
        prune: bool,
    ) -> None:
        super().__init__(
            network,
            {GROUP: (grid.candidates,) * grid.steps},
            space=grid.space(),
            labels={GROUP: grid.labels},
            targets={GROUP: tuple(range(grid.steps))},
            relaxation=relaxation,
            seed=seed,
        )
        self.grid, self.costs, self.prune = grid, costs, prune
        self.least = len(grid.candidates) ** -2
        self._arguments = dict(arguments)

    def mixing(
        self, logits: Mapping[str, Tensor] | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the mixing weights (L, N), zero where a candidate is too improbable to be run."""
        result = super().mixing(logits, generator)
        if self.prune:
            improbable = self.probabilities(logits)[GROUP].detach() <= self.least
            result[GROUP] = result[GROUP].masked_fill(improbable, 0.0)
        return result

    def path(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mixing weights of a path: one on its candidates, zero everywhere else.

        Raises:
            UserError: It is not of the space.
        """
        return self.one_hot({GROUP: self._chosen(architecture)})

    def grid_strengths(self, mixing: Mapping[str, Tensor] | None = None) -> Any:
        """Return the strength of every candidate as an array (L, I, J, P); that of the logits if ``mixing`` is None."""
        return self.strengths(mixing)[GROUP].reshape(self.grid.shape).cpu().double().numpy()

    def derive(self, mixing: Mapping[str, Tensor] | None = None) -> Architecture:
        """Return the longest path: the one with the largest sum of strengths.

        Args:
            mixing: Strength of every candidate; the relaxed logits if None.
        """
        return self.derive_by("longest", mixing)

    def derive_by(
        self,
        rule: Rule,
        mixing: Mapping[str, Tensor] | None = None,
        *,
        costs: GridCosts | None = None,
        price: float = 0.0,
    ) -> Architecture:
        """Return the path that a rule takes.

        Args:
            rule: "longest", "bottom_up" or "top_down", see ``archsmith.supernet.grid_paths``; or "priced": the largest
                sum of strengths less what the path costs.
            mixing: Strength of every candidate; the relaxed logits if None.
            costs: Of "priced"; MACs if None.
            price: Of "priced": how much strength the cost of the dearest path is worth.

        Raises:
            UserError: Unknown rule, or a negative price.
        """
        strengths = self.grid_strengths(mixing)
        if rule == "priced":
            return self.grid.architecture(priced_path(strengths, self.costs if costs is None else costs, price))
        if rule not in _RULES:
            raise UserError("rule", rule, allowed=", ".join([*_RULES, "priced"]))
        return self.grid.architecture(_RULES[rule](strengths))

    def places(self) -> dict[str, tuple[str, int]]:
        """Return the group and the number of every step, by its name in ``network``."""
        return {f"steps.{step}": (GROUP, step) for step in range(self.grid.steps)}

    def weightless(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return how many steps have no weights: poolings that keep the width."""
        widths, operations = chain_of(self.space.validate(architecture))
        kept = [before == behind for before, behind in pairwise(widths)]
        return {GROUP: sum(name.endswith("pool_3x3") and same for name, same in zip(operations, kept, strict=True))}

    def candidate_macs(self) -> tuple[dict[str, Tensor], float]:
        """Return the MACs (L, N) of every candidate, those of both ends with the steps beside them, and all others'.

        A path's sum is exactly what its network costs.
        """
        steps = torch.tensor(self.costs.steps, dtype=torch.float64)
        steps[0] += torch.tensor(self.costs.first, dtype=torch.float64).reshape(-1, 1, 1)
        steps[-1] += torch.tensor(self.costs.last, dtype=torch.float64).reshape(1, -1, 1)
        return {GROUP: steps.flatten(1)}, float(self.costs.fixed)

    def extract(self, architecture: Mapping[str, Any]) -> PathNetwork:
        """Return a path as a network of its own, with copies of weights and running statistics.

        Raises:
            UserError: It is not of the space.
        """
        point = self.space.validate(architecture)
        path = self.grid.path(point)
        network = PathNetwork(**self._arguments, **chain_arguments(point))
        places = {"stem": f"stems.{path.widths[0]}", "tail": f"tails.{path.widths[-1]}", "classifier": "classifier"}
        for step, name in enumerate(self._chosen(point)):
            places[f"operations.{step}"] = f"steps.{step}.candidates.{name}"
        own = self.network.state_dict()
        state = {}
        for name in network.state_dict():
            parts = name.split(".")
            depth = 2 if parts[0] == "operations" else 1
            state[name] = own[".".join([places[".".join(parts[:depth])], *parts[depth:]])]
        network.load_state_dict(state)
        example = next(self.network.parameters())
        return network.to(example.device, example.dtype).train(self.training)

    def _chosen(self, architecture: Mapping[str, Any]) -> Sequence[str]:
        widths, operations = chain_of(self.space.validate(architecture))
        return [
            candidate_name(before, behind, operation)
            for (before, behind), operation in zip(pairwise(widths), operations, strict=True)
        ]


def chain_arguments(decisions: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``PathNetwork`` needs to know of a path."""
    widths, operations = chain_of(decisions)
    return {"widths": widths, "operations": operations}

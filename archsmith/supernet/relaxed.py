"""A supernet as a function of weights and architecture logits.

The network inside knows no logits: it is called ``network(x, mixing)`` with the mixing weights of every group of edges.
So the whole is ``network(x, relaxation(logits))``, a pure function of two sets of tensors that anyone may replace for
one call: unrolled steps, teachers of earlier steps, perturbed copies. Logits are never counted as weights.

``RelaxedSupernet`` knows edges and candidates alone; ``SearchSupernet`` also knows which architectures they stand for.
"""

# E edges, O candidates

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import Shown, UserError
from archsmith.space import Architecture, Space
from archsmith.supernet.mixed import MixedOp, Relaxation, Softmax

Tensors = Mapping[str, Tensor]

Candidates: TypeAlias = Callable[[int], dict[str, nn.Module]]
"""Makes all candidates of an edge for a number of channels."""

MakeEdge: TypeAlias = Callable[[Candidates, int, int], nn.Module]
"""From candidates, channels and stride to the module of an edge, which is called ``edge(x, weights)``."""


def mixed_edge(candidates: Candidates, channels: int, stride: int) -> nn.Module:
    """Return the ordinary edge: every candidate reads all channels."""
    return MixedOp(candidates(channels))


INITIAL_SCALE = 1e-3
"""Standard deviation of the initial logits (the paper of DARTS says zeros, its released code this)."""


class RelaxedSupernet(nn.Module):
    """A network of mixed operations and the logits that say how they are mixed.

    Args:
        network: Called ``network(x, mixing)``; ``mixing`` holds for every group E rows of O weights, as a tensor or as
            plain numbers. Its parameters are the weights.
        options: For every group of logits (the cells of one kind share one) the candidates of each edge. Edges may have
            different ones; rows of edges with fewer are padded, and the padding never gets any weight.
        relaxation: From logits to mixing weights.
        seed: Seed of the initial logits.
        edge_targets: For groups whose edges are weighted against each other, the target node of each edge. Such a group
            has a second set of logits, ``<group>_edges`` (E,); ``mixing`` then holds under this name their softmax over
            the edges of one target (edge normalisation, PC-DARTS, arXiv 1907.05737).

    Attributes:
        fixed: Rows that logits decide no longer: for a group and an edge's number its mixing weights, all zero where
            the edge is left out. They get no gradient, and candidates of weight zero are not run.

    Raises:
        UserError: An edge without candidates.
    """

    def __init__(
        self,
        network: nn.Module,
        options: Mapping[str, Sequence[Sequence[str]]],
        *,
        relaxation: Relaxation | None = None,
        seed: int = 0,
        edge_targets: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.options = {group: tuple(tuple(edge) for edge in edges) for group, edges in options.items()}
        self.relaxation = relaxation or Softmax()
        self.edge_targets = {group: tuple(targets) for group, targets in (edge_targets or {}).items()}
        self.fixed: dict[str, dict[int, tuple[float, ...]]] = {}
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.ParameterDict()
        for group, edges in self.options.items():
            if not edges or not all(edges):
                raise UserError("options", self.options, allowed="at least one candidate for every edge")
            shape = (len(edges), max(map(len, edges)))
            self.logits[group] = nn.Parameter(INITIAL_SCALE * torch.randn(shape, generator=generator))
            absent = torch.tensor([[column >= len(edge) for column in range(shape[1])] for edge in edges])
            self.register_buffer(f"absent_{group}", absent, persistent=False)
        for group, targets in self.edge_targets.items():
            if len(targets) != len(self.options.get(group, ())):
                raise UserError(
                    "edge_targets", targets, allowed=f"the target of each edge of {', '.join(self.options)}"
                )
            drawn = INITIAL_SCALE * torch.randn(len(targets), generator=generator)
            self.logits[f"{group}_edges"] = nn.Parameter(drawn)
        for module in network.modules():
            if isinstance(module, MixedOp):
                module.relaxation = self.relaxation

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the network's parameters that are trained at present (those that want a gradient), by name."""
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def mixing(self, logits: Tensors | None = None, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the mixing weights (E, O) of every group, and the weights (E,) of edges that have any.

        Args:
            logits: In place of the supernet's own.
            generator: For relaxations that sample.
        """
        return self._by_group(logits, lambda logits_EO: self.relaxation.weights(logits_EO, generator))

    def probabilities(self, logits: Tensors | None = None) -> dict[str, Tensor]:
        """Return what ``mixing`` is without sampling: for reports, selection and expected costs."""
        return self._by_group(logits, self.relaxation.probabilities)

    def _by_group(self, logits: Tensors | None, rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        given: Any = self.logits if logits is None else logits
        for group in self.options:
            absent = self.get_buffer(f"absent_{group}")
            # A sigmoid of minus infinity is 0 and so is a softmax; the gradient of the padding is 0 too.
            result[group] = self._with_fixed(group, rule(given[group].masked_fill(absent, -torch.inf)))
        for group, targets in self.edge_targets.items():
            result[f"{group}_edges"] = self._without_left_out(group, edge_normalised(given[f"{group}_edges"], targets))
        return result

    def fix_(self, group: str, edge: int, chosen: str | None) -> None:
        """Decide an edge: from now on it is one candidate with weight 1, or nothing at all with None.

        Raises:
            UserError: The edge has no such candidate.
        """
        options = self.options[group][edge]
        if chosen is not None and chosen not in options:
            raise UserError(f"{group} edge {edge}", chosen, allowed=", ".join(options))
        width = self.logits[group].shape[1]
        row = tuple(float(chosen is not None and column == options.index(chosen)) for column in range(width))
        self.fixed.setdefault(group, {})[edge] = row

    @property
    def undecided(self) -> bool:
        """Whether any logits still have an influence: an edge that is not fixed, or weights of edges."""
        open_edges = any(len(self.fixed.get(group, {})) < len(edges) for group, edges in self.options.items())
        return open_edges or bool(self.edge_targets)

    def _with_fixed(self, group: str, weights_EO: Tensor) -> Tensor:
        """Return mixing weights with the decided rows in their place."""
        if not self.fixed.get(group):
            return weights_EO
        rows = list(weights_EO.unbind())
        for edge, row in self.fixed[group].items():
            rows[edge] = weights_EO.new_tensor(row)
        return torch.stack(rows)

    def _without_left_out(self, group: str, weights_E: Tensor) -> Tensor:
        """Return edge weights, zero where an edge is left out; the others stay as they are."""
        out = [edge for edge, row in self.fixed.get(group, {}).items() if not any(row)]
        return weights_E.index_fill(0, torch.tensor(out, device=weights_E.device), 0.0) if out else weights_E

    def forward(self, x: Tensor, mixing: Tensors | None = None) -> Tensor:
        """Return the network's output.

        Args:
            x: Input.
            mixing: Mixing weights for this call, used as they are, never normalised; the relaxed logits' if None.

        Raises:
            UserError: A group is missing, or has another shape.
        """
        output: Tensor = self.network(x, self._rows(self.mixing()) if mixing is None else self._checked(mixing))
        return output

    def functional(
        self,
        x: Tensor,
        weights: Tensors,
        logits: Tensors | None = None,
        *,
        mixing: Tensors | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the output with other weights, and other logits or mixing weights; nothing is stored or copied.

        Args:
            x: Input.
            weights: By names of ``weights()``; parameters that are not named keep their values. Running statistics of
                normalisations move as in any call.
            logits: In place of the supernet's own.
            mixing: Mixing weights in place of relaxed logits.
            generator: For relaxations that sample.
        """
        mixed = self._checked(mixing) if mixing is not None else self._rows(self.mixing(logits, generator))
        output: Tensor = functional_call(self.network, dict(weights), (x, mixed))
        return output

    def one_hot(self, choice: Mapping[str, Sequence[str | None]]) -> dict[str, Tensor]:
        """Return mixing weights that take one candidate on each edge, or nothing where an edge has None.

        Raises:
            UserError: A candidate that its edge does not have.
        """
        result = {}
        for group, edges in self.options.items():
            weights = torch.zeros_like(self.logits[group].detach())
            for row, (chosen, options) in enumerate(zip(choice[group], edges, strict=True)):
                if chosen is not None and chosen not in options:
                    raise UserError(f"{group} edge {row}", chosen, allowed=", ".join(options))
                if chosen is not None:
                    weights[row, options.index(chosen)] = 1.0
            result[group] = weights
        for group in self.edge_targets:
            result[f"{group}_edges"] = torch.ones_like(self.logits[f"{group}_edges"].detach())
        return result

    def _rows(self, mixing: Tensors) -> dict[str, Any]:
        """Return mixing weights with decided rows as plain numbers: their zeros then cost nothing."""
        result: dict[str, Any] = dict(mixing)
        for group, edges in self.fixed.items():
            result[group] = [edges.get(edge, row) for edge, row in enumerate(mixing[group].unbind())]
        return result

    def _checked(self, mixing: Tensors) -> dict[str, Any]:
        """Return given mixing weights, those that want no gradient as plain numbers: zeros then cost nothing."""
        for group, logits in self.logits.items():
            if group not in mixing or mixing[group].shape != logits.shape:
                given = {name: tuple(tensor.shape) for name, tensor in mixing.items()}
                wanted = {name: tuple(tensor.shape) for name, tensor in self.logits.items()}
                raise UserError("mixing", Shown(f"shapes {given}"), allowed=f"shapes {wanted}, as of this supernet")
        return {group: weights if weights.requires_grad else weights.tolist() for group, weights in mixing.items()}


class SearchSupernet(RelaxedSupernet, ABC):
    """A relaxed supernet of a space: it knows the paths of architectures, and the architecture that logits stand for.

    With an architecture active it computes that one's path alone, else the relaxed mixture.

    Args:
        network: See ``RelaxedSupernet``.
        options: See ``RelaxedSupernet``.
        space: Its architectures.
        labels: For every group the name of each edge, for reports.
        targets: For every group the node that each edge ends in.
        per_node: Edges that a node keeps in the end; None for all.
        relaxation: From logits to mixing weights; softmax if None.
        seed: Seed of the initial logits.
        edge_weights: Whether the edges of a node have weights of their own, see ``RelaxedSupernet``.
    """

    def __init__(
        self,
        network: nn.Module,
        options: Mapping[str, Sequence[Sequence[str]]],
        *,
        space: Space,
        labels: Mapping[str, Sequence[str]],
        targets: Mapping[str, Sequence[int]],
        per_node: int | None = None,
        relaxation: Relaxation | None = None,
        seed: int = 0,
        edge_weights: bool = False,
    ) -> None:
        super().__init__(
            network, options, relaxation=relaxation, seed=seed, edge_targets=targets if edge_weights else None
        )
        self.space = space
        self.labels = {group: tuple(names) for group, names in labels.items()}
        self.targets = {group: tuple(nodes) for group, nodes in targets.items()}
        self.per_node = per_node
        self.active: dict[str, Tensor] | None = None

    @abstractmethod
    def path(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mixing weights of an architecture: one on its operations, zero everywhere else.

        Raises:
            UserError: It is not of the space.
        """

    @abstractmethod
    def extract(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return the architecture's path as a network of its own, with copies of weights and running statistics.

        Raises:
            UserError: It is not of the space.
        """

    @abstractmethod
    def derive(self, mixing: Tensors | None = None) -> Architecture:
        """Return the architecture by magnitude.

        Args:
            mixing: Strength of every operation by group; the relaxed logits if None. Where edges have weights, an
                operation is as strong as its mixing weight times that of its edge.
        """

    @abstractmethod
    def places(self) -> dict[str, tuple[str, int]]:
        """Return for every edge module, by its name in ``network``, the group and the number of its mixing weights."""

    @abstractmethod
    def weightless(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return for every group how many operations of an architecture have no weights."""

    def activate(self, architecture: Mapping[str, Any] | None) -> None:
        """Make an architecture's path the one that the next calls take, or, with None, the relaxed mixture again.

        Raises:
            UserError: It is not of the space.
        """
        self.active = None if architecture is None else self.path(architecture)

    def forward(self, x: Tensor, mixing: Tensors | None = None) -> Tensor:
        """Return the network's output; see ``RelaxedSupernet.forward``."""
        return super().forward(x, self.active if mixing is None else mixing)

    def edges(self) -> dict[str, list[dict[str, Any]]]:
        """Return name and candidates of every edge by group, as plain JSON values, for reports."""
        return {
            group: [
                {"name": label, "options": list(options)}
                for label, options in zip(self.labels[group], self.options[group], strict=True)
            ]
            for group in self.options
        }

    def drawing(self, architecture: Mapping[str, Any]) -> dict[str, list[list[str]]]:
        """Return label and operation of every edge that an architecture takes, by group, for reports."""
        path = self.path(architecture)
        return {
            group: [
                [label, options[int(row.argmax())]]
                for label, options, row in zip(self.labels[group], self.options[group], path[group], strict=True)
                if bool(row.any())
            ]
            for group in self.options
        }

    def strengths(self, mixing: Tensors | None = None) -> dict[str, Tensor]:
        """Return how strong every operation of every edge is, (E, O) by group, see ``derive``."""
        with torch.no_grad():
            given = self.probabilities() if mixing is None else mixing
            return {
                group: given[group] * given[f"{group}_edges"].unsqueeze(-1)
                if f"{group}_edges" in given
                else given[group]
                for group in self.options
            }


def edge_normalised(logits_E: Tensor, targets: Sequence[int]) -> Tensor:
    """Return the softmax of edge logits over the edges of each target node."""
    result = torch.zeros_like(logits_E)
    for target in sorted(set(targets)):
        members = [edge for edge, node in enumerate(targets) if node == target]
        result = result.index_copy(0, torch.tensor(members, device=logits_E.device), logits_E[members].softmax(dim=0))
    return result


def entropy(mixing_EO: Tensor) -> Tensor:
    """Return the mean entropy of the rows in nats; ``log(O)`` is undecided, 0 decided."""
    return torch.special.entr(mixing_EO).sum(dim=-1).mean()


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block every batch normalisation uses the statistics of its batch and leaves the running ones alone.

    A search has no meaningful running statistics: they mix all architectures that the logits have stood for.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracked) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracked

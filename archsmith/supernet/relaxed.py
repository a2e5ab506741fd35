"""A supernet as a function of weights and architecture logits.

The network inside knows no logits: it is called ``network(x, mixing)`` with the mixing weights of every group of edges.
So the whole is ``network(x, relaxation(logits))``, a pure function of two sets of tensors that anyone may replace for
one call: unrolled steps, teachers of earlier steps, perturbed copies. Logits are never counted as weights.
"""

# E edges, O candidates

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import Shown, UserError
from archsmith.supernet.mixed import MixedOp, Relaxation, Softmax

Tensors = Mapping[str, Tensor]

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
    ) -> None:
        super().__init__()
        self.network = network
        self.options = {group: tuple(tuple(edge) for edge in edges) for group, edges in options.items()}
        self.relaxation = relaxation or Softmax()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.ParameterDict()
        for group, edges in self.options.items():
            if not edges or not all(edges):
                raise UserError("options", self.options, allowed="at least one candidate for every edge")
            shape = (len(edges), max(map(len, edges)))
            self.logits[group] = nn.Parameter(INITIAL_SCALE * torch.randn(shape, generator=generator))
            absent = torch.tensor([[column >= len(edge) for column in range(shape[1])] for edge in edges])
            self.register_buffer(f"absent_{group}", absent, persistent=False)
        for module in network.modules():
            if isinstance(module, MixedOp):
                module.relaxation = self.relaxation

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the network's parameters that are trained at present (those that want a gradient), by name."""
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def mixing(self, logits: Tensors | None = None, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the mixing weights (E, O) of every group.

        Args:
            logits: In place of the supernet's own.
            generator: For relaxations that sample.
        """
        result: dict[str, Tensor] = {}
        given: Any = self.logits if logits is None else logits
        for group in self.options:
            absent = self.get_buffer(f"absent_{group}")
            # A sigmoid of minus infinity is 0 and so is a softmax; the gradient of the padding is 0 too.
            result[group] = self.relaxation.weights(given[group].masked_fill(absent, -torch.inf), generator)
        return result

    def forward(self, x: Tensor, mixing: Tensors | None = None) -> Tensor:
        """Return the network's output.

        Args:
            x: Input.
            mixing: Mixing weights for this call, used as they are, never normalised; the relaxed logits' if None.

        Raises:
            UserError: A group is missing, or has another shape.
        """
        output: Tensor = self.network(x, self.mixing() if mixing is None else self._checked(mixing))
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
        mixed = self._checked(mixing) if mixing is not None else self.mixing(logits, generator)
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
        return result

    def _checked(self, mixing: Tensors) -> dict[str, Any]:
        """Return given mixing weights, those that want no gradient as plain numbers: zeros then cost nothing."""
        for group, logits in self.logits.items():
            if group not in mixing or mixing[group].shape != logits.shape:
                given = {name: tuple(tensor.shape) for name, tensor in mixing.items()}
                wanted = {name: tuple(tensor.shape) for name, tensor in self.logits.items()}
                raise UserError("mixing", Shown(f"shapes {given}"), allowed=f"shapes {wanted}, as of this supernet")
        return {group: weights if weights.requires_grad else weights.tolist() for group, weights in mixing.items()}


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

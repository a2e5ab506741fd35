"""Binary gates: one sampled candidate runs, and the logits learn from the gradient of its gate and of the others'.

A gate is 1 for the sampled candidate and 0 for all others, so a forward pass costs what one path costs. The gradient of
the loss with respect to a gate, ``dL/dg_j = <dL/dy, o_j(x)>``, exists for closed gates too, and stands in for that of
the probability: ``dL/dalpha_i = sum_j dL/dg_j q_j (delta_ij - q_i)``, ``q`` the softmax over the candidates that are
involved.

Source: Cai, Zhu, Han, "ProxylessNAS", arXiv 1812.00332, section 3.2; the modes are those of the released code.
"""

# E edges, O candidates

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import UserError
from archsmith.supernet.mixed import Relaxation, Weights

Mode = Literal["full", "full_v2", "two"]
"""Which gates are asked for their gradient, and how; see ``BinaryGates``."""


class BinaryGates(Relaxation):
    """One candidate of each edge is open, sampled by the softmax of the logits; the input's gradient is its alone.

    Args:
        mode: "full": all candidates run, the closed ones without a graph; their outputs are kept for the backward pass.
            "full_v2": the same numbers at the memory of one path: only the open one runs, and the backward pass runs
            the candidates again, one after the other, without a graph. "two": a pair of distinct candidates is sampled,
            then which of the two is open; the others are left out, and the pair has probabilities of its own. Behind
            the optimiser's step ``settle_`` keeps the pair's part of the whole probability as it was.

    The gates of an edge are 1 and 0. A candidate that is left out has the gate *minus* zero: it is closed all the same,
    and ``involved`` and ``mix`` can tell.
    """

    def __init__(self, mode: Mode = "full_v2") -> None:
        if mode not in get_args(Mode):
            raise UserError("mode", mode, allowed=", ".join(get_args(Mode)))
        self.mode: Mode = mode

    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the gates of one sample; their gradient reaches the logits by the rule above."""
        on_cpu = logits_EO.detach().double().cpu()  # sampled where a generator seeded by step lives
        first_E = _sampled(on_cpu.softmax(dim=-1), generator)
        if self.mode != "two":
            involved_EO = torch.ones_like(logits_EO, dtype=torch.bool)
            return _gates(logits_EO, first_E, involved_EO)
        rest_EO = on_cpu.scatter(-1, first_E.unsqueeze(-1), -torch.inf)
        alone_E = rest_EO.isinf().all(dim=-1)  # an edge with a single candidate is its own pair
        probabilities_EO = rest_EO.masked_fill(alone_E.unsqueeze(-1), 0.0).softmax(dim=-1)
        second_E = torch.where(alone_E, first_E, _sampled(probabilities_EO, generator))
        pair_E2 = torch.stack([first_E, second_E], dim=-1)
        place_E = _sampled(on_cpu.gather(-1, pair_E2).softmax(dim=-1), generator)
        open_E = pair_E2.gather(-1, place_E.unsqueeze(-1)).flatten()
        involved_EO = torch.zeros_like(on_cpu, dtype=torch.bool).scatter(-1, pair_E2, True)
        return _gates(logits_EO, open_E, involved_EO)

    def probabilities(self, logits_EO: Tensor) -> Tensor:
        """Return the probability of every candidate to be the open one."""
        return logits_EO.softmax(dim=-1)

    def mix(self, x: Tensor, candidates: nn.ModuleDict, weights_O: Weights) -> Tensor:
        """Return the open candidate's output; weights that are no gates are a plain mixture.

        Args:
            x: Input of every candidate.
            candidates: Modules by option.
            weights_O: Gates of this edge. Those that want no gradient run the open candidate and touch no other.
        """
        if not isinstance(weights_O, Tensor):
            return super().mix(x, candidates, weights_O)
        values, modules = weights_O.detach().tolist(), list(candidates.values())
        if sorted(values) != [0.0] * (len(values) - 1) + [1.0]:
            return super().mix(x, candidates, weights_O)
        opened = values.index(1.0)
        y: Tensor = modules[opened](x)
        if not (weights_O.requires_grad and torch.is_grad_enabled()):
            return y
        asked = [index for index, inside in enumerate(involved(weights_O).tolist()) if inside]
        if self.mode == "full_v2":
            parameters = [{name: p.detach() for name, p in modules[index].named_parameters()} for index in asked]
            again = _Again(modules, asked, parameters, opened)
            recomputed: Tensor = _Recomputed.apply(y, weights_O, x.detach(), again)  # type: ignore[no-untyped-call]
            return recomputed
        with torch.no_grad():
            outputs = [y.detach() if index == opened else modules[index](x) for index in asked]
        kept: Tensor = _Kept.apply(y, weights_O, asked, *outputs)  # type: ignore[no-untyped-call]
        return kept

    def settle_(self, logits_EO: Tensor, before_EO: Tensor, gates_EO: Tensor) -> None:
        """Give the involved candidates the probability that they had together before the optimiser's step.

        Args:
            logits_EO: After the step; changed in place.
            before_EO: Before the step.
            gates_EO: The sample that the step was made for.
        """
        if self.mode == "two":
            with torch.no_grad():
                logits_EO.copy_(rescaled(logits_EO, before_EO, involved(gates_EO)))


def involved(gates_EO: Tensor) -> Tensor:
    """Return which candidates a sample of gates involves: all but those whose gate is minus zero."""
    return ~torch.signbit(gates_EO.detach())


def involved_probabilities(logits_EO: Tensor, gates_EO: Tensor) -> Tensor:
    """Return the softmax over the involved candidates, zero elsewhere: what the gate gradient is taken with."""
    return logits_EO.masked_fill(~involved(gates_EO), -torch.inf).softmax(dim=-1)


def gate_gradient(logits_EO: Tensor, gate_gradient_EO: Tensor, involved_EO: Tensor | None = None) -> Tensor:
    """Return ``dL/dalpha_i = sum_j dL/dg_j q_j (delta_ij - q_i)``; zero for candidates that are not involved.

    Args:
        logits_EO: The logits alpha.
        gate_gradient_EO: The gradient of every gate; entries that are not involved are not read.
        involved_EO: Which candidates ``q`` is the softmax of; all if None.
    """
    if involved_EO is None:
        involved_EO = torch.ones_like(logits_EO, dtype=torch.bool)
    q_EO = logits_EO.masked_fill(~involved_EO, -torch.inf).softmax(dim=-1)
    weighted_EO = q_EO * gate_gradient_EO.masked_fill(~involved_EO, 0.0)
    return weighted_EO - q_EO * weighted_EO.sum(dim=-1, keepdim=True)


def rescaled(logits_EO: Tensor, before_EO: Tensor, involved_EO: Tensor) -> Tensor:
    """Return logits whose involved entries are shifted so that the sum of their exponentials is as it was before."""
    now, then = (
        logits.masked_fill(~involved_EO, -torch.inf).logsumexp(dim=-1, keepdim=True)
        for logits in (logits_EO, before_EO)
    )
    return torch.where(involved_EO, logits_EO - (now - then), logits_EO)


def _sampled(probabilities_EO: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(probabilities_EO, 1, generator=generator).flatten()


def _gates(logits_EO: Tensor, open_E: Tensor, involved_EO: Tensor) -> Tensor:
    device = logits_EO.device
    gates: Tensor = _Gates.apply(logits_EO, open_E.to(device), involved_EO.to(device))  # type: ignore[no-untyped-call]
    return gates


class _Gates(torch.autograd.Function):
    """From logits to the gates of a given sample."""

    @staticmethod
    def forward(ctx: Any, logits_EO: Tensor, open_E: Tensor, involved_EO: Tensor) -> Tensor:
        ctx.save_for_backward(logits_EO, involved_EO)
        gates_EO = torch.zeros_like(logits_EO).masked_fill(~involved_EO, -0.0)
        return gates_EO.scatter(-1, open_E.unsqueeze(-1), 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_EO, involved_EO = ctx.saved_tensors
        return gate_gradient(logits_EO, gradients[0], involved_EO), None, None


class _Kept(torch.autograd.Function):
    """The open candidate's output; the gates' gradients come from outputs that were kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gates_O: Tensor, asked: list[int], *outputs: Tensor) -> Tensor:
        ctx.asked, ctx.count = asked, len(gates_O)
        ctx.save_for_backward(*outputs)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_gates = gradient.new_zeros(ctx.count)
        for index, output in zip(ctx.asked, ctx.saved_tensors, strict=True):
            of_gates[index] = (gradient * output).sum()
        return gradient, of_gates, None, *(None for _ in ctx.asked)


class _Again:
    """Runs the candidates of an edge once more, with the weights that they had, without a graph."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        asked: Sequence[int],
        parameters: Sequence[dict[str, Tensor]],
        opened: int,
    ) -> None:
        self.modules, self.asked, self.parameters, self.opened = modules, asked, parameters, opened

    def __call__(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield every candidate's number and output; the open one's running statistics do not move a second time."""
        for index, parameters in zip(self.asked, self.parameters, strict=True):
            module = self.modules[index]
            with torch.no_grad(), _untracked(module, index == self.opened):
                output: Tensor = functional_call(module, parameters, (x,))
            yield index, output


class _Recomputed(torch.autograd.Function):
    """The open candidate's output; the gates' gradients come from running the candidates again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gates_O: Tensor, x: Tensor, again: _Again) -> Tensor:
        ctx.again, ctx.count = again, len(gates_O)
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        of_gates = gradient.new_zeros(ctx.count)
        for index, output in ctx.again(x):
            of_gates[index] = (gradient * output).sum()
        return gradient, of_gates, None, None


@contextmanager
def _untracked(module: nn.Module, yes: bool) -> Iterator[None]:
    """Within the block, normalisations that use their batch leave their running statistics alone."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training and yes]
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked

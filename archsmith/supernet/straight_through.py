"""Straight-through samples: one candidate runs forwards, and every candidate's logit still learns.

With logits ``a``, ``p = softmax(a)`` and a candidate ``j`` drawn from ``p``, a node computes

    y = (1 - sg(p_j) + p_j) o_j(x) + sum_{k != j} (p_k - sg(p_k)) sg(o_k(x))

with ``sg`` the stop-gradient. Its value is ``o_j(x)``. With ``g = dL/dy`` and ``s_k = <g, o_k(x)>`` its gradient is

    dL/da_k = p_k (s_k - sum_i p_i s_i),

and only the sampled candidate has a graph: weights and input get the gradient of its path alone. Here this is one
autograd function that hands the sampled output through and keeps the outputs, so that the value is ``o_j(x)`` bit for
bit, and memory for the backward pass is that of one path and the K outputs.

For a loss that is linear in y this is the exact gradient of the expected loss, without variance; for a quadratic one
its mean over samples is the gradient of the *mixture's* loss (that of DARTS), not that of the expected loss.

Source: Zheng, An, Ou 2021 (ST-NAS), arXiv 2011.05649; the expected loss is that of SNAS, arXiv 1812.09926.
"""

# O candidates

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from archsmith.supernet.mixed import Relaxation, Weights, straight_through


class StraightThrough(Relaxation):
    """A sample of one candidate for each edge, drawn from the softmax; the others' outputs teach the logits only."""

    def weights(self, logits_EO: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a one-hot sample for each row; its gradient is that of the softmax."""
        soft = logits_EO.softmax(dim=-1)
        # Sampled on the CPU, where a generator seeded by step lives.
        drawn = torch.multinomial(soft.detach().cpu().float(), 1, generator=generator).flatten()
        return straight_through(drawn.to(soft.device), soft)

    def probabilities(self, logits_EO: Tensor) -> Tensor:
        """Return the softmax of every row, which the samples follow."""
        return logits_EO.softmax(dim=-1)

    def mix(self, x: Tensor, candidates: nn.ModuleDict, weights_O: Weights) -> Tensor:
        """Return the sampled candidate's output.

        Args:
            x: Input.
            candidates: Module by option.
            weights_O: A one-hot row. Where it wants a gradient every candidate runs, those that were not drawn without
                a graph, and entry k gets ``<dL/dy, candidate_k(x)>``; else the drawn candidate alone runs. Any other
                row is an ordinary mixture.
        """
        if not isinstance(weights_O, Tensor):
            return super().mix(x, candidates, weights_O)
        values = weights_O.tolist()
        if sorted(values) != [0.0] * (len(values) - 1) + [1.0]:
            return super().mix(x, candidates, weights_O)
        drawn, modules = values.index(1.0), list(candidates.values())
        output: Tensor = modules[drawn](x)
        if not (torch.is_grad_enabled() and weights_O.requires_grad):
            return output
        outputs = []
        with torch.no_grad():
            for column, candidate in enumerate(modules):
                outputs.append(output if column == drawn else candidate(x))
        return _as_drawn(weights_O, drawn, outputs)


def _as_drawn(weights_O: Tensor, drawn: int, outputs: list[Tensor]) -> Tensor:
    shapes = {tuple(output.shape) for output in outputs}
    if len(shapes) > 1:
        raise RuntimeError("candidates give different shapes")  # the mixed operation says which
    result: Tensor = _Drawn.apply(weights_O, drawn, *outputs)  # type: ignore[no-untyped-call]
    return result


class _Drawn(torch.autograd.Function):
    """Forwards one output unchanged; backwards gives it the gradient, and each weight its product with an output."""

    @staticmethod
    def forward(ctx: Any, weights_O: Tensor, drawn: int, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs)
        ctx.drawn, ctx.dtype = drawn, weights_O.dtype
        return outputs[drawn].view_as(outputs[drawn])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        outputs = ctx.saved_tensors
        # In the weights' precision: logits stay in float32 when a network computes in half of it.
        products = [(gradient.to(ctx.dtype) * output.to(ctx.dtype)).sum() for output in outputs]
        passed = [gradient if column == ctx.drawn else None for column in range(len(outputs))]
        return torch.stack(products), None, *passed

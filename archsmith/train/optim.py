"""Optimisers that torch does not have: RMSprop with epsilon inside the root, and Adam whose rows rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class RMSprop(torch.optim.Optimizer):
    """RMSprop with momentum and epsilon *inside* the square root.

    ``v = alpha v + (1 - alpha) g^2;  b = momentum b + g / sqrt(v + eps);  w -= lr b``, ``v`` starting at zero.

    Large epsilon inside the root keeps small gradients small, so a cost-weighted penalty stays cost-weighted
    (``torch.optim.RMSprop`` adds epsilon outside).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        alpha: Decay of the squared gradient.
        momentum: Decay of the momentum buffer.
        eps: Added under the root; must be positive.
        weight_decay: L2 penalty added to the gradient.

    Raises:
        ValueError: A negative argument, or ``eps`` not positive.

    Source: AtomNAS (arXiv 1912.09640), defaults alpha 0.9, momentum 0.9, eps 1e-3.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        alpha: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("alpha", alpha), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}: got {value!r}; allowed: a number >= 0.")
        if not eps > 0:
            raise ValueError(f"eps: got {eps!r}; allowed: a number > 0 (it stands inside the root).")
        super().__init__(
            params, {"lr": lr, "alpha": alpha, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step on all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "square_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                        "momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format),
                    }
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            if group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            square = [self.state[p]["square_avg"] for p in params]
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(square, group["alpha"])
            torch._foreach_addcmul_(square, grads, grads, value=1 - group["alpha"])
            root = torch._foreach_add(square, group["eps"])
            torch._foreach_sqrt_(root)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_addcdiv_(buffers, grads, root)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay on convolution and linear weights and linear biases, none on the rest.

    Normalisation scales and shifts, and convolution biases, are never decayed: the scales are gates here.
    """
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and name == "weight"
            (decayed if conv or isinstance(module, nn.Linear) else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class RowAdam(torch.optim.Optimizer):
    """Adam in which every row of a tensor has moments and a step count of its own, and rests while it has no gradient.

    A row is what the first axis counts. Where its gradient is zero throughout, nothing of it changes: no step from
    momentum, no decay of the moments, no count for the bias correction; as if the row were a parameter of its own whose
    gradient is None. Sampled searches need that: what a step did not ask, it must not move.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of both moments, in [0, 1).
        eps: Added to the root; positive.

    Raises:
        ValueError: A value out of its range.

    Source: Kingma and Ba, arXiv 1412.6980.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: got {lr!r}; allowed: a number >= 0.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas!r}; allowed: two numbers in [0, 1).")
        if not eps > 0:
            raise ValueError(f"eps: got {eps!r}; allowed: a number > 0.")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step on all rows whose gradient is not zero throughout."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_rows(parameter, parameter.grad, group)
        return loss

    def _step_rows(self, parameter: Tensor, given: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["steps"] = torch.zeros(len(parameter), dtype=torch.float64, device=parameter.device)
        rows: Tensor = given.reshape(len(given), -1).any(dim=1)
        if not bool(rows.any()):
            return
        state["steps"][rows] += 1
        gradient = given[rows]
        mean = state["exp_avg"][rows].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"][rows].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        steps = state["steps"][rows].reshape(-1, *(1 for _ in parameter.shape[1:]))
        corrected = (square.double() / (1 - second**steps)).sqrt() + group["eps"]
        parameter[rows] -= (group["lr"] * mean.double() / (1 - first**steps) / corrected).to(parameter.dtype)

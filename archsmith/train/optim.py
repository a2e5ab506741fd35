"""RMSprop with epsilon inside the root, as the mobile networks of the TensorFlow world were trained."""

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

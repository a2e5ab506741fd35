"""AdaHessian: Adam whose scale is the diagonal of the Hessian, estimated by one random product with it.

Source: Yao et al. 2021, "AdaHessian", arXiv 2006.00719; the plain form, as BOSHNAS uses it on inputs, arXiv 2205.11656.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from archsmith.core.errors import Shown, UserError


class AdaHessian(torch.optim.Optimizer):
    """``x -= lr m / (sqrt(v) + eps)``, m the mean gradient and v the mean square of ``|H z|``, z of random signs.

    For a diagonal Hessian ``|H z|`` is the diagonal itself, whatever z: a step is then Newton's, but for the momentum.
    The gradients have to be made with ``loss.backward(create_graph=True)``.

    Args:
        params: Tensors, or groups of them.
        lr: Learning rate.
        betas: Decay of both means.
        eps: Added to the root of the second.
        generator: Source of the signs; torch's own if None.

    Raises:
        UserError: A setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError("AdaHessian", (lr, betas, eps), allowed="lr and eps from 0, betas from 0 to below 1")
        self.generator = generator
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step from the gradients that are there; returns what ``closure``, called first, returns.

        Raises:
            UserError: A gradient was made without ``create_graph=True``.
        """
        loss = None if closure is None else closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        curved = [p for p in moved if p.grad is not None and p.grad.requires_grad]
        if moved and not curved:
            raise UserError("gradients", Shown("plain numbers"), allowed="those of loss.backward(create_graph=True)")
        gradients = [p.grad for p in curved if p.grad is not None]
        signs = [self._signs(gradient) for gradient in gradients]
        products = torch.autograd.grad(gradients, curved, signs, allow_unused=True, materialize_grads=True)
        curvature = {id(p): product.abs() for p, product in zip(curved, products, strict=True)}
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._move(p, p.grad.detach(), curvature.get(id(p), torch.zeros_like(p)), group)
        return loss

    def _signs(self, like: Tensor) -> Tensor:
        drawn = torch.randint(0, 2, like.shape, generator=self.generator, device=like.device)
        return (2 * drawn - 1).to(like.dtype)

    def _move(self, p: Tensor, gradient: Tensor, curvature: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        one, two = group["betas"]
        state["step"] += 1
        state["mean"].mul_(one).add_(gradient, alpha=1 - one)
        state["square"].mul_(two).addcmul_(curvature, curvature, value=1 - two)
        mean = state["mean"] / (1 - one ** state["step"])
        scale = (state["square"] / (1 - two ** state["step"])).sqrt() + group["eps"]
        p.addcdiv_(mean, scale, value=-group["lr"])

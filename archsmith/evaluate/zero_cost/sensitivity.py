"""How the output moves with the input: Jacobians of a batch, and the Zen score."""

# B batch, D input elements

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.evaluate.zero_cost.base import Batch, FixedNetwork, fixed, watching, zero_cost_score

JACOV_SHIFT = 1e-5
"""Added to the eigenvalues of the correlation matrix, as published."""

ZEN_STEP = 1e-2
"""Size of the perturbation, alpha in the paper."""

ZEN_REPEATS = 32
"""Initialisations the Zen score is averaged over."""


@zero_cost_score(needs="images", arxiv="2006.04647")
def jacov(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``-sum_i (log(v_i + k) + 1 / (v_i + k))``, v the eigenvalues of the Jacobians' correlations; k = 1e-5.

    Row i of the Jacobian is the gradient of the summed logits by image i, under batch statistics. The score is highest
    when the rows are uncorrelated; minus infinity when a row is constant (an output that ignores its input).

    Source: Mellor et al. 2020, arXiv 2006.04647, version 1.
    """
    images = batch.images.detach().clone().requires_grad_()
    with fixed(network, norm="batch") as view:
        (jacobian,) = torch.autograd.grad(view(images).sum(), images)
    rows_BD = jacobian.flatten(1).double()
    rows_BD = rows_BD - rows_BD.mean(1, keepdim=True)
    lengths = rows_BD.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        return -math.inf
    rows_BD = rows_BD / lengths
    shifted = torch.linalg.eigvalsh(rows_BD @ rows_BD.T).clamp_min(0) + JACOV_SHIFT
    return -float((shifted.log() + 1 / shifted).sum())


@zero_cost_score(needs="shape", arxiv="2102.01063")
def zen(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return the Zen score: ``log E ||f(x) - f(x + alpha e)|| + sum_i log s_i``, averaged over Gaussian weights.

    x and e are standard normal in the shape of ``batch.images``, alpha is 0.01, f is the network up to its last global
    average pooling (``nn.AdaptiveAvgPool2d``; all of it when there is none), with weights of convolutions and linear
    layers drawn N(0, 1), biases 0, and batch normalisations without scale and shift. s_i^2 is the mean over the
    channels of normalisation i of their variance in the batch: it restores the scale that normalising took away.
    The expectation is the mean over the batch of the Frobenius norm; ``ZEN_REPEATS`` draws. Residual connections are
    kept (the paper's own networks are scored without them).

    Minus infinity when the feature map ignores the input.

    Source: Lin et al. 2021 (Zen-NAS), arXiv 2102.01063.
    """
    return zen_score(network, batch.images, generator, repeats=ZEN_REPEATS)


def zen_score(network: nn.Module, images: Tensor, generator: torch.Generator, *, repeats: int) -> float:
    """Return ``zen`` with another number of draws; of ``images`` only shape, type and device count."""
    with fixed(network, norm="batch") as view, torch.no_grad():
        return sum(_zen_draw(view, images, generator) for _ in range(repeats)) / repeats


def _zen_draw(view: FixedNetwork, images: Tensor, generator: torch.Generator) -> float:
    def normal(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        return drawn.to(like.device, like.dtype)

    weights = view.weights()
    parameters = {
        name: normal(p) if name in weights else torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p)
        for name, p in view.parameters.items()
    }
    variances: list[float] = []

    def see(x: Tensor, _: Tensor) -> None:
        dims = [0, *range(2, x.dim())]
        variances.append(float(x.var(dims, unbiased=False).mean()))

    x, e = normal(images), normal(images)
    with watching(view.module, _BatchNorm, see):
        first = _features(view, x, parameters)
    second = _features(view, x + ZEN_STEP * e, parameters)
    distance = float((first - second).flatten(1).norm(dim=1).mean())
    return _log(distance) + sum(_log(variance) / 2 for variance in variances)


def _features(view: FixedNetwork, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Return the input of the network's last global average pooling, or its output."""
    pools = [module for module in view.module.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    seen: list[Tensor] = []
    if pools:
        hook = pools[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            view(images, parameters)
        finally:
            hook.remove()
    return seen[-1] if seen else view(images, parameters)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf

"""Pruning saliencies summed over a network: how much the weights matter at initialisation.

The idea of summing them into a score for a whole network, and the sums over the weights of convolutions and linear
layers (no biases, no normalisations), are of Abdelfattah et al. 2021, arXiv 2101.08134.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsmith.evaluate.zero_cost.base import Batch, FixedNetwork, fixed, watching, zero_cost_score


@zero_cost_score(needs="shape", arxiv="2006.05467")
def synflow(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return the synaptic flow ``sum |theta * dR/dtheta|``, R the summed output for an image of ones under ``|theta|``.

    Normalisations are bypassed, and everything is computed in float64: values of 1e60 are usual. In a network without
    biases, whose weights then only multiply, every layer contributes R.

    Source: Tanaka et al. 2020, arXiv 2006.05467.
    """
    weights, gradients = _synaptic_gradients(network, batch)
    return sum(float((w * g).abs().sum()) for w, g in zip(weights, gradients, strict=True))


@zero_cost_score(needs="shape", arxiv="2207.05135")
def logsynflow(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``sum |theta| log(1 + dR/dtheta)``: synaptic flow with gradients that cannot explode with depth.

    Source: Cavagnero et al. 2022 (FreeREA), arXiv 2207.05135.
    """
    weights, gradients = _synaptic_gradients(network, batch)
    return sum(float((w * torch.log1p(g)).sum()) for w, g in zip(weights, gradients, strict=True))


@zero_cost_score(needs="labels", arxiv="1810.02340")
def snip(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``sum |theta * dL/dtheta|``, L the mean cross-entropy of the batch, normalised by batch statistics.

    Source: Lee et al. 2019 (SNIP), arXiv 1810.02340, without its normalisation to one.
    """
    with fixed(network, norm="batch") as view:
        weights = list(view.weights().values())
        gradients = torch.autograd.grad(_loss(view, batch), weights)
    return sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, gradients, strict=True))


@zero_cost_score(needs="labels", arxiv="2002.07376", higher_is_better=False)
def grasp(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``sum -theta * (H g)``, g and H the gradient and Hessian of the mean cross-entropy; batch statistics.

    The published pruning score, at temperature 1: what removing the weights would change of ``|g|^2 / 2``, to first
    order. It is negative where that reduces the flow of gradients, so the lower it is the more the weights matter.

    Source: Wang et al. 2020 (GraSP), arXiv 2002.07376.
    """
    with fixed(network, norm="batch") as view:
        weights = list(view.weights().values())
        gradients = torch.autograd.grad(_loss(view, batch), weights, create_graph=True)
        flow = sum((g * g.detach()).sum() for g in gradients)  # its gradient is H g
        assert isinstance(flow, Tensor)
        products = torch.autograd.grad(flow, weights, allow_unused=True)
    return -sum(float((w.detach() * p).sum()) for w, p in zip(weights, products, strict=True) if p is not None)


@zero_cost_score(needs="labels", arxiv="1906.04113")
def fisher(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``sum_c 1/(2B) sum_n (sum_hw a_nc * g_nc)^2`` over all channels of convolutions and linear layers.

    ``a`` is a channel's output for example n, ``g`` the gradient of that example's cross-entropy by it (of the batch's
    summed loss, where batch statistics couple examples): the empirical Fisher information of a mask on the channel.

    Source: Theis et al. 2018, arXiv 1801.05787, and Turner et al. 2020 (BlockSwap), arXiv 1906.04113.
    """
    outputs: list[Tensor] = []
    with (
        fixed(network, norm="batch") as view,
        watching(network, (nn.modules.conv._ConvNd, nn.Linear), lambda _, output: outputs.append(output)),
    ):
        loss = _loss(view, batch) * len(batch.images)
        gradients = torch.autograd.grad(loss, outputs)
    total = 0.0
    for a, g in zip(outputs, gradients, strict=True):
        per_channel = (a.detach() * g).flatten(2).sum(2) if a.dim() > 2 else a.detach() * g
        total += float(per_channel.square().mean(0).sum()) / 2
    return total


@zero_cost_score(needs="labels", arxiv="2101.08134")
def grad_norm(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return the sum over layers of the Euclidean norm of the weight's gradient; mean cross-entropy, batch statistics.

    Source: Abdelfattah et al. 2021, arXiv 2101.08134.
    """
    with fixed(network, norm="batch") as view:
        gradients = torch.autograd.grad(_loss(view, batch), list(view.weights().values()))
    return sum(float(g.norm()) for g in gradients)


def _loss(view: FixedNetwork, batch: Batch) -> Tensor:
    return F.cross_entropy(view(batch.images), batch.labels)


def _synaptic_gradients(network: nn.Module, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the absolute weights and the gradients of R by them, float64."""
    with fixed(network, norm="bypassed", dtype=torch.float64) as view:
        absolute = {name: p.detach().abs().requires_grad_() for name, p in view.parameters.items()}
        weights = [absolute[name] for name in view.weights()]
        flow = view(torch.ones_like(batch.images[:1]), absolute).sum()
        gradients = torch.autograd.grad(flow, weights)
    return [w.detach() for w in weights], list(gradients)

"""Scores of untrained recurrent networks for text: how rich their hidden states are, how their inputs move them.

``batch.images`` are token numbers, (B, T) or (B, 1, 1, T); labels are not looked at. Networks are in evaluation mode
and begin from a state of zeros. Correlations have different variables: hidden *units* for the hidden covariance, whose
observations are the B T states of a layer, but *samples* for the Jacobian scores.

Where more variables than observations meet (H > B T), or units never move, a spectral score says more about the batch
than about the network: see ``hidden_spectrum``, whose result reports both.

Source: Serianni and Kalita 2023, arXiv 2306.00288.
"""

# B batch, T steps, E features of the embedding, H hidden units

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.zero_cost.base import TEXT_SCORES, Batch, fixed, zero_cost_score
from archsmith.evaluate.zero_cost.correlation import (
    Constant,
    Spectrum,
    agreement,
    cosine,
    log_determinant,
    spectral,
    spectrum,
)
from archsmith.layers.recurrent_cells import RecurrentCell, RecurrentLayer

PAPER = "2306.00288"

NOISES = (0.1, 10.0, 100.0)
"""Multiples of the embeddings' variance that the noised Jacobian scores add."""

States = Literal["fed", "made"]

_ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ReLU)


def tokens_of(batch: Batch) -> Tensor:
    """Return the token numbers of a batch, (B, T) int64."""
    return batch.images.flatten(1).long()


def hidden_states(network: nn.Module, tokens: Tensor, *, states: States = "fed") -> list[Tensor]:
    """Return the hidden states of each recurrent layer, (T, B, H), in the order of the layers.

    Args:
        network: Has ``RecurrentLayer`` modules, or ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` of one layer and direction; of
            several states the first is meant (h of an LSTM, not c).
        tokens: What the network is called with; token numbers (B, T) for language models.
        states: ``fed`` are the states that enter steps 1 to T, so that zeros come first and the last is missing, as in
            the published scores; ``made`` are those that leave them.

    Raises:
        UserError: No such layer.
    """
    layers = [module for module in network.modules() if _is_layer(module)]
    if not layers:
        raise _nothing(network, "recurrent layers: RecurrentLayer, or nn.RNN, nn.GRU, nn.LSTM of one layer")
    found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        made = output[0].transpose(0, 1) if getattr(layer, "batch_first", False) else output[0]
        if states == "made":
            found[layer].append(made)
            return
        given = inputs[1] if len(inputs) > 1 else None
        first = torch.zeros_like(made[:1]) if given is None else _first_state(layer, given).reshape(made[:1].shape)
        found[layer].append(torch.cat([first, made[:-1]]))

    with fixed(network, norm="running") as view, ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(layer.register_forward_hook(hook).remove)
        view(tokens)
    return [torch.cat(parts) for parts in found.values() if parts]


def hidden_spectrum(
    network: nn.Module, tokens: Tensor, *, layer: int = 1, states: States = "fed", constant: Constant = "nan"
) -> Spectrum:
    """Return the hidden covariance of a layer, with what to distrust in it.

    Args:
        network: See ``hidden_states``.
        tokens: See there.
        layer: From 1.
        states: See there.
        constant: What becomes of units that never move, see ``spectrum``.

    Raises:
        UserError: No recurrent layer, or no such one.
    """
    found = hidden_states(network, tokens, states=states)
    if not 1 <= layer <= len(found):
        raise UserError("layer", layer, allowed=f"1 to {len(found)}, the recurrent layers of the network")
    return spectrum(found[layer - 1].flatten(0, 1).T, constant=constant)


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def hidden_covariance(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``spectral`` of the first layer's hidden units over all samples and steps; NaN when one never moves."""
    return hidden_spectrum(network, tokens_of(batch), layer=1).score


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def hidden_covariance_layer_2(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``hidden_covariance`` of the second layer."""
    return hidden_spectrum(network, tokens_of(batch), layer=2).score


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def hidden_covariance_layer_3(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``hidden_covariance`` of the third layer.

    The published column of this name is of the last forward pass of several, not of the first as for other layers;
    here every layer is of the same pass.
    """
    return hidden_spectrum(network, tokens_of(batch), layer=3).score


def embedding_jacobian(
    network: nn.Module, tokens: Tensor, *, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return the gradient of the summed outputs by what the embedding gives, (B, T E): one row for each sample.

    Args:
        network: Its first ``nn.Embedding`` is called once with the tokens, (B, T).
        tokens: (B, T).
        noise: a: ``a var N(0, 1)`` is added to the embeddings, var their variance over the batch for each step and
            feature.
        generator: Source of the noise.

    Raises:
        UserError: No embedding, or noise for a batch of one.
    """
    embeddings = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    if not embeddings:
        raise _nothing(network, "an nn.Embedding, whose output the Jacobian is taken at")
    if noise and len(tokens) < 2:
        raise UserError("batch", Shown("one sample"), allowed="at least two, over which the variance is taken")
    leaves: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaf = output.detach()
        if noise:
            drawn = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
            leaf = leaf + noise * leaf.var(0, keepdim=True) * drawn
        leaves.append(leaf.requires_grad_())
        return leaf

    with fixed(network, norm="running") as view:
        handle = embeddings[0].register_forward_hook(hook)
        try:
            (jacobian,) = torch.autograd.grad(view(tokens).sum(), leaves)
        finally:
            handle.remove()
    return jacobian.flatten(1)


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def jacobian_covariance(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``spectral`` of the embedding's Jacobian, whose variables are the samples."""
    return spectral(embedding_jacobian(network, tokens_of(batch)))


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def jacobian_cosine(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``cosine`` of the embedding's Jacobian."""
    return cosine(embedding_jacobian(network, tokens_of(batch)))


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def large_noise_jacobian(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``1 - |s - s_10|``, s the Jacobian covariance and s_10 with ten-fold noise.

    The published column of this name is never negative, which this definition does not give: its ranking is the
    opposite.
    """
    plain, noised = (spectral(_noised(network, batch, a, generator)) for a in (0.0, 10.0))
    return 1 - abs(plain - noised)


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def large_noise_jacobian_cosine(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``1 - |s - s_10|``, s the Jacobian cosine and s_10 with ten-fold noise."""
    plain, noised = (cosine(_noised(network, batch, a, generator)) for a in (0.0, 10.0))
    return 1 - abs(plain - noised)


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def more_noised_jacobian(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``s s_0.1 s_10 s_100``, Jacobian covariances without noise and with three amounts of it."""
    product = 1.0
    for a in (0.0, *NOISES):
        product *= spectral(_noised(network, batch, a, generator))
    return product


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def more_noised_jacobian_cosine(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``s s_0.1 s_10 s_100``, Jacobian cosines without noise and with three amounts of it."""
    product = 1.0
    for a in (0.0, *NOISES):
        product *= cosine(_noised(network, batch, a, generator))
    return product


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def activation_distance(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``log |det K|``, K the agreement of samples over all activations of all cells, steps and layers.

    A unit is active where what enters its tanh, sigmoid or (leaky) ReLU is positive. Minus infinity when two samples
    have one pattern.

    Raises:
        UserError: No activation module in a ``RecurrentCell``.
    """
    entered: list[Tensor] = []
    cells = [module for module in network.modules() if isinstance(module, RecurrentCell)]
    nodes = [module for cell in cells for module in cell.modules() if isinstance(module, _ACTIVATIONS)]
    if not nodes:
        raise _nothing(network, "cells of layers.recurrent_cells with activations")
    with fixed(network, norm="running") as view, ExitStack() as stack, torch.no_grad():
        for node in nodes:
            stack.callback(node.register_forward_hook(lambda _m, x, _y: entered.append(x[0])).remove)
        view(tokens_of(batch))
    return log_determinant(agreement(entered))


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def synaptic_saliency(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``sum |w dw|`` over all matrices (shared ones once), the outputs y having the gradient y."""
    with fixed(network, norm="running") as view:
        weights = [parameter for parameter in view.parameters.values() if parameter.dim() >= 2]
        output = view(tokens_of(batch))
        found = torch.autograd.grad(output, weights, grad_outputs=output.detach(), allow_unused=True)
    return sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, found, strict=True) if g is not None)


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES, higher_is_better=False)
def hidden_saliency(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``sum |h dh|`` over the states that enter the steps of all layers, the outputs y having the gradient y.

    Raises:
        UserError: No ``RecurrentCell``.
    """
    made: dict[nn.Module, list[Tensor]] = {m: [] for m in network.modules() if isinstance(m, RecurrentCell)}
    if not made:
        raise _nothing(network, "cells of layers.recurrent_cells")
    with fixed(network, norm="running") as view, ExitStack() as stack:
        for cell in made:
            stack.callback(cell.register_forward_hook(lambda m, _x, y: made[m].append(y[0])).remove)
        output = view(tokens_of(batch))
        fed = [state for states in made.values() for state in states[:-1]]  # the last enters no step
        if not fed:
            return 0.0
        found = torch.autograd.grad(output, fed, grad_outputs=output.detach(), allow_unused=True)
    return sum(float((h.detach() * g).abs().sum()) for h, g in zip(fed, found, strict=True) if g is not None)


def _noised(network: nn.Module, batch: Batch, noise: float, generator: torch.Generator) -> Tensor:
    return embedding_jacobian(network, tokens_of(batch), noise=noise, generator=generator)


def _is_layer(module: nn.Module) -> bool:
    torchs = isinstance(module, nn.RNNBase) and module.num_layers == 1 and not module.bidirectional
    return isinstance(module, RecurrentLayer) or torchs


def _first_state(layer: nn.Module, given: Any) -> Tensor:
    return cast(Tensor, given[0] if isinstance(given, tuple | list) else given)


def _nothing(network: nn.Module, needed: str) -> UserError:
    return UserError("network", Shown(f"a {type(network).__name__}"), allowed=f"a network with {needed}")

"""Scores of untrained text encoders, by layer of a ``FlexiEncoder``: saliencies, confidences, and a Jacobian.

``batch.images`` are token numbers, (B, T) or (B, 1, 1, T), 0 is padding. Gradients are those of the sum of the last
hidden states. A score that is a sum over tensors has a ``..._normalised`` form, divided by their number.

Source: Serianni and Kalita 2023, arXiv 2306.00288. As is the published code, not the paper's text: confidences take the
largest value over positions (of an operator's linear layer) and over heads (of attention); ``attention_confidence`` is
the paper's own, the largest weight that a head gives to any position.
"""

# B batch, T positions, N heads, H features, E features of the embeddings

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.zero_cost.base import TEXT_SCORES, Batch, FixedNetwork, fixed, zero_cost_score
from archsmith.evaluate.zero_cost.correlation import agreement, cosine, spectral
from archsmith.evaluate.zero_cost.hidden import PAPER, tokens_of
from archsmith.layers.flexibert import FlexiEncoder, FlexiLayer

LEAST_WIDTH = 128
"""Outputs that a linear layer of an operator needs to count for the head importance, as published."""

CONFIDENT = ("query", "key", "value", "multiply", "input")
"""Linear layers of operators whose outputs have a confidence, as published."""


@dataclass(frozen=True)
class Parts:
    """A sum over tensors: its value and their number."""

    total: float
    count: int

    @property
    def mean(self) -> float:
        """Return the value for each tensor; 0 when there is none."""
        return self.total / self.count if self.count else 0.0


def synaptic_diversity_parts(network: nn.Module, batch: Batch) -> Parts:
    """Sum ``||W|| ||dW||``, nuclear norms, over the linear layers that mix positions, output projections included."""
    names = [*_linears(network, "operator"), *_linears(network, "output")]
    pairs = _weights_and_gradients(network, batch, names)
    norm = torch.linalg.matrix_norm
    return Parts(sum(float(norm(w, "nuc") * norm(g, "nuc")) for w, g in pairs), len(pairs))


def encoder_saliency_parts(network: nn.Module, batch: Batch) -> Parts:
    """Sum ``|W dW|`` over the linear layers of the feed-forward stacks."""
    return _saliency(network, batch, _linears(network, "feed_forward"))


def head_importance_parts(network: nn.Module, batch: Batch) -> Parts:
    """Sum ``|W dW|`` over the linear layers of operators with at least ``LEAST_WIDTH`` outputs."""
    modules = dict(network.named_modules())
    wide = [name for name in _linears(network, "operator") if _outputs(modules[name]) >= LEAST_WIDTH]
    return _saliency(network, batch, wide)


def head_confidence_parts(network: nn.Module, batch: Batch) -> Parts:
    """Sum the mean over samples and features of the largest output of operators' linear layers over positions."""
    names = [name for name in _linears(network, "operator") if name.rsplit(".", 1)[1] in CONFIDENT]
    outputs = _outputs_of(network, batch, names)
    return Parts(sum(float(output.amax(1).mean()) for output in outputs), len(outputs))


def softmax_confidence_parts(network: nn.Module, batch: Batch) -> Parts:
    """Sum the mean of the largest attention weight over heads, (B, N, T, T) by axis 1.

    Their number is that of all layers, those without attention too, as published.
    """
    outputs = _outputs_of(network, batch, _softmaxes(network))
    return Parts(sum(float(output.amax(1).mean()) for output in outputs), len(_layers(network)))


def attention_confidence_parts(network: nn.Module, batch: Batch) -> Parts:
    """Sum the mean over samples, heads and positions of the largest weight that a head gives to any position."""
    outputs = _outputs_of(network, batch, _softmaxes(network))
    return Parts(sum(float(output.amax(-1).mean()) for output in outputs), len(outputs))


def token_agreement_parts(network: nn.Module, batch: Batch) -> Parts:
    """Sum all entries of K, the agreement of the first sample's tokens over what enters the GELUs of all layers.

    This is what goes by the name of activation distance for encoders: no determinant, one sample, (T, T).
    """
    names = [name for name in _linears(network, "feed_forward") if ".layers." in name.split(".feed_forward", 1)[1]]
    entered = [output[0] for output in _outputs_of(network, batch, names)]
    return Parts(float(agreement(entered).sum()), len(entered))


def position_jacobian(network: nn.Module, batch: Batch) -> Tensor:
    """Return the gradient of the position embeddings, (E, T): the variables are the features of the embedding.

    Columns are the positions that the batch has; they are all of the table when it is padded to the full length.
    """
    _encoder(network)
    prefix = next(name for name, module in network.named_modules() if isinstance(module, FlexiEncoder))
    name = f"{prefix}.embeddings.positions.weight" if prefix else "embeddings.positions.weight"
    ((_, gradient),) = _weights_and_gradients(network, batch, [name.removesuffix(".weight")])
    return gradient[: tokens_of(batch).shape[1]].T


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def synaptic_diversity(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``synaptic_diversity_parts``."""
    return synaptic_diversity_parts(network, batch).total


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def synaptic_diversity_normalised(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``synaptic_diversity_parts`` for each tensor."""
    return synaptic_diversity_parts(network, batch).mean


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def encoder_saliency(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``encoder_saliency_parts``."""
    return encoder_saliency_parts(network, batch).total


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def encoder_saliency_normalised(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``encoder_saliency_parts`` for each tensor."""
    return encoder_saliency_parts(network, batch).mean


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def head_importance(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``head_importance_parts``."""
    return head_importance_parts(network, batch).total


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def head_importance_normalised(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``head_importance_parts`` for each tensor."""
    return head_importance_parts(network, batch).mean


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def head_confidence(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``head_confidence_parts``."""
    return head_confidence_parts(network, batch).total


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def head_confidence_normalised(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``head_confidence_parts`` for each tensor."""
    return head_confidence_parts(network, batch).mean


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def softmax_confidence(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``softmax_confidence_parts``; 0 without attention."""
    return softmax_confidence_parts(network, batch).total


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def softmax_confidence_normalised(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``softmax_confidence_parts`` for each layer."""
    return softmax_confidence_parts(network, batch).mean


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def attention_confidence(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``attention_confidence_parts``; 0 without attention."""
    return attention_confidence_parts(network, batch).total


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def token_agreement(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``token_agreement_parts``."""
    return token_agreement_parts(network, batch).total


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def position_jacobian_covariance(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``spectral`` of ``position_jacobian``.

    About -100,000 of it are of one zero eigenvalue: a layer normalisation leaves gradients without a mean.
    """
    return spectral(position_jacobian(network, batch))


@zero_cost_score(needs="images", arxiv=PAPER, table=TEXT_SCORES)
def position_jacobian_cosine(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``cosine`` of ``position_jacobian``."""
    return cosine(position_jacobian(network, batch))


def _encoder(network: nn.Module) -> FlexiEncoder:
    found = [module for module in network.modules() if isinstance(module, FlexiEncoder)]
    if len(found) != 1:
        shown = Shown(f"a {type(network).__name__} with {len(found)} encoders")
        raise UserError("network", shown, allowed="a network with one FlexiEncoder (archsmith.layers.flexibert)")
    return found[0]


def _layers(network: nn.Module) -> list[str]:
    _encoder(network)
    return [name for name, module in network.named_modules() if isinstance(module, FlexiLayer)]


def _linears(network: nn.Module, part: str) -> list[str]:
    """Return the names of the linear layers in one part of every encoder layer."""
    starts = tuple(f"{layer}.{part}" for layer in _layers(network))
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(name == s or name.startswith(f"{s}.") for s in starts)
    ]


def _softmaxes(network: nn.Module) -> list[str]:
    names = {f"{layer}.operator.softmax" for layer in _layers(network)}
    return [name for name, _ in network.named_modules() if name in names]


def _outputs(module: nn.Module) -> int:
    assert isinstance(module, nn.Linear)
    return module.out_features


def _hidden(view: FixedNetwork, batch: Batch) -> Tensor:
    """Return the last hidden states of the encoder within a network."""
    seen: list[Tensor] = []
    encoder = _encoder(view.module)
    handle = encoder.register_forward_hook(lambda _m, _x, output: seen.append(output))
    try:
        view(tokens_of(batch))
    finally:
        handle.remove()
    return seen[-1]


def _weights_and_gradients(network: nn.Module, batch: Batch, names: list[str]) -> list[tuple[Tensor, Tensor]]:
    with fixed(network, norm="running") as view:
        weights = [view.parameters[f"{name}.weight"] for name in names]
        if not weights:
            return []
        found = torch.autograd.grad(_hidden(view, batch).sum(), weights)
    return [(w.detach(), g) for w, g in zip(weights, found, strict=True)]


def _saliency(network: nn.Module, batch: Batch, names: list[str]) -> Parts:
    pairs = _weights_and_gradients(network, batch, names)
    return Parts(sum(float((w * g).abs().sum()) for w, g in pairs), len(pairs))


def _outputs_of(network: nn.Module, batch: Batch, names: list[str]) -> list[Tensor]:
    modules = dict(network.named_modules())
    outputs: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    with fixed(network, norm="running") as view, ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(modules[name].register_forward_hook(hook).remove)
        view(tokens_of(batch))
    return outputs

"""What all zero-cost scores share: the batch, the list of scores, and a view of a network that cannot change it."""

# B batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import Shown, UserError

Needs = Literal["shape", "images", "labels"]
NormMode = Literal["batch", "running", "bypassed"]


@dataclass(frozen=True)
class Batch:
    """What a score may look at.

    Args:
        images: (B, C, H, W), normalised, floating point; for networks of text the token numbers (B, T).
        labels: (B,) class numbers; any for scores that do not look at them.

    Raises:
        UserError: No image, or another number of labels.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) < 1 or self.labels.shape != self.images.shape[:1]:
            given = Shown(f"images {tuple(self.images.shape)}, labels {tuple(self.labels.shape)}")
            raise UserError("batch", given, allowed="at least one image, and one label for each")


ScoreFunction = Callable[[nn.Module, Batch, torch.Generator], float]


@dataclass(frozen=True)
class Score:
    """One zero-cost score.

    Args:
        name: Its name, that of the function.
        function: ``function(network, batch, generator) -> float``.
        needs: What of the batch it looks at: the ``shape`` of its images, the ``images``, or the ``labels`` too.
        higher_is_better: Which way it points by its authors' account.
        arxiv: Paper that proposed it, empty for plain sizes.
    """

    name: str
    function: ScoreFunction
    needs: Needs
    higher_is_better: bool
    arxiv: str


SCORES: dict[str, Score] = {}
"""All scores by name, in the order of definition; filled by ``zero_cost_score``."""

TEXT_SCORES: dict[str, Score] = {}
"""Scores of recurrent networks and encoders of text, in the same way; they need modules that image networks lack."""


def zero_cost_score(
    *, needs: Needs, arxiv: str = "", higher_is_better: bool = True, table: dict[str, Score] = SCORES
) -> Callable[[ScoreFunction], ScoreFunction]:
    """List a function in ``SCORES`` or another table under its own name; the function stays what it is."""

    def listed(function: ScoreFunction) -> ScoreFunction:
        name = function.__name__
        table[name] = Score(name, function, needs, higher_is_better, arxiv)
        return function

    return listed


class FixedNetwork:
    """A network that is called with its own tensors or with others, and never changed by it.

    Made by ``fixed``. Parameters are detached views that require gradients; buffers are copies, so that statistics
    which a forward pass updates are thrown away.

    Attributes:
        module: The network itself: only to look at, and for hooks.
        parameters: Parameters by name.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self.module = module
        self.dtype = dtype
        self.parameters = {
            name: _cast(parameter.detach(), dtype).requires_grad_() for name, parameter in module.named_parameters()
        }
        self._buffers = {name: _cast(buffer, dtype) for name, buffer in module.named_buffers()}

    def __call__(self, images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the output for ``images``, with ``parameters`` in place of its own where given."""
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        tensors = {**buffers, **self.parameters, **(parameters or {})}
        output = functional_call(self.module, tensors, (_cast(images, self.dtype),))
        assert isinstance(output, Tensor)
        return output

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of convolutions and linear layers: what pruning scores are summed over."""
        names = {
            f"{name}.weight" if name else "weight"
            for name, module in self.module.named_modules()
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
        }
        return {name: parameter for name, parameter in self.parameters.items() if name in names}


@contextmanager
def fixed(network: nn.Module, *, norm: NormMode, dtype: torch.dtype | None = None) -> Iterator[FixedNetwork]:
    """Give a ``FixedNetwork`` in a defined mode, and put every module's mode back afterwards.

    Args:
        network: Any network.
        norm: What batch normalisations do: ``batch`` normalises by the statistics of the batch, ``running`` by their
            running ones (mean 0 and variance 1 in a new network), ``bypassed`` makes them the identity. Everything else
            is in evaluation mode, so no dropout falls into a score.
        dtype: Precision to compute in; None for the network's own.
    """
    modes = {module: module.training for module in network.modules()}
    with ExitStack() as stack:
        try:
            network.eval()
            for module in network.modules():
                if isinstance(module, _BatchNorm):
                    module.training = norm == "batch"
                    if norm == "bypassed":
                        stack.callback(module.register_forward_hook(_bypass).remove)
            yield FixedNetwork(network, dtype)
        finally:
            for module, training in modes.items():
                module.training = training


@contextmanager
def watching(
    network: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...], see: Callable[[Tensor, Tensor], Any]
) -> Iterator[int]:
    """Call ``see(input, output)`` for every call of a module of ``kinds``; gives the number of such modules."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(inputs[0], output)

    modules = [module for module in network.modules() if isinstance(module, kinds)]
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield len(modules)


def _bypass(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    return inputs[0]


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

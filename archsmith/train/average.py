"""Exponential moving average of weights and running statistics, and recalibration of batch statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from archsmith.train.compute import Compute


def rescaled_decay(decay: float, batch_size: int, reference_batch: int = 4096) -> float:
    """Return the decay per step for another batch size: ``decay ** (batch_size / reference_batch)``."""
    return float(decay ** (batch_size / reference_batch))


class MovingAverage:
    """Exponential moving average of every parameter and every floating point buffer of a model.

    ``shadow = d shadow + (1 - d) value`` with ``d = min(decay, (1 + t) / (10 + t))``, ``t`` counting
    updates from 1.

    Args:
        model: Network that is averaged; read by ``update``.
        decay: Largest decay.

    ``tensors`` is a plain table by qualified name, so that surgery can cut it together with the model.

    Source: the step warm-up of TensorFlow's ExponentialMovingAverage, as AtomNAS uses it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay!r}; allowed: a number in [0, 1).")
        self.decay = decay
        self.steps = 0
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().clone(memory_format=torch.preserve_format) for name, tensor in averaged(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's present values."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        values = averaged(model)
        torch._foreach_lerp_([self.tensors[name] for name in values], list(values.values()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into ``model``; integer buffers (step counters) stay."""
        for name, tensor in averaged(model).items():
            tensor.copy_(self.tensors[name])

    def averaged_copy(self, model: nn.Module) -> nn.Module:
        """Return a copy of ``model`` that holds the averages; ``model`` is not touched."""
        twin = copy.deepcopy(model)
        twin.zero_grad(set_to_none=True)
        self.copy_to(twin)
        return twin


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """Return what a moving average covers, by name: parameters and floating point buffers.

    Names and order are those of ``named_parameters`` and ``named_buffers``; a shared tensor appears once. One walk over
    the modules instead of their nested iterators, because this is asked at every training step.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()

    def collect(module: nn.Module, prefix: str) -> None:
        for source, found in ((module._parameters, parameters), (module._buffers, buffers)):
            for name, tensor in source.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[prefix + name] = tensor
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                collect(child, f"{prefix}{name}.")

    collect(model, "")
    return {**parameters, **{name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()}}


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor], compute: Compute | None = None) -> nn.Module:
    """Replace the running statistics of every batch normalisation by plain averages over ``batches``.

    Args:
        model: Network, changed in place; ends in evaluation mode. Only batch normalisation runs in training mode, so
            dropout is off.
        batches: Input batches (B, ...) of training images; each counts the same.
        compute: In which parts and where they are computed; the statistics are means over the parts and the processes.

    Returns:
        ``model``.

    Raises:
        ValueError: No batch was given.

    Source: AtomNAS (arXiv 1912.09640): averaged weights need statistics of their own.
    """
    compute = compute or Compute()
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    count = 0
    for inputs in batches:
        compute.over_parts(model, len(inputs), partial(_forward_part, model, inputs, compute), together=False)
        count += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    if count == 0:
        raise ValueError("recalibrate needs at least one batch of inputs, got none.")
    compute.workers.mean_([buffer for buffer in model.buffers() if buffer.is_floating_point()])
    return model


def _forward_part(model: nn.Module, inputs: Tensor, compute: Compute, part: slice, names: tuple[int, ...]) -> None:
    model(inputs[part].to(compute.device))

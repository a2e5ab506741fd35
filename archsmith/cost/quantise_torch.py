"""A quantisation policy simulated in torch: weights and activations rounded to what int8 can hold, computed in float32.

It says what quantisation does to the outputs, never to the time: latency is that of a really quantised file
(``quantise_onnx``). The quantisers are the same; what differs is that here the normalisations are not folded into the
convolutions, and sums of int8 products are not kept in 32-bit integers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.cost.quantisers import Quantiser, activation_quantiser, weight_quantiser
from archsmith.graph import evaluating
from archsmith.space.quantisation import Policy, check_layers

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)


def quantisable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers that a policy may name, by qualified name, shared ones once."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _WEIGHTED)}


def layer_elements(module: nn.Module) -> dict[str, int]:
    """Return the elements of the weight of every such layer; for ``policy_bytes``."""
    return {name: int(layer.weight.numel()) for name, layer in quantisable_layers(module).items()}  # type: ignore[operator]


def simulated(
    module: nn.Module, policy: Policy, batches: Iterable[Tensor | Sequence[Any]], *, outputs: bool = False
) -> nn.Module:
    """Return a copy of ``module`` that computes as if its layers were quantised.

    Args:
        module: Any network, left as it is.
        policy: Policy by layer, see ``quantisable_layers``; layers that it does not name stay as they are.
        batches: Calibration inputs: tensors, or tuples of arguments. Activations are quantised between their extremes.
        outputs: Whether what leaves an int8 layer is quantised as well, not only what enters it.

    Raises:
        UserError: A layer that does not exist, or int8 layers and no calibration batch.
    """
    check_layers(policy, quantisable_layers(module))
    network = copy.deepcopy(module).eval()
    layers = quantisable_layers(network)
    narrow = {name: layers[name] for name, each in policy.items() if each.precision == "int8"}
    ranges = _observed(network, narrow, batches) if narrow else {}
    for name, each in policy.items():
        layer: Any = layers[name]
        with torch.no_grad():
            if each.precision == "bf16":
                layer.weight.copy_(layer.weight.to(torch.bfloat16))
            if each.precision == "int8":
                axis = 1 if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d) else 0
                quantiser = weight_quantiser(layer.weight.detach().cpu().numpy(), each, axis=axis)
                layer.weight.copy_(quantiser.fake(layer.weight))
                entering, leaving = ranges[name]
                layer.register_forward_pre_hook(_Entering(activation_quantiser(*entering)))
                if outputs:
                    layer.register_forward_hook(_Leaving(activation_quantiser(*leaving)))
    return network


class _Entering:
    """A hook that quantises what enters a layer; an object, so that the network can be copied."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.quantiser.fake(arguments[0]), *arguments[1:])


class _Leaving:
    """A hook that quantises what leaves a layer."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.quantiser.fake(output)


def _observed(
    network: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Tensor | Sequence[Any]]
) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Return the extremes in front of and behind every layer."""
    found: dict[str, list[float]] = {}
    examples = 0

    def note(name: str, tensors: tuple[Tensor, Tensor]) -> None:
        before = found.setdefault(name, [float("inf"), float("-inf")] * 2)
        for at, tensor in enumerate(tensors):
            before[2 * at] = min(before[2 * at], float(tensor.min()))
            before[2 * at + 1] = max(before[2 * at + 1], float(tensor.max()))

    handles = [
        layer.register_forward_hook(lambda _, args, out, name=name: note(name, (args[0], out)))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), evaluating(network):
            for batch in batches:
                arguments = (batch,) if isinstance(batch, Tensor) else tuple(batch)
                examples += len(arguments[0])
                network(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    if not examples:
        raise UserError(
            "calibration", Shown("an empty set"), allowed="at least one example", hint="Take some of the training set."
        )
    if idle := [name for name in layers if name not in found]:
        raise UserError("policy", idle[0], allowed="layers that run", hint="This one did not run in calibration.")
    return {name: ((a, b), (c, d)) for name, (a, b, c, d) in found.items()}

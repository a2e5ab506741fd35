"""Networks pruned by patterns and kernels, stored by what is left: JSON that says the shape, safetensors with the rest.

``patterns.json`` has for each pruned convolution its arguments and patterns; ``patterns.safetensors`` its ``values``
(weights of each stored kernel), ``pattern`` (which pattern it has), ``channel`` (which input it reads) and ``filters``
(where each filter's list of kernels begins), and every other tensor of the network as it is. Code generators for
pattern-pruned networks need exactly these. Nothing is pickled.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from archsmith.atoms.prunable import unwrapped
from archsmith.atoms.weight_masks import Pool
from archsmith.core.errors import Shown, UserError
from archsmith.core.files import read_json, sha256_of, write_atomic
from archsmith.layers.pattern_conv import Execution, PatternConv2d

_FORMAT = "archsmith.patterns/1"


@dataclass(frozen=True, eq=False)
class KernelChoice:
    """What stays of one convolution.

    Attributes:
        kept: Boolean (O, I), which kernels stay.
        patterns: Which pattern each kernel has, integers (O, I); None where kernels are kept whole.
    """

    kept: Tensor
    patterns: Tensor | None = None


def packed_model(
    model: nn.Module, choices: Mapping[str, KernelChoice], pool: Pool, *, execution: Execution = "sparse"
) -> nn.Module:
    """Return a copy of a network whose pruned convolutions are ``PatternConv2d``.

    Args:
        model: Read only; wrapped or not.
        choices: What stays, by the qualified names of its convolutions.
        pool: What the pattern numbers mean.
        execution: How the new layers compute.

    Raises:
        UserError: A name that is no convolution, or one whose padding cannot be stored.
    """
    packed = copy.deepcopy(unwrapped(model))
    for name, choice in choices.items():
        convolution = dict(packed.named_modules()).get(name)
        if not isinstance(convolution, nn.Conv2d):
            raise UserError("layer", name, allowed="the qualified name of a Conv2d")
        try:
            layer = PatternConv2d.from_dense(
                convolution, choice.kept, choice.patterns, None if choice.patterns is None else pool
            )
        except ValueError as error:
            raise UserError(name, Shown(str(error).removesuffix(".")), allowed="zero padding in numbers") from error
        layer.execution = execution
        _replace(packed, name, layer)
    return packed


def save_packed(folder: str | Path, packed: nn.Module) -> None:
    """Write ``patterns.json`` and ``patterns.safetensors`` of a network from ``packed_model``.

    Args:
        folder: Made when it is not there; files of an earlier call are replaced, each complete or not at all.
        packed: The network.

    Raises:
        UserError: The network has no ``PatternConv2d``.
        OSError: The folder cannot be written.
    """
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PatternConv2d)}
    if not layers:
        raise UserError("model", Shown("a network without pattern convolutions"), allowed="one from packed_model")
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in packed.state_dict().items()}
    data = safetensors.torch.save(tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "patterns.safetensors", data)
    described: dict[str, Any] = {
        "format": _FORMAT,
        "sha256": sha256_of(data),
        "layers": {name: layer.constructor() for name, layer in layers.items()},
    }
    write_atomic(folder / "patterns.json", json.dumps(described, indent=1) + "\n")


def load_packed(folder: str | Path, model: nn.Module) -> nn.Module:
    """Return a network with the structure and the weights of a saved one.

    Args:
        folder: Where ``save_packed`` wrote.
        model: A network of the same code, dense as it was before pruning; copied, not changed.

    Raises:
        UserError: Files that are missing, damaged, of another format, or of another network.
    """
    described, tensors = _read(Path(folder))
    loaded = copy.deepcopy(unwrapped(model))
    for name, arguments in described["layers"].items():
        if not isinstance(dict(loaded.named_modules()).get(name), nn.Conv2d):
            raise UserError(
                "model", Shown(f"a network without the convolution {name}"), allowed="the one that was saved"
            )
        _replace(loaded, name, _layer(arguments))
    try:
        loaded.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).strip().splitlines()
        raise UserError("model", Shown(" ".join(first[:2])), allowed="the network that was saved") from error
    return loaded


def dense_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the ``state_dict`` of the dense network: removed weights are zero, kept ones the same bits.

    Raises:
        UserError: See ``load_packed``.
    """
    described, tensors = _read(Path(folder))
    for name, arguments in described["layers"].items():
        layer = _layer(arguments)
        own = {key: tensors.pop(f"{name}.{key}") for key in layer.state_dict()}
        layer.load_state_dict(own)
        tensors[f"{name}.weight"] = layer.to(own["values"].dtype).to_dense().detach()
        if "bias" in own:
            tensors[f"{name}.bias"] = own["bias"]
    return tensors


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        described: dict[str, Any] = read_json(folder / "patterns.json")
        data = (folder / "patterns.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise UserError("folder", str(folder), allowed="a folder that save_packed wrote", hint=str(error)) from error
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise UserError("folder", str(folder), allowed=f"files of the format {_FORMAT}")
    if sha256_of(data) != described.get("sha256"):
        raise UserError("folder", str(folder), allowed="patterns.safetensors as it was written with patterns.json")
    return described, safetensors.torch.load(data)


def _layer(arguments: Mapping[str, Any]) -> PatternConv2d:
    pairs = {key: (int(value[0]), int(value[1])) for key, value in arguments.items() if key in _PAIRS}
    patterns = tuple(tuple(int(at) for at in pattern) for pattern in arguments["patterns"])
    others = {key: value for key, value in arguments.items() if key not in (*_PAIRS, "patterns")}
    return PatternConv2d(**{**others, **pairs, "patterns": patterns})


_PAIRS = ("kernel_size", "stride", "padding", "dilation")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)

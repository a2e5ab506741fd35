"""Targets and inputs as a user types them: ``package.module:factory``, ``model.onnx``, ``1x3x224x224``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError


def load_target(text: str) -> nn.Module | Path:
    """Return the network that ``text`` names.

    Args:
        text: ``module:factory`` (the module is imported with the current folder on the path, which executes its code;
            the factory, which may be a dotted attribute or a class, is called without arguments), or the path of an
            ``.onnx`` file.

    Raises:
        UserError: No such file, module or attribute, the factory is not callable, fails, or returns something else.
    """
    if text.endswith(".onnx"):
        if not os.path.isfile(text):
            raise UserError("target", text, allowed="an existing .onnx file")
        return Path(text)
    module_name, separator, attribute = text.partition(":")
    if not separator or not module_name or not attribute:
        raise UserError("target", text, allowed="module:factory or the path of an .onnx file")
    factory = _imported(text, module_name, attribute)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise UserError(
            "target",
            Shown(f"'{text}', a {type(factory).__name__}"),
            allowed="a function or class that makes the network when called without arguments",
        )
    try:
        network = factory()
    except Exception as error:
        raise UserError(
            "target",
            Shown(f"'{text}', which fails when called ({type(error).__name__}: {error})"),
            allowed="a factory that needs no arguments",
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            "target", Shown(f"'{text}', which returns a {type(network).__name__}"), allowed="a factory of an nn.Module"
        )
    return network


def _imported(text: str, module_name: str, attribute: str) -> object:
    # As `python -m` does; at the end, so that a file here does not replace an installed package.
    if (folder := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        raise UserError(
            "target",
            Shown(f"'{text}', but there is no module '{missing}'"),
            allowed="a module that can be imported here",
            hint=f"Run from the folder that holds {module_name.split('.')[0]}, or install it.",
        ) from error
    except Exception as error:
        raise UserError(
            "target",
            Shown(f"'{text}', whose import fails ({type(error).__name__}: {error})"),
            allowed="a module that can be imported here",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(
                "target",
                Shown(f"'{text}', but '{module_name}' has no '{attribute}'"),
                allowed="the name of a function or class in that module",
            )
        found = getattr(found, part)
    return found


def parse_shapes(text: str) -> tuple[tuple[int, ...], ...]:
    """Return the shapes in ``text``: sizes joined by ``x``, several inputs joined by commas.

    Raises:
        UserError: Not of that form, or a size that is not positive.

    Example:
        >>> parse_shapes("1x3x224x224")
        ((1, 3, 224, 224),)
    """
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
            raise UserError("input", text, allowed="positive sizes joined by x, batch first, such as 1x3x224x224")
        shapes.append(tuple(int(size) for size in sizes))
    return tuple(shapes)


def example_inputs(shapes: tuple[tuple[int, ...], ...], *, seed: int = 0) -> tuple[Tensor, ...]:
    """Return standard normal float32 tensors of ``shapes``, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)

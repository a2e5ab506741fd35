"""The network of a specified module program: nested tuples of named layers, as plain PyTorch.

A program is ``(kind, ((name, value), ...))``, ``("Concat", (program, ...))`` or ``("Residual", program)``; it is a
literal and the only argument of the network besides the shape of its input.

Source: Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792; padding as TensorFlow's SAME and VALID.
"""

# B batch, C channels, H height, W width, N features

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from archsmith.layers.nasnet import same_pads

ModuleProgram = tuple[Any, ...]
ExampleShape = tuple[int, ...]

ACTIVATIONS = {"ReLU": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh}

NORMAL_SCALE = 0.05
"""Standard deviation of the initialiser "normal"."""


def initialise_layer_(layer: nn.Conv2d | nn.Linear, name: str) -> None:
    """Draw the weights of a layer by the name of an initialiser; its bias becomes zero.

    Args:
        layer: Changed in place.
        name: "kaiming": normal of variance 2 / fan-in. "xavier": uniform within ``sqrt(6 / (fan-in + fan-out))``.
            "normal": normal with a standard deviation of 0.05.

    Raises:
        ValueError: Another name.
    """
    if name == "kaiming":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    elif name == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    elif name == "normal":
        nn.init.normal_(layer.weight, std=NORMAL_SCALE)
    else:
        raise ValueError(f"initialiser: got {name!r}; allowed: 'kaiming', 'xavier', 'normal'.")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


class WindowConv(nn.Module):
    """Convolution with bias over square windows, padded as TensorFlow does.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        filters: Channels of the output.
        size: Side of the window.
        stride: Step of the window.
        padding: "SAME": ``ceil(H / stride)`` outputs, zeros around, the odd one at the end. "VALID": no padding.
        initialiser: See ``initialise_layer_``.

    Raises:
        ValueError: Another padding or initialiser.
    """

    def __init__(self, in_channels: int, filters: int, size: int, stride: int, padding: str, initialiser: str) -> None:
        super().__init__()
        check_padding(padding)
        self.padding = padding
        self.conv = nn.Conv2d(in_channels, filters, size, stride)
        initialise_layer_(self.conv, initialiser)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, filters, H', W')."""
        conv = self.conv
        left, right, top, bottom = window_pads(x, conv.kernel_size[0], conv.stride[0], self.padding)
        if (top, left) != (bottom, right):
            x = functional.pad(x, (left, right, top, bottom))
            top, left = 0, 0
        return functional.conv2d(x, conv.weight, conv.bias, conv.stride, (top, left))


class WindowPool(nn.Module):
    """Maximum or mean over square windows; padding counts neither as a value nor in the mean.

    Args:
        kind: "max" or "avg".
        size: Side of the window.
        stride: Step of the window.
        padding: As for ``WindowConv``.
    """

    def __init__(self, kind: str, size: int, stride: int, padding: str) -> None:
        super().__init__()
        check_padding(padding)
        self.kind, self.size, self.stride, self.padding = kind, size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        left, right, top, bottom = window_pads(x, self.size, self.stride, self.padding)
        even = (top, left) == (bottom, right)
        if self.kind == "max":
            if not even:
                x = functional.pad(x, (left, right, top, bottom), value=float("-inf"))
                top, left = 0, 0
            return functional.max_pool2d(x, self.size, self.stride, (top, left))
        if even:
            return functional.avg_pool2d(x, self.size, self.stride, (top, left), count_include_pad=False)
        pads = (left, right, top, bottom)
        present = functional.pad(torch.ones_like(x[:1, :1]), pads)
        share = functional.avg_pool2d(present, self.size, self.stride)
        return functional.avg_pool2d(functional.pad(x, pads), self.size, self.stride) / share


class FlatLinear(nn.Module):
    """Linear map of everything an example has.

    Args:
        in_features: Numbers of an example.
        units: Features of the output.
        initialiser: See ``initialise_layer_``.
    """

    def __init__(self, in_features: int, units: int, initialiser: str) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, units)
        initialise_layer_(self.linear, initialiser)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to (B, units)."""
        return self.linear(torch.flatten(x, 1))


class PaddedResidual(nn.Module):
    """``pad(body(x)) + pad(x)``: zeros at the end of each axis make the shapes equal.

    Args:
        body: The residual branch.
        shape: Shape of an input example.
        inner: Shape of an example behind the branch. With another number of axes than ``shape`` both are flattened.
    """

    def __init__(self, body: nn.Module, shape: ExampleShape, inner: ExampleShape) -> None:
        super().__init__()
        self.body = body
        self.shape = sum_shape(inner, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to (B, *shape)."""
        return padded_to(self.body(x), self.shape) + padded_to(x, self.shape)


class ModuleNetwork(nn.Module):
    """The network of a program.

    Args:
        program: Specified module, nested tuples of literals.
        input_shape: Shape of an example: (C, H, W), or (N,).

    Attributes:
        output_shape: Shape of an example behind the last module.

    Raises:
        ValueError: The program has a module that does not exist or does not fit.
    """

    def __init__(self, program: ModuleProgram, input_shape: ExampleShape) -> None:
        super().__init__()
        self.program = program
        self.input_shape = tuple(input_shape)
        self.body, self.output_shape = make_modules(program, self.input_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, *input_shape) to (B, *output_shape)."""
        return self.body(x)

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {"program": self.program, "input_shape": self.input_shape}


def make_modules(program: ModuleProgram, shape: ExampleShape) -> tuple[nn.Module, ExampleShape]:
    """Return the layers of a program for inputs of a shape, and the shape of their output.

    Args:
        program: Specified module.
        shape: Shape of an input example.

    Raises:
        ValueError: An unknown kind of module, a window on something that is no map, or one that leaves no pixel.
    """
    kind, content = program
    if kind == "Concat":
        parts = []
        for part in content:
            layer, shape = make_modules(part, shape)
            parts.append(layer)
        return nn.Sequential(*parts), shape
    if kind == "Residual":
        body, inner = make_modules(content, shape)
        return PaddedResidual(body, shape, inner), sum_shape(inner, shape)
    return make_basic(kind, dict(content), shape)


def make_basic(kind: str, values: dict[str, Any], shape: ExampleShape) -> tuple[nn.Module, ExampleShape]:
    """Return the layer of a basic module and the shape of its output; see ``make_modules``."""
    if kind in ("Empty", "UserHyperparams"):
        return nn.Identity(), shape
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind](), shape
    if kind == "BatchNormalization":
        return (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0]), shape
    if kind == "Dropout":
        return nn.Dropout(1.0 - values["keep"]), shape
    if kind == "Affine":
        return FlatLinear(prod(shape), values["units"], values["initialiser"]), (values["units"],)
    if kind not in ("Conv2D", "MaxPooling2D", "AvgPooling2D"):
        raise ValueError(f"program: got the module {kind!r}; allowed: the modules of archsmith.space.modules.")
    if len(shape) != 3:
        raise ValueError(f"program: {kind} needs a map (C, H, W), its input has the shape {shape}.")
    size, stride, padding = values["size"], values["stride"], values["padding"]
    sides = tuple(-(-(side if padding == "SAME" else side - size + 1) // stride) for side in shape[1:])
    if min(sides) < 1:
        raise ValueError(f"program: a window of {size} does not fit into {shape[1:]} without padding.")
    if kind == "Conv2D":
        filters = values["filters"]
        conv = WindowConv(shape[0], filters, size, stride, padding, values["initialiser"])
        return conv, (filters, *sides)
    return WindowPool("max" if kind == "MaxPooling2D" else "avg", size, stride, padding), (shape[0], *sides)


def window_pads(x: Tensor, size: int, stride: int, padding: str) -> tuple[int, int, int, int]:
    """Return the padding (left, right, top, bottom) of a map (B, C, H, W)."""
    if padding == "VALID":
        return 0, 0, 0, 0
    return (*same_pads(int(x.shape[3]), size, stride), *same_pads(int(x.shape[2]), size, stride))


def check_padding(padding: str) -> None:
    """Refuse what is neither SAME nor VALID.

    Raises:
        ValueError: So it is.
    """
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding: got {padding!r}; allowed: 'SAME', 'VALID'.")


def sum_shape(first: ExampleShape, second: ExampleShape) -> ExampleShape:
    """Return the larger size of each axis; of shapes with different numbers of axes, the larger number of elements."""
    if len(first) == len(second):
        return tuple(max(pair) for pair in zip(first, second, strict=True))
    return (max(prod(first), prod(second)),)


def padded_to(x: Tensor, shape: ExampleShape) -> Tensor:
    """Return ``x`` (B, ...) with zeros at the end of each axis, flattened before if the numbers of axes differ."""
    if x.dim() - 1 != len(shape):
        x = torch.flatten(x, 1)
    missing = [size - int(have) for size, have in zip(shape, x.shape[1:], strict=True)]
    if not any(missing):
        return x
    return functional.pad(x, [amount for size in reversed(missing) for amount in (0, size)])

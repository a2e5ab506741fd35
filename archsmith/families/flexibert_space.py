"""The space of heterogeneous text encoders, without the networks and without torch.

A network is a row of stacks. Each stack chooses an operator, a hidden size, heads and feed-forward layers; all layers
of a stack share them. The hierarchy of the paper is three settings of one space: stacks of two layers (level 1), stacks
of one layer (level 2), and feed-forward layers whose sizes differ (level 3).

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656; the smaller space of 500 trained encoders, arXiv 2306.00288.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, NamedTuple

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, Element, Given, Group, Ordinal, ProductSpace, Repeat, Value, When

OPERATORS = ("sa-sdp", "sa-wma", "l-dft", "l-dct", "c-5", "c-9")
"""Operation and parameter: self-attention, linear transform, convolution with its kernel size."""

STACKS = "stacks"
COUNT = f"{STACKS}/count"


class Layer(NamedTuple):
    """One encoder layer.

    Attributes:
        operation: "sa", "l" or "c".
        parameter: "sdp", "wma", "dft", "dct" or a kernel size.
        hidden: Hidden size.
        heads: Attention heads, a divisor of it.
        sizes: Feed-forward sizes.
    """

    operation: str
    parameter: str | int
    hidden: int
    heads: int
    sizes: tuple[int, ...]

    @property
    def operator(self) -> str:
        """Name of the operator, "sa-wma" say."""
        return f"{self.operation}-{self.parameter}"


@dataclass(frozen=True, kw_only=True)
class FlexiSpace:
    """What may be chosen. The defaults are the published space, level 3: 240^2 + 240^4 networks.

    Attributes:
        name: Name of the space.
        depths: Numbers of layers, ascending, each a multiple of ``stack``.
        hidden: Hidden sizes, ascending.
        operators: Operators by name.
        heads: Numbers of heads, ascending, divisors of every hidden size.
        sizes: Sizes of a feed-forward layer, ascending.
        counts: Numbers of feed-forward layers, ascending.
        stack: Layers that share their choices.
        uniform_sizes: Whether the feed-forward layers of a stack have one size.
        one_width: Whether all layers have one hidden size.

    Raises:
        UserError: A setting that is not allowed.
    """

    name: str = "flexibert"
    depths: tuple[int, ...] = (2, 4)
    hidden: tuple[int, ...] = (128, 256)
    operators: tuple[str, ...] = OPERATORS
    heads: tuple[int, ...] = (2, 4)
    sizes: tuple[int, ...] = (512, 1024)
    counts: tuple[int, ...] = (1, 3)
    stack: int = 1
    uniform_sizes: bool = False
    one_width: bool = False

    def __post_init__(self) -> None:
        for field in ("depths", "hidden", "heads", "sizes", "counts"):
            values = tuple(getattr(self, field))
            object.__setattr__(self, field, values)
            whole = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
            if not values or not whole or list(values) != sorted(set(values)):
                raise UserError(f"space.{field}", list(values), allowed="ascending integers from 1")
        object.__setattr__(self, "operators", tuple(self.operators))
        if not isinstance(self.stack, int) or self.stack < 1 or any(depth % self.stack for depth in self.depths):
            raise UserError("space.stack", self.stack, allowed=f"a divisor of every depth in {list(self.depths)}")
        if odd := [(h, n) for h, n in product(self.hidden, self.heads) if h % n]:
            raise UserError("space.heads", odd[0][1], allowed=f"divisors of the hidden size {odd[0][0]}")
        for operator in self.operators or ("",):
            split_operator(operator)

    def space(self) -> ProductSpace:
        """Return the space: ``stacks/count``; per stack ``operator``, ``hidden``, ``heads``, ``ff/count`` and sizes."""
        body: dict[str, Element] = {"operator": Categorical(self.operators, group="operator")}
        if not self.one_width:
            body["hidden"] = Ordinal(self.hidden, group="hidden")
        body["heads"] = Ordinal(self.heads, group="heads")
        count, size = Ordinal(self.counts, group="count"), Ordinal(self.sizes, group="size")
        body["ff"] = Group({"count": count, "size": size}) if self.uniform_sizes else Repeat(count, size)
        elements: dict[str, Element] = {"hidden": Ordinal(self.hidden, group="hidden")} if self.one_width else {}
        repeats = Ordinal(tuple(depth // self.stack for depth in self.depths), group="depth")
        return ProductSpace(self.name, elements | {STACKS: Repeat(repeats, Group(body))})

    def layers(self, architecture: Mapping[str, Any]) -> tuple[Layer, ...]:
        """Return the layers of a point of the space, those of a stack one after the other."""
        found: list[Layer] = []
        for number in range(int(architecture[COUNT])):
            at = f"{STACKS}/{number}"
            operation, parameter = split_operator(str(architecture[f"{at}/operator"]))
            count = int(architecture[f"{at}/ff/count"])
            paths = [f"{at}/ff/size"] * count if self.uniform_sizes else [f"{at}/ff/{i}" for i in range(count)]
            hidden = int(architecture["hidden" if self.one_width else f"{at}/hidden"])
            sizes = tuple(int(architecture[path]) for path in paths)
            found += [Layer(operation, parameter, hidden, int(architecture[f"{at}/heads"]), sizes)] * self.stack
        return tuple(found)

    def architecture(self, layers: Sequence[Layer]) -> Architecture:
        """Return layers as a point of the space.

        Raises:
            UserError: They are not of the space: other sizes, or layers of a stack (of all, for ``one_width``) that
                differ.
        """
        decisions: dict[str, Value] = {COUNT: len(layers) // self.stack}
        widths = {layer.hidden for layer in layers}
        uneven = self.uniform_sizes and any(len(set(layer.sizes)) > 1 for layer in layers)
        if len(layers) % self.stack or (self.one_width and len(widths) > 1) or uneven:
            raise UserError("layers", [tuple(layer) for layer in layers], allowed=f"layers of the space {self.name!r}")
        if self.one_width:
            decisions["hidden"] = layers[0].hidden
        for number in range(len(layers) // self.stack):
            at, members = f"{STACKS}/{number}", layers[number * self.stack : (number + 1) * self.stack]
            layer = members[0]
            if any(other != layer for other in members):
                raise UserError("layers", [tuple(each) for each in members], allowed="equal layers within a stack")
            decisions |= {f"{at}/operator": layer.operator, f"{at}/heads": layer.heads}
            decisions[f"{at}/ff/count"] = len(layer.sizes)
            if not self.one_width:
                decisions[f"{at}/hidden"] = layer.hidden
            if self.uniform_sizes:
                decisions[f"{at}/ff/size"] = layer.sizes[0]
            else:
                decisions |= {f"{at}/ff/{i}": size for i, size in enumerate(layer.sizes)}
        return self.space().validate(decisions)

    def level(self, number: int) -> FlexiSpace:
        """Return the same choices at a level of the hierarchy: 1 (stacks of two), 2 (single layers), 3 (free sizes).

        Raises:
            UserError: Another number, or a depth that is odd at level 1.
        """
        if number not in (1, 2, 3):
            raise UserError("level", number, allowed="1, 2 or 3")
        return replace(
            self, name=f"flexibert-{number}", stack=2 if number == 1 else 1, uniform_sizes=number < 3, one_width=False
        )

    def between(self, first: Sequence[Layer], second: Sequence[Layer]) -> FlexiPart:
        """Return the part of this space whose choices are, layer by layer, those of two networks.

        This is how the hierarchy refines: the best networks and their neighbours span a small space, searched at the
        next level. A layer that only one of them has is that one's.

        Args:
            first: Layers of a network.
            second: Layers of another; the depths of both may be chosen.
        """
        places = [(*first[i : i + 1], *second[i : i + 1]) for i in range(max(len(first), len(second)))]
        depths = tuple(sorted({len(first), len(second)}))
        return FlexiPart(self, depths, tuple(tuple(dict.fromkeys(each)) for each in places))


@dataclass(frozen=True)
class FlexiPart:
    """A part of a space: for every layer the choices of a few networks, freely combined.

    Attributes:
        parent: The space of which it is a part.
        depths: Numbers of layers.
        options: For each place the layers whose operators, widths, heads and sizes may be combined there.
    """

    parent: FlexiSpace
    depths: tuple[int, ...]
    options: tuple[tuple[Layer, ...], ...]

    def space(self) -> ProductSpace:
        """Return the part as a space; its decisions are valid in the parent's space."""
        parent = self.parent
        elements: dict[str, Element] = {}
        if parent.one_width:
            widths = sorted({layer.hidden for each in self.options for layer in each})
            elements["hidden"] = Ordinal(tuple(widths), group="hidden")
        stacks: dict[str, Element] = {}
        counts = tuple(depth // parent.stack for depth in self.depths)
        for number in range(max(counts)):
            body = self._body(self.options[number * parent.stack : (number + 1) * parent.stack])
            reached = When(COUNT, tuple(count for count in counts if count > number))
            stacks[str(number)] = body if len(reached.values) == len(counts) else Given(reached, body)
        elements |= {COUNT: Ordinal(counts, group="depth")}
        return ProductSpace(parent.name, elements | {f"{STACKS}/{n}": body for n, body in stacks.items()})

    def _body(self, places: Sequence[Sequence[Layer]]) -> Group:
        layers = [layer for each in places for layer in each]
        body: dict[str, Element] = {
            "operator": Categorical(tuple(dict.fromkeys(layer.operator for layer in layers)), group="operator")
        }
        if not self.parent.one_width:
            body["hidden"] = Ordinal(tuple(sorted({layer.hidden for layer in layers})), group="hidden")
        body["heads"] = Ordinal(tuple(sorted({layer.heads for layer in layers})), group="heads")
        counts = tuple(sorted({len(layer.sizes) for layer in layers}))
        body["ff/count"] = Ordinal(counts, group="count")
        if self.parent.uniform_sizes:
            body["ff/size"] = Ordinal(tuple(sorted({layer.sizes[0] for layer in layers})), group="size")
            return Group(body)
        for number in range(max(counts)):
            found = sorted({size for layer in layers for size in layer.sizes[number : number + 1]})
            reached = When("ff/count", tuple(count for count in counts if count > number))
            body[f"ff/{number}"] = Given(reached, Ordinal(tuple(found), group="size"))
        return Group(body)


def split_operator(name: str) -> tuple[str, str | int]:
    """Return operation and parameter of an operator's name.

    Raises:
        UserError: No such operator.
    """
    operation, _, parameter = name.partition("-")
    if (operation, parameter) in {("sa", "sdp"), ("sa", "wma"), ("l", "dft"), ("l", "dct")}:
        return operation, parameter
    if operation == "c" and parameter.isascii() and parameter.isdigit() and int(parameter) % 2 == 1:
        return operation, int(parameter)
    raise UserError("operator", name, allowed=f"one of {list(OPERATORS)}, or c-<odd kernel size>")


def nas_bench_bert() -> FlexiSpace:
    """Return the space of the 500 trained encoders: one hidden size and feed-forward stacks of one size."""
    return FlexiSpace(name="nas-bench-bert", uniform_sizes=True, one_width=True)


def large_space() -> FlexiSpace:
    """Return the larger published setting: to six layers, hidden size 512 and eight heads, kernels to 13."""
    return FlexiSpace(
        name="flexibert-large",
        depths=(2, 4, 6),
        hidden=(128, 256, 512),
        operators=(*OPERATORS, "c-13"),
        heads=(2, 4, 8),
    )


def layers_from_model(model: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Return the layers of a published model dictionary.

    Args:
        model: ``l`` layers; per layer ``o`` operation, ``h`` hidden, ``n`` heads, ``f`` sizes and ``p`` parameter.

    Raises:
        UserError: Lists of other lengths than ``l``, or no such operator.
    """
    columns = [model[key] for key in "ophnf"]
    if any(len(column) != model["l"] for column in columns):
        raise UserError("model", dict(model), allowed=f"lists of {model['l']} entries, one for each layer")
    for operation, parameter in zip(model["o"], model["p"], strict=True):
        split_operator(f"{operation}-{parameter}")
    return tuple(Layer(o, p, h, n, tuple(f)) for o, p, h, n, f in zip(*columns, strict=True))


FLEXIBERT_MINI = (
    Layer("sa", "sdp", 256, 2, (512, 512, 512)),
    Layer("sa", "sdp", 256, 2, (512, 512, 512)),
    Layer("l", "dct", 128, 4, (1024,)),
    Layer("l", "dct", 128, 4, (1024,)),
)
"""The published FlexiBERT-Mini."""


def layer_params(layer: Layer, *, transform_output: bool = False) -> int:
    """Return the parameters of one encoder layer, in closed form.

    Args:
        layer: The layer.
        transform_output: Whether linear transforms have an output projection and a normalisation too.
    """
    h, n = layer.hidden, layer.heads
    if layer.operation == "l":
        found = h * h + h
    elif layer.operation == "sa":
        found = 3 * (h * h + h) + (h * h if layer.parameter == "wma" else 0)
    else:
        heads, kernel = max(1, n // 2), int(layer.parameter)
        own = heads * (h // n)
        # Queries, keys, values and spans; the local keys; the kernels.
        found = 4 * (h * own + own) + h * kernel + h * own + own + own * heads * kernel + heads * kernel
    if layer.operation != "l" or transform_output:
        mixed = 2 * max(1, n // 2) * (h // n) if layer.operation == "c" else h
        found += mixed * h + h + 2 * h
    sizes = (h, *layer.sizes, h)
    return found + sum(a * b + b for a, b in pairwise(sizes)) + 2 * h


def encoder_params(
    layers: Sequence[Layer],
    *,
    vocabulary: int = 30_522,
    positions: int = 512,
    embedding: int = 128,
    transform_output: bool = False,
) -> int:
    """Return the parameters of an encoder with its embeddings, without a head; defaults are the published ones."""
    found = (vocabulary + positions + 2) * embedding + 2 * embedding
    width = embedding
    for layer in layers:
        found += layer_params(layer, transform_output=transform_output)
        found += width * layer.hidden + layer.hidden if width != layer.hidden else 0
        width = layer.hidden
    return found

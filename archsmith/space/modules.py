"""A language whose expressions are whole spaces of networks: modules, and modules made of modules.

A basic module (``Conv2D``, ``Affine``, ...) has hyper-parameters with lists of values. Composite ones combine others:
``Concat`` (one after the other), ``Or`` (one of them), ``Repeat`` and ``RepeatTied``, ``Residual``, ``Optional``,
``MaybeSwap``. An expression is an immutable value; ``ModuleSpace`` walks it as a stream of decisions. A hyper-parameter
with a single value is never asked for. Shapes are inferred on the way, so that what cannot fit ends a walk.

Source: Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from archsmith.core.errors import UserError
from archsmith.space.deciders import DeadEnd
from archsmith.space.dimensions import Categorical
from archsmith.space.elements import Slot
from archsmith.space.values import Value, frozen_value

Shape = tuple[int, ...]
"""Sizes of one example: (C, H, W) of a feature map, (N,) of a vector."""

Program = tuple[Any, ...]
"""A specified module: ``(kind, ((name, value), ...))``, ``("Concat", (program, ...))`` or ``("Residual", program)``."""

Ask = Callable[[str, tuple[Value, ...], str], Value]
"""``ask(path, options, group)`` returns the choice; single options are returned without a decision."""

MAPS_ONLY = ("Conv2D", "MaxPooling2D", "AvgPooling2D")


class Specified(NamedTuple):
    """What a walk through a module ends with: its program and the shape of its output."""

    program: Program
    shape: Shape


class Module(ABC):
    """An expression of the language: a set of networks."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name of the module."""

    @abstractmethod
    def walk(self, ask: Ask, at: str, shape: Shape) -> Specified:
        """Ask for every hyper-parameter and return the specified module.

        Args:
            ask: Answers questions.
            at: Path of this module.
            shape: Shape of one input example.

        Raises:
            DeadEnd: The module does not fit its input.
        """

    @abstractmethod
    def slots(self, at: str) -> Iterator[Slot]:
        """Yield every place below ``at`` where a decision may ever be asked for."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of ways to specify it, shapes not considered."""

    @property
    @abstractmethod
    def always_fits(self) -> bool:
        """Whether no choice can fail to fit its input for want of room (``VALID`` paddings can)."""


@dataclass(frozen=True)
class Basic(Module):
    """A module with hyper-parameters: ordered ``(name, options)`` pairs. Made by ``Conv2D`` and its like."""

    name: str
    hyperparameters: tuple[tuple[str, tuple[Value, ...]], ...] = ()

    @property
    def kind(self) -> str:
        """Name of the module."""
        return self.name

    def walk(self, ask: Ask, at: str, shape: Shape) -> Specified:
        """Ask for each hyper-parameter in order."""
        if self.name in MAPS_ONLY and len(shape) != 3:
            raise DeadEnd(at, f"{self.name} needs a feature map (C, H, W), its input has the shape {shape}")
        values = {name: ask(_below(at, name), options, f"{self.name}.{name}") for name, options in self.hyperparameters}
        return Specified((self.name, tuple(values.items())), _shape_after(self.name, values, shape, at))

    def slots(self, at: str) -> Iterator[Slot]:
        """Yield a slot for each hyper-parameter with several values."""
        for name, options in self.hyperparameters:
            yield from _slot(_below(at, name), options, f"{self.name}.{name}")

    @property
    def size(self) -> int:
        """Product of the numbers of values."""
        return math.prod(len(options) for _, options in self.hyperparameters)

    @property
    def always_fits(self) -> bool:
        """Whether no padding is ``VALID``."""
        return "VALID" not in dict(self.hyperparameters).get("padding", ())


@dataclass(frozen=True)
class Concat(Module):
    """Modules one after the other; each is specified before the next is asked."""

    modules: tuple[Module, ...]

    def __init__(self, modules: Sequence[Module]) -> None:
        object.__setattr__(self, "modules", _several(modules, "Concat"))

    @property
    def kind(self) -> str:
        """Name of the module."""
        return "Concat"

    def walk(self, ask: Ask, at: str, shape: Shape) -> Specified:
        """Specify the modules in order."""
        programs = []
        for label, module in _labelled(self.modules):
            program, shape = module.walk(ask, _below(at, label), shape)
            programs.append(program)
        return Specified(("Concat", tuple(programs)), shape)

    def slots(self, at: str) -> Iterator[Slot]:
        """Yield the slots of every part."""
        for label, module in _labelled(self.modules):
            yield from module.slots(_below(at, label))

    @property
    def size(self) -> int:
        """Product of the sizes of the parts."""
        return math.prod(module.size for module in self.modules)

    @property
    def always_fits(self) -> bool:
        """Whether every part does."""
        return all(module.always_fits for module in self.modules)


@dataclass(frozen=True)
class Or(Module):
    """One of several modules; the decision ``branch`` names it."""

    modules: tuple[Module, ...]

    def __init__(self, modules: Sequence[Module]) -> None:
        object.__setattr__(self, "modules", _several(modules, "Or"))

    @property
    def kind(self) -> str:
        """Name of the module."""
        return "Or"

    def walk(self, ask: Ask, at: str, shape: Shape) -> Specified:
        """Choose a branch, then specify it."""
        branches = dict(_labelled(self.modules))
        label = ask(_below(at, "branch"), tuple(branches), "Or")
        return branches[str(label)].walk(ask, _below(at, str(label)), shape)

    def slots(self, at: str) -> Iterator[Slot]:
        """Yield the choice of the branch, then the slots of every branch."""
        yield from _slot(_below(at, "branch"), tuple(label for label, _ in _labelled(self.modules)), "Or")
        for label, module in _labelled(self.modules):
            yield from module.slots(_below(at, label))

    @property
    def size(self) -> int:
        """Sum of the sizes of the branches."""
        return sum(module.size for module in self.modules)

    @property
    def always_fits(self) -> bool:
        """Whether every branch does."""
        return all(module.always_fits for module in self.modules)


@dataclass(frozen=True)
class Repeat(Module):
    """A module several times in a row, each copy with choices of its own.

    Args:
        module: What is repeated.
        times: Possible numbers of copies, integers from 1.
    """

    module: Module
    times: tuple[int, ...]

    def __init__(self, module: Module, times: Sequence[int]) -> None:
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "times", _counts(times, type(self).__name__))

    @property
    def kind(self) -> str:
        """Name of the module."""
        return type(self).__name__

    def walk(self, ask: Ask, at: str, shape: Shape) -> Specified:
        """Choose the number of copies, then specify each."""
        times = ask(_below(at, "times"), self.times, self.kind)
        programs = []
        for copy in range(_whole(times)):
            program, shape = self._copy(ask, at, copy, shape)
            programs.append(program)
        return Specified(("Concat", tuple(programs)), shape)

    def _copy(self, ask: Ask, at: str, copy: int, shape: Shape) -> Specified:
        return self.module.walk(ask, _below(at, f"copy{copy}"), shape)

    def slots(self, at: str) -> Iterator[Slot]:
        """Yield the number of copies, then the slots of as many copies as there can be."""
        yield from _slot(_below(at, "times"), self.times, self.kind)
        for copy in range(max(self.times)):
            yield from self.module.slots(_below(at, f"copy{copy}"))

    @property
    def size(self) -> int:
        """Sum over the numbers of copies of the module's size to that power."""
        return sum(self.module.size**times for times in self.times)

    @property
    def always_fits(self) -> bool:
        """Whether the module does."""
        return self.module.always_fits


class RepeatTied(Repeat):
    """A module several times in a row; the first copy is asked, the others repeat its choices (not its weights)."""

    def walk(self, ask: Ask, at: str, shape: Shape) -> Specified:
        """Choose the number of copies, specify the first, repeat its answers."""
        times = ask(_below(at, "times"), self.times, self.kind)
        first, answers = _below(at, "copy0"), {}

        def recorded(path: str, options: tuple[Value, ...], group: str) -> Value:
            answers[path] = ask(path, options, group)
            return answers[path]

        programs = []
        for copy in range(_whole(times)):
            answered: Ask = recorded if copy == 0 else lambda path, options, group: answers[path]
            program, shape = self.module.walk(answered, first, shape)
            programs.append(program)
        return Specified(("Concat", tuple(programs)), shape)

    def slots(self, at: str) -> Iterator[Slot]:
        """Yield the number of copies and the slots of the first."""
        yield from _slot(_below(at, "times"), self.times, self.kind)
        yield from self.module.slots(_below(at, "copy0"))

    @property
    def size(self) -> int:
        """Number of copies times the module's size."""
        return len(self.times) * self.module.size


@dataclass(frozen=True)
class Residual(Module):
    """``pad(module(x)) + pad(x)``: zeros at the end of each axis make the shapes equal.

    Of equal rank, each axis becomes the larger of the two; else both are flattened and the shorter is padded.
    """

    module: Module

    @property
    def kind(self) -> str:
        """Name of the module."""
        return "Residual"

    def walk(self, ask: Ask, at: str, shape: Shape) -> Specified:
        """Specify the module on the residual branch."""
        program, inner = self.module.walk(ask, _below(at, "body"), shape)
        return Specified(("Residual", program), padded_shape(inner, shape))

    def slots(self, at: str) -> Iterator[Slot]:
        """Yield the slots of the branch."""
        return self.module.slots(_below(at, "body"))

    @property
    def size(self) -> int:
        """Size of the branch."""
        return self.module.size

    @property
    def always_fits(self) -> bool:
        """Whether the branch does."""
        return self.module.always_fits


def Optional(module: Module) -> Or:
    """Return ``Or([Empty(), module])``."""
    return Or([Empty(), module])


def MaybeSwap(first: Module, second: Module) -> Or:
    """Return both in one order or the other."""
    return Or([Concat([first, second]), Concat([second, first])])


def Empty() -> Basic:
    """Return the identity."""
    return Basic("Empty")


def ReLU() -> Basic:
    """Return max(x, 0)."""
    return Basic("ReLU")


def Sigmoid() -> Basic:
    """Return the logistic function."""
    return Basic("Sigmoid")


def Tanh() -> Basic:
    """Return the hyperbolic tangent."""
    return Basic("Tanh")


def BatchNormalization() -> Basic:
    """Return batch normalisation over channels, or features of a vector."""
    return Basic("BatchNormalization")


def Dropout(keep: Sequence[float]) -> Basic:
    """Return dropout; ``keep`` are the probabilities of keeping a unit, in (0, 1]."""
    bad = [p for p in keep if not 0 < p <= 1]
    if bad:
        raise UserError("Dropout.keep", bad, allowed="probabilities above 0, at most 1")
    return _basic("Dropout", keep=keep)


def Affine(units: Sequence[int], initialisers: Sequence[str] = ("kaiming",)) -> Basic:
    """Return a linear map of the flattened input to ``units`` features."""
    return _basic("Affine", units=_counts(units, "Affine.units"), initialiser=_initialisers(initialisers))


def Conv2D(
    filters: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int] = (1,),
    paddings: Sequence[str] = ("SAME",),
    initialisers: Sequence[str] = ("kaiming",),
) -> Basic:
    """Return a square convolution with bias: filters, window size, stride, padding ("SAME", "VALID"), initialiser."""
    return _basic(
        "Conv2D",
        filters=_counts(filters, "Conv2D.filters"),
        size=_counts(sizes, "Conv2D.sizes"),
        stride=_counts(strides, "Conv2D.strides"),
        padding=_paddings(paddings),
        initialiser=_initialisers(initialisers),
    )


def MaxPooling2D(windows: Sequence[int], strides: Sequence[int], paddings: Sequence[str] = ("SAME",)) -> Basic:
    """Return maximum pooling over square windows."""
    return _pooling("MaxPooling2D", windows, strides, paddings)


def AvgPooling2D(windows: Sequence[int], strides: Sequence[int], paddings: Sequence[str] = ("SAME",)) -> Basic:
    """Return average pooling over square windows; padding is not counted."""
    return _pooling("AvgPooling2D", windows, strides, paddings)


def UserHyperparams(**domains: Sequence[Value]) -> Basic:
    """Return the identity; its choices are published for the evaluator (a learning rate, say)."""
    return _basic("UserHyperparams", **domains)


def window_output(size: int, window: int, stride: int, padding: str) -> int:
    """Return the size after a window: ceil(size / stride) for SAME, ceil((size - window + 1) / stride) for VALID."""
    covered = size if padding == "SAME" else size - window + 1
    return -(-covered // stride)


def padded_shape(first: Shape, second: Shape) -> Shape:
    """Return the shape of a sum after padding: see ``Residual``."""
    if len(first) == len(second):
        return tuple(max(a, b) for a, b in zip(first, second, strict=True))
    return (max(math.prod(first), math.prod(second)),)


def program_names(program: Program) -> list[str]:
    """Return the names of the basic modules of a program in order; a residual connection is named before its branch."""
    kind, content = program
    if kind == "Concat":
        return [name for part in content for name in program_names(part)]
    if kind == "Residual":
        return ["Residual", *program_names(content)]
    return [kind]


def flattened(program: Program) -> Program:
    """Return the canonical form of a program: no nested ``Concat``, nothing that computes nothing."""
    kind, content = program
    if kind == "Concat":
        parts: list[Program] = []
        for part in content:
            inner = flattened(part)
            parts += inner[1] if inner[0] == "Concat" else () if inner[0] in ("Empty", "UserHyperparams") else (inner,)
        return parts[0] if len(parts) == 1 else ("Concat", tuple(parts))
    if kind == "Residual":
        return ("Residual", flattened(content))
    return (kind, content)


def published(program: Program) -> dict[str, Value]:
    """Return what ``UserHyperparams`` modules of a program publish, by name; later ones win."""
    kind, content = program
    if kind == "Concat":
        return {name: value for part in content for name, value in published(part).items()}
    if kind == "Residual":
        return published(content)
    return dict(content) if kind == "UserHyperparams" else {}


def _shape_after(kind: str, values: dict[str, Value], shape: Shape, at: str) -> Shape:
    if kind == "Affine":
        return (_whole(values["units"]),)
    if kind not in MAPS_ONLY:
        return shape
    window, stride = _whole(values["size"]), _whole(values["stride"])
    sides = tuple(window_output(side, window, stride, str(values["padding"])) for side in shape[1:])
    if min(sides) < 1:
        raise DeadEnd(at, f"a window of {window} does not fit into {shape[1:]} without padding")
    return (_whole(values["filters"]) if kind == "Conv2D" else shape[0], *sides)


def _basic(name: str, **hyperparameters: Sequence[Value]) -> Basic:
    frozen = []
    for key, options in hyperparameters.items():
        values = tuple(frozen_value(value, f"{name}.{key}") for value in options)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}.{key}", list(options), allowed="at least one value, all different")
        frozen.append((key, values))
    return Basic(name, tuple(frozen))


def _pooling(name: str, windows: Sequence[int], strides: Sequence[int], paddings: Sequence[str]) -> Basic:
    return _basic(
        name,
        size=_counts(windows, f"{name}.windows"),
        stride=_counts(strides, f"{name}.strides"),
        padding=_paddings(paddings),
    )


def _slot(path: str, options: tuple[Value, ...], group: str) -> Iterator[Slot]:
    if len(options) > 1:
        yield Slot(path, Categorical(options), group, None)


def _labelled(modules: Sequence[Module]) -> list[tuple[str, Module]]:
    return [(f"{index}-{module.kind}", module) for index, module in enumerate(modules)]


def _below(at: str, name: str) -> str:
    return f"{at}/{name}" if at else name


def _several(modules: Sequence[Module], kind: str) -> tuple[Module, ...]:
    if not modules or not all(isinstance(module, Module) for module in modules):
        raise UserError(f"{kind}.modules", list(modules), allowed="at least one module, in a list")
    return tuple(modules)


def _counts(values: Sequence[int], field: str) -> tuple[int, ...]:
    if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise UserError(field, list(values), allowed="at least one integer, all from 1")
    return tuple(values)


def _paddings(values: Sequence[str]) -> tuple[str, ...]:
    if not values or any(value not in ("SAME", "VALID") for value in values):
        raise UserError("padding", list(values), allowed="'SAME', 'VALID' or both")
    return tuple(values)


def _initialisers(values: Sequence[str]) -> tuple[str, ...]:
    known = ("kaiming", "xavier", "normal")
    if not values or any(value not in known for value in values):
        raise UserError("initialiser", list(values), allowed=f"some of {list(known)}")
    return tuple(values)


def _whole(value: Value) -> int:
    assert isinstance(value, int)
    return value

"""The space of a module expression (``archsmith.space.modules``): its decision stream, size, encodings and programs."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from archsmith.space.architecture import Architecture
from archsmith.space.base import EncodingKind, Invalid, Space, completed_walks, sample_by_decisions
from archsmith.space.deciders import Decide, Exactly, checked
from archsmith.space.encoding import Encoding
from archsmith.space.modules import Module, Program, Shape, Specified, flattened, program_names, published
from archsmith.space.options import Interval, Options
from archsmith.space.values import Value

COUNTED = 100_000
"""Largest number of candidates that are walked to count those that fit."""


class ModuleSpace(Space):
    """The networks of an expression for one input shape.

    Args:
        name: Name of the space.
        module: The expression.
        shape: Shape of one input example: (C, H, W), or (N,).

    Sampling is uniform over the offered values at every decision, hence *not* uniform over networks (the paper's random
    search). Networks that differ only in nesting or empty modules have equal ``network_digest``.
    """

    def __init__(self, name: str, module: Module, shape: Shape) -> None:
        self.name = name
        self.module = module
        self.shape = shape

    def walk(self, decide: Decide) -> Architecture:
        """Specify the expression; decisions with a single value are not asked for."""
        return self._walked(decide)[0]

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return a sample, uniform at every decision by itself."""
        return sample_by_decisions(self, rng)

    @cached_property
    def size(self) -> int | float:
        """Number of ways to specify the expression: exact unless windows may not fit (see ``size_is_exact``)."""
        if self.module.always_fits or self.module.size > COUNTED:
            return self.module.size
        return sum(1 for _ in completed_walks(self.walk))

    @property
    def size_is_exact(self) -> bool:
        """Whether ``size`` is exact; if not it also counts networks whose windows do not fit."""
        return self.module.always_fits or self.module.size <= COUNTED

    def adjacent(self, path: str, value: Value, options: Options) -> list[Value]:
        """Return all other options."""
        assert not isinstance(options, Interval)
        return [option for option in options if option != value]

    def encode(self, architecture: Architecture, kind: EncodingKind) -> np.ndarray:
        """Return a vector with columns for every decision that could ever be asked for."""
        return np.asarray(self._encoding.encode([self.validate(architecture)], kind)[0])

    def decode(self, kind: EncodingKind, array: np.ndarray) -> Architecture | Invalid:
        """Return the architecture of a vector; the path encoding forgets the order of modules and rarely decodes."""
        decisions = self._encoding.decode(kind, array)
        if isinstance(decisions, Invalid):
            return decisions
        if not self.contains(decisions):
            return Invalid("these decisions do not belong together")
        return self.validate(decisions)

    def program(self, architecture: Architecture) -> Program:
        """Return the specified network of a valid architecture.

        Raises:
            UserError: The architecture is not valid.
        """
        return self._walked(Exactly(self.validate(architecture)))[1].program

    def output_shape(self, architecture: Architecture) -> Shape:
        """Return the shape of one output example."""
        return self._walked(Exactly(self.validate(architecture)))[1].shape

    def tokens(self, architecture: Architecture) -> list[str]:
        """Return the names of the network's modules in order: the "model string" of surrogates."""
        return program_names(self.program(architecture))

    def published(self, architecture: Architecture) -> dict[str, Value]:
        """Return the values that ``UserHyperparams`` modules publish for the evaluator."""
        return published(self.program(architecture))

    @cached_property
    def _encoding(self) -> Encoding:
        return Encoding(list(self.module.slots("")))

    def _walked(self, decide: Decide) -> tuple[Architecture, Specified]:
        decisions: dict[str, Value] = {}

        def ask(path: str, options: tuple[Value, ...], group: str) -> Value:
            if len(options) == 1:
                return options[0]
            decisions[path] = checked(decide, path, options, None, group)
            return decisions[path]

        specified = self.module.walk(ask, "", self.shape)
        made = Architecture.of_valid(decisions, space=self.name, canonical=self._canonical)
        return made, specified

    def _canonical(self, architecture: Architecture) -> object:
        _, specified = self._walked(Exactly(architecture))
        return [flattened(specified.program), sorted(published(specified.program).items())]

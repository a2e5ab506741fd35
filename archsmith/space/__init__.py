"""The language of choices: dimensions, spaces, architectures, budgets, trials and results. No torch.

Dimensions: ``Categorical``, ``Ordinal``, ``Count``, ``Real``, ``Subset``.

Spaces: ``ProductSpace`` of named elements (dimensions, ``Group``, ``Repeat``, ``Given`` a condition ``When``, ``Has``,
``AllOf``, ``AnyOf``, ``Not``) under constraints (``AtLeast``, ``AtMost``, ``Linear``, ``Predicate``). ``Space`` is the
protocol that any walkable space keeps; ``DeadEnd`` says that a walk cannot go on; ``Invalid`` is what ``decode``
returns for an array without an architecture.

Deciders: ``Uniform``, ``Replay``, ``Exactly``, ``Crossover``, ``Recording``, ``first_allowed``; protocol ``Decide``.

Values: ``Architecture``, ``Trial``, ``Result``, ``Objective``, ``Budget`` with ``Limit`` and ``Violation``;
``pareto_front``, ``non_dominated``, ``dominates`` and ``hypervolume_of``
compare results (on arrays: ``archsmith.space.hypervolume``).

Example:
    >>> import numpy as np
    >>> kernel = Given(When("op", "conv"), Ordinal([3, 5]))
    >>> space = ProductSpace("toy", {"op": Categorical(["conv", "pool"]), "op/kernel": kernel})
    >>> space.size
    3
    >>> architecture = space.sample(np.random.default_rng(0))
    >>> space.decode("one-hot", space.encode(architecture, "one-hot")) == architecture
    True
"""

from archsmith.space.architecture import Architecture
from archsmith.space.base import EncodingKind, Invalid, Space, sample_by_decisions
from archsmith.space.budget import COSTS, Budget, Limit, Violation
from archsmith.space.conditions import AllOf, AnyOf, Condition, Has, Not, When
from archsmith.space.constraints import AtLeast, AtMost, Linear, Predicate
from archsmith.space.deciders import (
    Crossover,
    DeadEnd,
    Decide,
    Decision,
    Exactly,
    Mask,
    Recording,
    Replay,
    Uniform,
    first_allowed,
)
from archsmith.space.dimensions import Categorical, Count, Dimension, Ordinal, Real, Subset
from archsmith.space.elements import Element, Given, Group, Repeat
from archsmith.space.genotypes import Genotypes
from archsmith.space.hypervolume import Hypervolume, hypervolume_of
from archsmith.space.options import Interval, Options
from archsmith.space.pareto import dominates, non_dominated, pareto_front
from archsmith.space.product import ProductSpace
from archsmith.space.trial import Objective, Result, Trial
from archsmith.space.values import FrozenDict, Value

__all__ = [
    "COSTS",
    "AllOf",
    "AnyOf",
    "Architecture",
    "AtLeast",
    "AtMost",
    "Budget",
    "Categorical",
    "Condition",
    "Count",
    "Crossover",
    "DeadEnd",
    "Decide",
    "Decision",
    "Dimension",
    "Element",
    "EncodingKind",
    "Exactly",
    "FrozenDict",
    "Genotypes",
    "Given",
    "Group",
    "Has",
    "Hypervolume",
    "Interval",
    "Invalid",
    "Limit",
    "Linear",
    "Mask",
    "Not",
    "Objective",
    "Options",
    "Ordinal",
    "Predicate",
    "ProductSpace",
    "Real",
    "Recording",
    "Repeat",
    "Replay",
    "Result",
    "Space",
    "Subset",
    "Trial",
    "Uniform",
    "Value",
    "Violation",
    "When",
    "dominates",
    "first_allowed",
    "hypervolume_of",
    "non_dominated",
    "pareto_front",
    "sample_by_decisions",
]

"""The shipped contract of a space, attached to example spaces of every kind."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

from archsmith.space import (
    AllOf,
    Architecture,
    AtLeast,
    AtMost,
    Categorical,
    Count,
    DeadEnd,
    EncodingKind,
    Given,
    Group,
    Has,
    Invalid,
    JointSpace,
    Linear,
    Not,
    Ordinal,
    Predicate,
    ProductSpace,
    Real,
    Repeat,
    Space,
    Subset,
    When,
    sample_by_decisions,
)
from archsmith.space.deciders import Decide, checked
from archsmith.space.options import Options
from archsmith.space.values import Value
from archsmith.testing.space import SpaceContract


def cells() -> ProductSpace:
    """Six edges with five operators: the flat space of a tabular benchmark, at three operators for enumeration."""
    return ProductSpace("cells", {f"edge/{i}": Categorical(["none", "skip", "conv"]) for i in range(4)})


def mobile(*, blocks: int = 21, widest: int = 1152) -> ProductSpace:
    """Atom counts per kernel size and block; every third block has no residual and must keep an atom."""
    elements = {f"blocks/{b}/k{k}": Count(0, widest) for b in range(blocks) for k in (3, 5, 7)}
    constraints = [AtLeast([f"blocks/{b}/k{k}" for k in (3, 5, 7)], 1) for b in range(0, blocks, 3)]
    return ProductSpace("mobile", elements, constraints=constraints)


def deep() -> ProductSpace:
    """Depth is a choice; kernels exist only for convolutions; the widths add up to at most 6."""
    layer = {
        "op": Categorical(["conv", "pool"]),
        "kernel": Given(When("op", "conv"), Ordinal([3, 5])),
        "width": Count(1, 4),
    }
    return ProductSpace("deep", {"net": Repeat(Count(0, 3), layer)}, constraints=[AtMost(["net/*/width"], 6)])


def recipe() -> ProductSpace:
    """Reals, a subset and conditions on its members."""
    return ProductSpace(
        "recipe",
        {
            "optimiser": Categorical(["sgd", "rmsprop"]),
            "lr": Real(1e-4, 1.0, log=True),
            "momentum": Given(When("optimiser", ["sgd"]), Real(0.0, 0.99)),
            "augment": Subset(["crop", "flip", "cutout"], minimum=1),
            "augment/size": Given(
                AllOf((Has("augment", "cutout"), Not(When("optimiser", "rmsprop")))), Count(4, 16, 4)
            ),
        },
    )


class TestFlat(SpaceContract):
    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        return cells()


class TestMobile(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return mobile(blocks=9, widest=72)


class TestAtLeastOne(SpaceContract):
    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        return mobile(blocks=1, widest=4)


class TestDepth(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return deep()


class TestSmallDepth(SpaceContract):
    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        body = Group({"k": Subset([3, 5, 7]), "wide": Given(Has("k", 5), Categorical([False, True]))})
        return ProductSpace("small-depth", {"net": Repeat(Count(0, 2), body)})


class TestFixedSum(SpaceContract):
    """No architecture has a valid one that differs in a single decision."""

    uniform = True
    single_changes = False

    @pytest.fixture
    def space(self) -> Space:
        return ProductSpace(
            "sum",
            {f"w{i}": Count(0, 6, 2) for i in range(3)},
            constraints=[Linear({"w0": 1, "w1": 1, "w2": 1}, low=6, high=6)],
        )


class TestPredicate(SpaceContract):
    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        def rises(decisions: object) -> bool:
            assert isinstance(decisions, Architecture)
            widths = [value for value in decisions.values() if isinstance(value, int)]
            return all(a <= b for a, b in pairwise(widths))

        elements = {f"w{i}": Ordinal([8, 16, 24]) for i in range(4)}
        return ProductSpace("rising", elements, constraints=[Predicate("widths never fall", rises)])


class TestReals(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return recipe()


class TestJoint(SpaceContract):
    """A policy beside a space, for layers of which one hangs on the depth."""

    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        main = ProductSpace("net", {"depth": Ordinal([1, 2]), "width": Given(When("depth", 2), Ordinal([8, 16]))})
        sites = {"first": None, "second": When("depth", 2)}
        return JointSpace(main, sites, schemes=("symmetric", "asymmetric"))


class TestSideSpace(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return deep().with_side("recipe", recipe())


class TestFloatSum(SpaceContract):
    """A real number in a linear constraint cannot be counted: decision by decision, with rejection."""

    @pytest.fixture
    def space(self) -> Space:
        elements = {"a": Real(0.0, 1.0), "b": Real(0.0, 1.0), "c": Count(0, 3)}
        return ProductSpace("floats", elements, constraints=[Linear({"a": 1.5, "b": 1, "c": 0.1}, low=1.0, high=2.0)])


class Chain(Space):
    """A walk no product can describe: each answer decides what is asked next. A stand-in for grammars."""

    name = "chain"

    def walk(self, decide: Decide) -> Architecture:
        decisions: dict[str, Value] = {}
        path, last = "root", ""
        for _ in range(4):
            options = ("stop", "conv", "pool")
            mask = np.array([True, True, last != "pool"])  # never two pools in a row
            decisions[path] = checked(decide, path, options, mask, "rule")
            last = str(decisions[path])
            if last == "stop":
                break
            path += f"/{last}"
        if last == "pool":
            raise DeadEnd("", "a chain must not end with a pool")
        return Architecture(decisions, space=self.name)

    def sample(self, rng: np.random.Generator) -> Architecture:
        return sample_by_decisions(self, rng)

    @property
    def size(self) -> int:
        # c(n), p(n): endings with n questions left after a conv, a pool. c(n) = 1 + c(n-1) + p(n-1), p(n) = 1 + c(n-1),
        # c(0) = 1, p(0) = 0. So c = 1, 2, 5, 9, 16.
        return 16

    def adjacent(self, path: str, value: Value, options: Options) -> list[Value]:
        return [other for other in ("stop", "conv", "pool") if other != value]

    def encode(self, architecture: Architecture, kind: EncodingKind) -> np.ndarray:
        raise NotImplementedError

    def decode(self, kind: EncodingKind, array: np.ndarray) -> Architecture | Invalid:
        raise NotImplementedError


class TestAnyWalk(SpaceContract):
    lossless: ClassVar[tuple[EncodingKind, ...]] = ()

    @pytest.fixture
    def space(self) -> Space:
        return Chain()

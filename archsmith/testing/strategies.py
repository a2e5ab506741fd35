"""The contract of a strategy: inherit ``StrategyContract`` in a test file and override ``make``.

Each check drives the strategy on the example spaces (flat, conditional and repeated, with a predicate, with real
numbers, and a walk that is no product) against a toy landscape that needs no training. Results come late, out of
order, failed, infeasible and NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.space import (
    Architecture,
    AtMost,
    Categorical,
    Count,
    DeadEnd,
    Decide,
    Element,
    EncodingKind,
    Given,
    Interval,
    Invalid,
    Options,
    Ordinal,
    Predicate,
    ProductSpace,
    Real,
    Repeat,
    Result,
    Space,
    Subset,
    Trial,
    Value,
    When,
    sample_by_decisions,
)
from archsmith.space.deciders import checked, option_index
from archsmith.space.options import option_count
from archsmith.strategies.base import Strategy
from archsmith.strategies.random import RandomSearch

# -------------------------------------------------------------------------------------------------- example spaces


def flat_space() -> ProductSpace:
    """Eight independent choices of one of five: 390,625 architectures."""
    return ProductSpace("flat", {f"edge/{i}": Categorical(tuple("abcde"), group="edge") for i in range(8)})


def small_space() -> ProductSpace:
    """Three choices of one of three: 27 architectures, soon through."""
    return ProductSpace("small", {f"x{i}": Categorical(("a", "b", "c")) for i in range(3)})


def deep_space() -> ProductSpace:
    """Depth is a choice, kernels exist for convolutions only, and the widths add up to at most 6."""
    layer: dict[str, Element] = {
        "op": Categorical(("conv", "pool")),
        "kernel": Given(When("op", "conv"), Ordinal((3, 5, 7))),
        "width": Count(1, 4),
    }
    return ProductSpace("deep", {"net": Repeat(Count(0, 3), layer)}, constraints=[AtMost(["net/*/width"], 6)])


def rising_space() -> ProductSpace:
    """Widths that never fall: a predicate that rejects most walks."""

    def rises(decisions: Any) -> bool:
        return all(a <= b for a, b in pairwise(decisions.values()))

    elements = {f"w{i}": Ordinal((8, 16, 24, 32)) for i in range(4)}
    return ProductSpace("rising", elements, constraints=[Predicate("widths never fall", rises)])


def recipe_space() -> ProductSpace:
    """Real numbers, one of them conditional, a subset and a long range."""
    return ProductSpace(
        "recipe",
        {
            "optimiser": Categorical(("sgd", "rmsprop")),
            "lr": Real(1e-4, 1.0, log=True),
            "momentum": Given(When("optimiser", "sgd"), Real(0.0, 0.99)),
            "augment": Subset(("crop", "flip", "cutout"), minimum=1),
            "steps": Count(1, 100_000),
        },
    )


class ChainSpace(Space):
    """A walk no product can describe: each answer decides what is asked next, and some walks end dead."""

    name = "chain"
    length: ClassVar[int] = 4

    def walk(self, decide: Decide) -> Architecture:
        """Append a layer until "stop"; never two pools in a row, never a pool last."""
        decisions: dict[str, Value] = {}
        path, last = "root", ""
        for _ in range(self.length):
            options = ("stop", "conv", "pool")
            mask = np.array([True, True, last != "pool"])
            decisions[path] = checked(decide, path, options, mask, "rule")
            last = str(decisions[path])
            if last == "stop":
                break
            path += f"/{last}"
        if last == "pool":
            raise DeadEnd("", "a chain must not end with a pool")
        return Architecture(decisions, space=self.name)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Return a sample, decision by decision."""
        return sample_by_decisions(self, rng)

    @property
    def size(self) -> int:
        """Number of architectures, counted by hand: endings c = 1, 2, 5, 9, 16 after a convolution."""
        return 16

    def adjacent(self, path: str, value: Value, options: Options) -> list[Value]:
        """Return the other rules."""
        return [other for other in ("stop", "conv", "pool") if other != value]

    def encode(self, architecture: Architecture, kind: EncodingKind) -> np.ndarray:
        """Refuse: chains have no fixed length."""
        raise NotImplementedError

    def decode(self, kind: EncodingKind, array: np.ndarray) -> Architecture | Invalid:
        """Refuse: chains have no fixed length."""
        raise NotImplementedError


EXAMPLE_SPACES: dict[str, Callable[[], Space]] = {
    "flat": flat_space,
    "small": small_space,
    "deep": deep_space,
    "rising": rising_space,
    "recipe": recipe_space,
    "chain": ChainSpace,
}

# ------------------------------------------------------------------------------------------------- a toy landscape


def toy_score(space: Space, architecture: Architecture) -> float:
    """Return how near the decisions are to a hidden target, in percent: an additive landscape with one summit."""
    trace = space.trace(architecture)
    if not trace:
        return 0.0
    return 100.0 * float(np.mean([_nearness(d.path, d.options, d.choice) for d in trace]))


def _nearness(path: str, options: Options, choice: Value) -> float:
    target = seed_of(0, "target", path) / 2**63
    if isinstance(options, Interval):
        assert isinstance(choice, float)
        return 1.0 - abs(options.fraction(choice) - target)
    count = int(option_count(options))
    index = option_index(choice, options)
    assert index is not None
    if isinstance(options, range):
        return 1.0 - abs(index / max(count - 1, 1) - target)
    return float(index == int(target * count))


def toy_result(space: Space, trial: Trial, *, full: float | None = None, trouble: bool = False) -> Result:
    """Return the result of a trial on the toy landscape.

    Args:
        space: The trial's space.
        trial: What to evaluate. Below full fidelity the score has an error that depends on the architecture.
        full: The fidelity that is a full evaluation; ``None`` is full too.
        trouble: Whether about every fourth architecture is failed, infeasible or NaN.
    """
    number = int(trial.architecture.digest[:8], 16)
    if trouble and number % 12 in (0, 1, 2):
        return (Result.failed("crashed"), Result.infeasible("too large"), Result(metrics={"valid_accuracy": math.nan}))[
            number % 12
        ]
    score = toy_score(space, trial.architecture)
    if trial.fidelity is not None and trial.fidelity != full:
        score += (number // 12 % 1000) / 100 - 5
    costs = {"params": float(len(trial.architecture) + number % 5)}
    return Result(metrics={"valid_accuracy": score}, costs=costs, seconds=1.0)


def drive(
    strategy: Strategy,
    rounds: Sequence[int],
    *,
    trouble: bool = True,
    order: np.random.Generator | None = None,
    full: float | None = None,
) -> list[Trial]:
    """Ask ``rounds[i]`` trials in round i and tell about half of what is pending after each; return all that was asked.

    Args:
        strategy: Driven as it stands.
        rounds: How many to ask for, round by round.
        trouble: See ``toy_result``.
        order: Draws which pending trials are told, in which order; without it the oldest half, in order.
        full: See ``toy_result``.
    """
    asked: list[Trial] = []
    for n in rounds:
        trials = strategy.ask(n)
        asked += trials
        pending = list(strategy.pending.values())
        if order is not None:
            pending = [pending[int(i)] for i in order.permutation(len(pending))]
        # Those that got less than they asked for are waiting for results: give them all.
        for trial in pending if len(trials) < n else pending[: (len(pending) + 1) // 2]:
            strategy.tell(trial.id, toy_result(strategy.space, trial, full=full, trouble=trouble))
    return asked


def through_json(state: Any) -> Any:
    """Return the state as it comes back from a file; raises ``ValueError`` when it holds a NaN or an infinity."""
    return json.loads(json.dumps(state, allow_nan=False))


def as_json(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the trials as JSON, to be compared exactly."""
    return [trial.to_json() for trial in trials]


# ------------------------------------------------------------------------------------------------------ the contract


class StrategyContract:
    """Laws of ``archsmith.strategies.base.Strategy``; override ``make``, and the class attributes where it differs."""

    spaces: ClassVar[tuple[str, ...]] = tuple(EXAMPLE_SPACES)
    """Names of the example spaces that the strategy takes."""

    rounds: ClassVar[tuple[int, ...]] = (1, 3, 2, 1, 4, 1, 2, 5, 1, 1, 3, 2)
    """How many trials each round of the checks asks for."""

    beats_random: ClassVar[bool] = True
    """Whether the best of a short search on the flat landscape has to be better than random search's."""

    full_fidelity: ClassVar[float | None] = None
    """What the strategy's trials carry as fidelity where they mean a full evaluation, if not None."""

    evaluations: ClassVar[int] = 120
    """Trials of the comparison with random search."""

    seeds: ClassVar[int] = 6
    """Searches of the comparison with random search."""

    least_gain: ClassVar[float] = 100 / 8
    """By how much the best of a search must exceed random search's, in percent: one of the eight decisions."""

    def make(self, space: Space, seed: int) -> Strategy:
        """Return the strategy under test, with the default objective among its objectives."""
        raise NotImplementedError("override 'make'")

    @pytest.fixture
    def space(self, request: pytest.FixtureRequest) -> Space:
        """Return one of ``spaces``."""
        return EXAMPLE_SPACES[request.param]()

    def driven(self, strategy: Strategy, rounds: Sequence[int], **options: Any) -> list[Trial]:
        """Drive the strategy with its own full fidelity."""
        return drive(strategy, rounds, full=self.full_fidelity, **options)

    def test_same_seed_same_stream(self, space: Space) -> None:
        """Two strategies with one seed ask the same, another seed asks something else."""
        first, again, other = (self.driven(self.make(space, seed), self.rounds) for seed in (5, 5, 6))
        assert as_json(first) == as_json(again)
        assert first, "the strategy asked for nothing"
        if type(self.make(space, 0)).learns:
            assert as_json(first) != as_json(other)

    @pytest.mark.parametrize("seed", [1, 2])
    def test_resume_equals_uninterrupted(self, space: Space, seed: int) -> None:
        """State through JSON text, at random rounds with trials pending, changes nothing that follows."""
        points = np.random.default_rng(seed).permutation(len(self.rounds) - 2)[:2] + 1
        whole = self.make(space, seed)
        orders = np.random.default_rng(seed)
        asked = self.driven(whole, self.rounds, order=orders)
        orders = np.random.default_rng(seed)
        current, resumed = self.make(space, seed), list[Trial]()
        for i, n in enumerate(self.rounds):
            if i in points:
                state = through_json(current.state_dict())
                current = self.make(space, seed)
                current.load_state_dict(state)
                assert through_json(current.state_dict()) == state
            resumed += self.driven(current, [n], order=orders)
        assert as_json(resumed) == as_json(asked)
        assert through_json(current.state_dict()) == through_json(whole.state_dict())

    def test_state_does_not_share_with_the_strategy(self, space: Space) -> None:
        """A state taken earlier is not changed by what happens afterwards."""
        strategy = self.make(space, 3)
        self.driven(strategy, self.rounds[:4])
        state = strategy.state_dict()
        text = json.dumps(state)
        self.driven(strategy, self.rounds[4:])
        assert json.dumps(state) == text

    def test_only_valid_architectures(self, space: Space) -> None:
        """Whatever comes of the trials, what is asked next is a point of the space."""
        for trial in self.driven(self.make(space, 7), self.rounds, order=np.random.default_rng(7)):
            assert space.contains(trial.architecture), dict(trial.architecture)
            assert trial.parent is None or 1 <= trial.parent < trial.id

    def test_ids_are_consecutive(self, space: Space) -> None:
        """Trials are numbered from 1 in the order of ``ask``, and their seeds differ."""
        asked = self.driven(self.make(space, 8), self.rounds)
        assert [trial.id for trial in asked] == list(range(1, len(asked) + 1))
        assert len({trial.seed for trial in asked}) == len(asked)

    def test_no_repeats_where_promised(self, space: Space) -> None:
        """No architecture twice at one fidelity, also with trials pending and after a resume."""
        strategy = self.make(space, 9)
        if strategy.repeats:
            return
        asked = self.driven(strategy, self.rounds, order=np.random.default_rng(9))
        state = through_json(strategy.state_dict())
        strategy = self.make(space, 9)
        strategy.load_state_dict(state)
        asked += self.driven(strategy, self.rounds)
        keys = [(trial.architecture.digest, trial.fidelity) for trial in asked]
        assert len(set(keys)) == len(keys)

    def test_a_batch_is_many_single_asks(self, space: Space) -> None:
        """``ask(n)`` is the same as asking n times, as long as nothing is told between."""
        batch, single = self.make(space, 11), self.make(space, 11)
        for n in self.rounds[:6]:
            together = batch.ask(n)
            apart = [trial for _ in range(n) for trial in single.ask()]
            assert as_json(together) == as_json(apart)
            for trial in together:
                for strategy in (batch, single):
                    strategy.tell(trial.id, toy_result(space, trial, full=self.full_fidelity))

    def test_every_trial_may_fail(self, space: Space) -> None:
        """A search in which nothing works goes on asking, or ends."""
        strategy = self.make(space, 12)
        for n in self.rounds:
            trials = strategy.ask(n)
            assert trials or strategy.done
            for trial in trials:
                strategy.tell(trial.id, Result.failed("crashed"))

    def test_infinite_metrics_do_no_harm(self, space: Space) -> None:
        """Infinities among the results leave the strategy valid, and its state strict JSON."""
        strategy = self.make(space, 13)
        for value in (math.inf, 1.0, -math.inf, 2.0, math.nan, 3.0, math.inf, 0.0):
            for trial in strategy.ask(2):
                strategy.tell(trial.id, Result(metrics={"valid_accuracy": value}, costs={"params": 1.0}))
        through_json(strategy.state_dict())
        assert all(space.contains(trial.architecture) for trial in strategy.ask(3))

    def test_errors_name_the_trial(self, space: Space) -> None:
        """A trial that was never asked, or was told already, and a bad ``n`` are refused."""
        strategy = self.make(space, 14)
        trial = strategy.ask()[0]
        with pytest.raises(UserError, match="never asked"):
            strategy.tell(trial.id + 1_000_000, Result.failed("crashed"))
        strategy.tell(trial.id, toy_result(space, trial))
        with pytest.raises(UserError, match="told already"):
            strategy.tell(trial.id, toy_result(space, trial))
        for n in (0, -1, 1.5, True):
            with pytest.raises(UserError, match="an integer from 1"):
                strategy.ask(n)  # type: ignore[arg-type]

    def test_foreign_states_are_refused(self, space: Space) -> None:
        """Another strategy's state, and a newer version's, are errors that say so."""
        strategy = self.make(space, 15)
        with pytest.raises(UserError, match=r"state\.kind"):
            strategy.load_state_dict({**strategy.state_dict(), "kind": "Other"})
        with pytest.raises(UserError, match=r"state\.version"):
            strategy.load_state_dict({**strategy.state_dict(), "version": 999})

    def test_beats_random_search_where_it_learns(self) -> None:
        """On the flat toy landscape the best of a search is better than random search's at the same cost.

        The number of searches is fixed; the mean difference has to exceed two standard errors and ``least_gain``.
        """
        space = flat_space()
        if not (type(self.make(space, 0)).learns and self.beats_random):
            return
        gains: list[float] = []
        for seed in range(self.seeds):
            best, cost = self._searched(self.make(space, seed))
            random_best, _ = self._searched(RandomSearch(space, seed=seed), math.ceil(cost))
            gains.append(best - random_best)
        error = float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
        assert np.mean(gains) > max(2 * error, self.least_gain), (np.mean(gains), error)

    def _searched(self, strategy: Strategy, evaluations: int | None = None) -> tuple[float, float]:
        """Return the best full score of a sequential search, and what it cost in full evaluations."""
        best, cost = 0.0, 0.0
        for _ in range(self.evaluations if evaluations is None else evaluations):
            for trial in strategy.ask():
                result = toy_result(strategy.space, trial, full=self.full_fidelity)
                strategy.tell(trial.id, result)
                whole = trial.fidelity is None or trial.fidelity == self.full_fidelity
                cost += 1.0 if whole or not self.full_fidelity else float(trial.fidelity or 0) / self.full_fidelity
                if whole:
                    best = max(best, result.metrics["valid_accuracy"])
        return best, cost


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the checks that take ``space`` on every space of the class; import this name into the test file."""
    if "space" in metafunc.fixturenames and metafunc.cls is not None and issubclass(metafunc.cls, StrategyContract):
        metafunc.parametrize("space", metafunc.cls.spaces, indirect=True)

"""The shipped contract of a strategy, attached to every strategy of the room."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path

import pytest

import archsmith.strategies
from archsmith.families.densenet_space import DenseSpace
from archsmith.families.plain_space import PlainSpace
from archsmith.predictors import Ensemble, Predictor, Ridge
from archsmith.predictors.boshnas import BoshnasSurrogate
from archsmith.space import Budget, Objective, Space
from archsmith.space.formulations import FeasibleFirst, Lagrangian, at_most
from archsmith.space.growing import GrowingSpace
from archsmith.strategies import DEFAULT_OBJECTIVE, Strategy, strategy_table
from archsmith.strategies.bayes import GaussianProcessSearch, TpeSearch
from archsmith.strategies.bohb import Bohb
from archsmith.strategies.boshnas import Boshnas
from archsmith.strategies.coarse_to_fine import CoarseToFine
from archsmith.strategies.eas import Eas
from archsmith.strategies.evolution import RegularizedEvolution
from archsmith.strategies.grid import GridSearch
from archsmith.strategies.halving import Hyperband, SuccessiveHalving, geometric_fidelities
from archsmith.strategies.inner_search import Drawn, Evolution
from archsmith.strategies.linas import MeasureRefitSearch
from archsmith.strategies.local import LocalSearch
from archsmith.strategies.mcts import MonteCarloTreeSearch
from archsmith.strategies.nsga2 import Nsga2
from archsmith.strategies.ppo import PPO, ReinforceController
from archsmith.strategies.predictor_guided import PredictorGuided
from archsmith.strategies.random import RandomSearch
from archsmith.strategies.reinforce import Reinforce
from archsmith.strategies.scalarised import Scalarised
from archsmith.strategies.smbo import SurrogateSearch
from archsmith.testing.strategies import EXAMPLE_SPACES, StrategyContract, pytest_generate_tests

__all__ = ["pytest_generate_tests"]


class TestRandom(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return RandomSearch(space, seed=seed)


class TestRandomUnique(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return RandomSearch(space, seed=seed, unique=True)


class TestRegularizedEvolution(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return RegularizedEvolution(space, seed=seed, population=10, tournament=3)


class TestElitistEvolution(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return RegularizedEvolution(space, seed=seed, population=8, tournament=4, replacement=False, drop="worst")


class TestReinforce(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return Reinforce(space, seed=seed, learning_rate=0.3, entropy_weight=0.01)


class TestTreeSearch(StrategyContract):
    spaces = ("flat", "small", "deep", "rising", "chain")  # no tree of decisions lists real numbers
    beats_random = False  # in the mean of what it evaluates, which test_mcts checks; its best values are nearly tied

    def make(self, space: Space, seed: int) -> Strategy:
        return MonteCarloTreeSearch(space, seed=seed, reward_range=(0, 100))


class TestBisectedTreeSearch(TestTreeSearch):
    beats_random = True

    def make(self, space: Space, seed: int) -> Strategy:
        return MonteCarloTreeSearch(space, seed=seed, reward_range=(0, 100), exploration=0.1, bisect=True)


class TestPredictorGuided(StrategyContract):
    spaces = ("small", "deep", "recipe", "chain")  # "flat" is searched below, and takes no other way than "deep"
    rounds = (1, 3, 2, 1, 4, 1, 2, 3)
    evaluations = 60
    seeds = 4

    def make(self, space: Space, seed: int) -> Strategy:
        return PredictorGuided(space, seed=seed, initial=5, candidates=20, refit=1.5)


class TestPredictorGuidedBags(StrategyContract):
    """A predictor that takes in nothing between its fits, random acquisition values, and candidates drawn."""

    spaces = ("small",)
    beats_random = False  # three bags of straight lines; it is the frame that is checked here

    def make(self, space: Space, seed: int) -> Strategy:
        def bags(own: int) -> Predictor:
            return Ensemble(lambda each: Ridge(seed=each), members=3, bagging=True, seed=own)

        settings = {"predictor": bags, "acquisition": "thompson", "scaling": "rank", "initial": 5, "whole": 20}
        settings |= {"candidates": 20, "refit": 1.5}
        return PredictorGuided(space, seed=seed, **settings)


class TestSurrogate(StrategyContract):
    beats_random = False  # n-grams forget positions, which are all that counts on the flat landscape; see test_smbo

    def make(self, space: Space, seed: int) -> Strategy:
        return SurrogateSearch(space, seed=seed, candidates=20, penalty=1.0, threshold=1)


class TestBoshnas(StrategyContract):
    spaces = ("small", "deep", "recipe")
    rounds = (1, 3, 2, 1, 4, 1, 2, 3)
    beats_random = False  # with surrogates this short; tests/strategies/test_boshnas.py searches with longer ones

    def make(self, space: Space, seed: int) -> Strategy:
        def surrogate(own: int) -> BoshnasSurrogate:
            return BoshnasSurrogate(epochs=3, seed=own)

        quick = {"starts": 2, "steps": 8, "refit": 1.5, "library": 60}
        return Boshnas(space, seed=seed, initial=5, surrogate=surrogate, **quick)


class TestGrid(StrategyContract):
    spaces = tuple(name for name in EXAMPLE_SPACES if name != "recipe")

    def make(self, space: Space, seed: int) -> Strategy:
        return GridSearch(space, seed=seed)


class TestLocalSearch(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return LocalSearch(space, seed=seed)


class TestFirstImprovement(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return LocalSearch(space, seed=seed, improvement="first", starts=3)


class TestSuccessiveHalving(StrategyContract):
    full_fidelity = 100.0
    evaluations = 400
    least_gain = 8.0  # it learns from short evaluations, not where to look

    def make(self, space: Space, seed: int) -> Strategy:
        return SuccessiveHalving(space, seed=seed, fidelities=(1.0, 10.0, 100.0), width=64, eta=4.0)


class TestHyperband(StrategyContract):
    full_fidelity = 64.0
    evaluations = 400
    least_gain = 4.0  # its later brackets are random search

    def make(self, space: Space, seed: int) -> Strategy:
        fidelities = geometric_fidelities(1.0, 64.0, 4.0)
        return Hyperband(space, seed=seed, fidelities=fidelities, eta=4.0, open_brackets=2)


class TestBohb(StrategyContract):
    full_fidelity = 9.0
    seeds = 4

    def make(self, space: Space, seed: int) -> Strategy:
        return Bohb(space, seed=seed, fidelities=(1.0, 3.0, 9.0), random_fraction=0.1, samples=8)


class TestCoarseToFine(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return CoarseToFine(space, seed=seed, limits=[Budget.parse("params<=9"), Budget.parse("params<=1M")])


class TestNsga2(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        objectives = [DEFAULT_OBJECTIVE, Objective("params", "minimize")]
        return Nsga2(space, objectives=objectives, seed=seed, population=6)


class TestNsga2WithOneObjective(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return Nsga2(space, seed=seed, population=10, constraints=Budget.parse("params<=11"))


class TestMeasureRefitSearch(StrategyContract):
    seeds = 3
    evaluations = 60

    def make(self, space: Space, seed: int) -> Strategy:
        inner = Evolution(population=10, evaluations=40)
        return MeasureRefitSearch(space, seed=seed, batch=4, inner=inner, predictor=lambda own: Ridge(seed=own))


class TestMeasureRefitSearchOfThreeObjectives(StrategyContract):
    """Reference directions inside, and ranks instead of hypervolumes."""

    spaces = ("flat", "small")
    beats_random = False  # in one objective of three; a front is compared in test_linas

    def make(self, space: Space, seed: int) -> Strategy:
        objectives = [DEFAULT_OBJECTIVE, Objective("params", "minimize"), Objective("seconds", "minimize")]
        return MeasureRefitSearch(
            space,
            seed=seed,
            objectives=objectives,
            initial=5,
            batch=3,
            inner=Evolution(population=6, evaluations=30),
            predictor=lambda own: Ridge(seed=own),
            select="rank",
        )


class TestMeasureRefitOnDrawnOnes(StrategyContract):
    spaces = ("deep", "chain")
    beats_random = False  # nothing is bred

    def make(self, space: Space, seed: int) -> Strategy:
        return MeasureRefitSearch(
            space, seed=seed, batch=3, inner=Drawn(evaluations=40), predictor=lambda own: Ridge(seed=own)
        )


class TestTpe(StrategyContract):
    rounds = (1, 3, 2, 1, 4, 1, 2, 3)
    evaluations = 80
    seeds = 3

    def make(self, space: Space, seed: int) -> Strategy:
        return TpeSearch(space, seed=seed, startup=6)


class TestGaussianProcess(StrategyContract):
    spaces = ("deep", "rising")  # the others, and the comparison, are slow evidence below
    rounds = (1, 3, 2, 1, 2, 1)
    beats_random = False

    def make(self, space: Space, seed: int) -> Strategy:
        return GaussianProcessSearch(space, seed=seed, startup=5)


@pytest.mark.slow
class TestGaussianProcessEverywhere(TestGaussianProcess):
    spaces = StrategyContract.spaces
    rounds = (1, 3, 2, 1, 2, 1, 3, 2)
    beats_random = True
    evaluations = 40
    seeds = 4


class TestPPO(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return PPO(space, seed=seed, batch=4, units=16, learning_rate=0.03, updates_per_batch=2)


class TestReinforceController(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        return ReinforceController(space, seed=seed, batch=4, units=16, learning_rate=0.03)


class TestScalarised(StrategyContract):
    def make(self, space: Space, seed: int) -> Strategy:
        problem = FeasibleFirst(objective=Objective("valid_accuracy", reference=0.0), limits=(at_most("params", 99),))
        evolution = partial(RegularizedEvolution, population=10, tournament=3)
        return Scalarised(space, formulation=problem, inner=evolution, seed=seed)


class TestScalarisedWithMovingMultipliers(StrategyContract):
    """Limits that bind: what counts is the state, the best accuracy is not what it searches."""

    beats_random = False

    def make(self, space: Space, seed: int) -> Strategy:
        problem = Lagrangian(objective=Objective("valid_accuracy"), limits=(at_most("params", 9),), rate=5.0)
        return Scalarised(space, formulation=problem, inner=LocalSearch, seed=seed)


class TestEas(StrategyContract):
    """On strings that grow, the only spaces it takes; that it learns is checked in test_eas."""

    spaces = ("plain", "dense")
    beats_random = False

    @pytest.fixture
    def space(self, request: pytest.FixtureRequest) -> Space:
        return PlainSpace(depth=3, longest=13) if request.param == "plain" else DenseSpace(depth=4)

    def make(self, space: Space, seed: int) -> Strategy:
        space = space if isinstance(space, GrowingSpace) else PlainSpace()
        return Eas(space, seed=seed, nets=3, wider=2, deeper=2, reward="plain", units=6, embedding=4)


CASES: dict[str, type[StrategyContract]] = {
    "bohb": TestBohb,
    "boshnas": TestBoshnas,
    "coarse-to-fine": TestCoarseToFine,
    "eas": TestEas,
    "gp": TestGaussianProcess,
    "grid": TestGrid,
    "hyperband": TestHyperband,
    "linas": TestMeasureRefitSearch,
    "local-search": TestLocalSearch,
    "mcts": TestTreeSearch,
    "predictor-guided": TestPredictorGuided,
    "nsga2": TestNsga2,
    "random": TestRandom,
    "regularized-evolution": TestRegularizedEvolution,
    "reinforce": TestReinforce,
    "successive-halving": TestSuccessiveHalving,
    "ppo": TestPPO,
    "reinforce-controller": TestReinforceController,
    "scalarised": TestScalarised,
    "surrogate": TestSurrogate,
    "tpe": TestTpe,
}


def classes_of_the_room() -> set[str]:
    """Return the names of all classes in the room's files that derive from ``Strategy``, by reading, not importing."""
    bases: dict[str, list[str]] = {}
    abstract: set[str] = set()
    for path in Path(archsmith.strategies.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
                if any(isinstance(n, ast.Name) and n.id == "abstractmethod" for n in ast.walk(node)):
                    abstract.add(node.name)
    found = {"Strategy"}
    while more := {name for name, above in bases.items() if found & set(above)} - found:
        found |= more
    return found - abstract - {"Strategy"}


# At collection: a strategy that is not listed, or not checked, stops the suite.
UNLISTED = classes_of_the_room() - {row["class"] for row in strategy_table()}
assert not UNLISTED, f"strategies without a row in a STRATEGIES table: {sorted(UNLISTED)}"
UNCHECKED = {row["name"] for row in strategy_table()} - set(CASES)
assert not UNCHECKED, f"strategies without the contract suite in tests/contracts: {sorted(UNCHECKED)}"


@pytest.mark.parametrize("row", strategy_table(), ids=lambda row: str(row["name"]))
def test_rows_name_their_class(row: dict[str, object]) -> None:
    """Each row of the table leads to the class that its suite checks."""
    case = CASES[str(row["name"])]()
    from archsmith.testing.strategies import flat_space

    assert type(case.make(flat_space(), 0)).__name__ == row["class"]
    assert set(row) == {"name", "class", "title", "paper", "extra", "file"}

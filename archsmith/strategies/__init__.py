"""Strategies: what to evaluate next. Each is deterministic given its seed, resumable by ``state_dict``, without torch.

The contract is ``archsmith.strategies.base.Strategy``; ``archsmith.testing.strategies`` checks it. A file that offers
strategies has a literal ``STRATEGIES = ({"name": ..., "class": ..., "title": ..., "paper": ..., "extra": ...}, ...)``
that can be read without importing it; ``extra`` names the extra to install, or is None.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space import Space
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.bayes import GaussianProcessSearch, TpeSearch
from archsmith.strategies.bohb import Bohb
from archsmith.strategies.coarse_to_fine import CoarseToFine, coarse_grid
from archsmith.strategies.controller import Controller
from archsmith.strategies.distribution import Distribution, UniformDecisions
from archsmith.strategies.eas import Eas, GrowthStage
from archsmith.strategies.evolution import MutateWithin, RegularizedEvolution
from archsmith.strategies.grid import GridSearch
from archsmith.strategies.halving import Hyperband, SuccessiveHalving, geometric_fidelities
from archsmith.strategies.local import LocalSearch
from archsmith.strategies.mcts import MonteCarloTreeSearch
from archsmith.strategies.nsga2 import Nsga2
from archsmith.strategies.policy import TablePolicy
from archsmith.strategies.ppo import PPO, ReinforceController
from archsmith.strategies.predictor_guided import PredictorGuided
from archsmith.strategies.random import RandomSearch
from archsmith.strategies.reinforce import Reinforce
from archsmith.strategies.scalarised import Scalarised
from archsmith.strategies.smbo import SurrogateSearch

__all__ = [
    "DEFAULT_OBJECTIVE",
    "PPO",
    "Bohb",
    "CoarseToFine",
    "Controller",
    "Distribution",
    "Eas",
    "GaussianProcessSearch",
    "GridSearch",
    "GrowthStage",
    "Hyperband",
    "LocalSearch",
    "MonteCarloTreeSearch",
    "MutateWithin",
    "Nsga2",
    "PredictorGuided",
    "Proposal",
    "RandomSearch",
    "RegularizedEvolution",
    "Reinforce",
    "ReinforceController",
    "Scalarised",
    "Strategy",
    "SuccessiveHalving",
    "SurrogateSearch",
    "TablePolicy",
    "TpeSearch",
    "UniformDecisions",
    "coarse_grid",
    "geometric_fidelities",
    "open_strategy",
    "strategy_class",
    "strategy_table",
]


def strategy_table() -> list[dict[str, Any]]:
    """Return one row for each strategy (name, class, title, paper, extra, file), sorted by name, importing none."""
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "STRATEGIES" for target in node.targets
            )
            if named and isinstance(node, ast.Assign):
                rows += [{**row, "file": f"archsmith/strategies/{path.name}"} for row in ast.literal_eval(node.value)]
    return sorted(rows, key=lambda row: str(row["name"]))


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of a strategy by its name in the table.

    Raises:
        UserError: No strategy has this name.
    """
    rows = {row["name"]: row for row in strategy_table()}
    if name not in rows:
        raise UserError("strategy", name, allowed=f"one of {list(rows)}")
    module = importlib.import_module(f"archsmith.strategies.{Path(rows[name]['file']).stem}")
    found: type[Strategy] = getattr(module, rows[name]["class"])
    return found


def open_strategy(name: str, space: Space, **settings: Any) -> Strategy:
    """Return a strategy by its name in the table.

    Args:
        name: "random", "regularized-evolution", ...; ``strategy_table`` lists them.
        space: Where to search.
        settings: Keyword arguments of the class: ``objectives``, ``seed`` and its own.

    Raises:
        UserError: No strategy has this name, it has no such setting, needs one that is not given, or refuses a value.
        MissingExtra: The strategy's optional package is not installed.
    """
    kind = strategy_class(name)
    known = [p for p in inspect.signature(kind.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(settings) - {p.name for p in known}):
        raise UserError(f"settings of {name!r}", unknown, allowed=f"{[p.name for p in known]}")
    if missing := [p.name for p in known if p.default is p.empty and p.name not in settings]:
        raise UserError(f"settings of {name!r}", sorted(settings), allowed=f"settings with {missing}, which it needs")
    return kind(space, **settings)

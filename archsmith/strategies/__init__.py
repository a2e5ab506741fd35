"""Strategies: what to evaluate next. Each is deterministic given its seed, resumable by ``state_dict``, without torch.

The contract is ``archsmith.strategies.base.Strategy``; ``archsmith.testing.strategies`` checks it.
"""

from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.mcts import MonteCarloTreeSearch
from archsmith.strategies.random import RandomSearch
from archsmith.strategies.smbo import SurrogateSearch

__all__ = ["DEFAULT_OBJECTIVE", "MonteCarloTreeSearch", "Proposal", "RandomSearch", "Strategy", "SurrogateSearch"]

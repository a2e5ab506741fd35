"""Monte Carlo tree search (UCT) over the decisions of a space, on the tree as it is or restructured by bisection.

Source: Kocsis and Szepesvari 2006 (UCT); Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792 (search over
architectures, restructured trees).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from archsmith.core.errors import UserError
from archsmith.space import DeadEnd, Objective, Result, Space, Trial
from archsmith.space.base import ATTEMPTS, nothing_valid
from archsmith.space.bisection import Bisected, allowed_indices
from archsmith.space.deciders import Mask
from archsmith.space.options import Interval, Options
from archsmith.space.values import Value
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy

STRATEGIES = (
    {
        "name": "mcts",
        "class": "MonteCarloTreeSearch",
        "title": "Monte Carlo tree search (UCT) on the tree of decisions, plain or bisected",
        "paper": "Kocsis and Szepesvari 2006; for architectures arXiv 1704.08792",
        "extra": None,
    },
)


class Node:
    """A prefix of decisions: how often it was taken and what came of it.

    Attributes:
        visits: Evaluated trials that went through it.
        reward: Sum of their rewards.
        waiting: Trials through it that are not evaluated yet; they count as visits without a reward (virtual loss).
        children: One for each allowed option, None for a leaf.
    """

    __slots__ = ("children", "reward", "visits", "waiting")

    def __init__(self, visits: int = 0, reward: float = 0.0) -> None:
        self.visits = visits
        self.reward = reward
        self.waiting = 0
        self.children: list[Node] | None = None

    def to_json(self) -> list[Any]:
        """Return ``[visits, reward, children or None]``."""
        return [self.visits, self.reward, self.children and [child.to_json() for child in self.children]]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Node:
        """Return the node that ``to_json`` wrote."""
        node = cls(int(data[0]), float(data[1]))
        node.children = data[2] and [cls.from_json(child) for child in data[2]]
        return node


class MonteCarloTreeSearch(Strategy):
    """Descends the tree of decisions by upper confidence bounds, then decides at random.

    Each trial: from the root, choose the child with the largest ``w / n + c sqrt(2 ln N / n)`` (N visits of the parent,
    unvisited children first, ties at random) until a leaf is reached; give the leaf its children; decide uniformly from
    there on (the rollout); when the result is told, add its reward and one visit to the nodes of the tree path, not to
    the rollout's choices. After T results the root has T visits and its children T - 1 in total.

    Args:
        space: Any space whose decisions have finitely many options.
        exploration: c, 0.5 in the paper's experiments.
        bisect: Search the restructured tree: each choice becomes binary questions (``archsmith.space.bisection``).
        reward_range: Values of the objective that become reward 0 and 1; (0, 100) for accuracies in percent. For a
            minimised objective the smaller value gives the larger reward.
        failure: Reward of a failed, infeasible, NaN or infinite result, and of a walk that ends dead.
        enter_child: After giving a leaf its children, also enter one of them at random, so that the root's children
            have T visits in total (the 2019 rewrite of the reference).
        ties: "random", or "first": the lowest index.
        rollout: "uniform", or "first": the first allowed option everywhere.
        objectives: One objective.
        seed: Seed of ties and rollouts.

    Raises:
        UserError: A setting out of its range; on ``ask``, a space with real dimensions.
    """

    def __init__(
        self,
        space: Space,
        *,
        exploration: float = 0.5,
        bisect: bool = False,
        reward_range: tuple[float, float] = (0.0, 1.0),
        failure: float = 0.0,
        enter_child: bool = False,
        ties: Literal["random", "first"] = "random",
        rollout: Literal["uniform", "first"] = "uniform",
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if not exploration >= 0:
            raise UserError("exploration", exploration, allowed="a number from 0")
        if not reward_range[0] < reward_range[1]:
            raise UserError("reward_range", reward_range, allowed="two numbers, the first smaller")
        for name, given, allowed in (("ties", ties, ("random", "first")), ("rollout", rollout, ("uniform", "first"))):
            if given not in allowed:
                raise UserError(name, given, allowed=f"one of {list(allowed)}")
        self.exploration = exploration
        self.bisect = bisect
        self.reward_range = reward_range
        self.failure = failure
        self.enter_child = enter_child
        self.ties = ties
        self.rollout = rollout
        self.root = Node()

    def reward(self, result: Result) -> float:
        """Return the reward of a result; outside [0, 1] when the objective leaves ``reward_range``."""
        value = self.objective.value(result)
        if not math.isfinite(value):
            return self.failure
        low, high = self.reward_range
        share = (value - low) / (high - low)
        return share if self.objective.direction == "maximize" else 1.0 - share

    def _propose(self) -> Proposal:
        reason = ""
        for _ in range(ATTEMPTS):
            descent = _Descent(self)
            try:
                architecture = self.space.walk(Bisected(descent) if self.bisect else descent)
            except DeadEnd as end:
                reason = str(end)
                for node in self._nodes(descent.taken):  # so that the search learns to stay away
                    node.visits += 1
                    node.reward += self.failure
                continue
            for node in self._nodes(descent.taken):
                node.waiting += 1
            return Proposal(architecture, info={"tree_path": descent.taken})
        raise nothing_valid(self.space.name, reason)

    def _learn(self, trial: Trial, result: Result) -> None:
        reward = self.reward(result)
        for node in self._nodes(trial.info["tree_path"]):
            node.waiting -= 1
            node.visits += 1
            node.reward += reward

    def _nodes(self, taken: Sequence[int]) -> list[Node]:
        """Return the nodes of a tree path, the root first."""
        nodes = [self.root]
        for index in taken:
            children = nodes[-1].children
            assert children is not None
            nodes.append(children[index])
        return nodes

    def choose(self, node: Node) -> int:
        """Return the child that UCT enters."""
        assert node.children is not None
        total = node.visits + node.waiting
        scores = [self._score(child, total) for child in node.children]
        best = max(scores)
        tied = [index for index, score in enumerate(scores) if score == best]
        return tied[0] if self.ties == "first" or len(tied) == 1 else tied[int(self.rng.integers(len(tied)))]

    def _score(self, child: Node, total: int) -> float:
        visits = child.visits + child.waiting
        if visits == 0:
            return math.inf
        return child.reward / visits + self.exploration * math.sqrt(2 * math.log(total) / visits)

    def _state(self) -> dict[str, Any]:
        return {"tree": self.root.to_json()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.root = Node.from_json(state["tree"])
        for trial in self.pending.values():
            for node in self._nodes(trial.info["tree_path"]):
                node.waiting += 1


class _Descent:
    """The decider of one walk: down the tree, then the rollout. ``taken`` is the tree path, by allowed index."""

    def __init__(self, search: MonteCarloTreeSearch) -> None:
        self.search = search
        self.node: Node | None = search.root
        self.taken: list[int] = []

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        allowed = allowed_indices(path, options, mask)
        index = self._index(len(allowed))
        assert not isinstance(options, Interval)
        return options[allowed[index]]

    def _index(self, count: int) -> int:
        node, search = self.node, self.search
        if node is None:
            return 0 if search.rollout == "first" else int(search.rng.integers(count))
        if node.children is None:
            node.children = [Node() for _ in range(count)]
            self.node = None
            index = self._index(count)
            if search.enter_child:
                self.taken.append(index)
            return index
        index = search.choose(node)
        self.taken.append(index)
        self.node = node.children[index]
        return index

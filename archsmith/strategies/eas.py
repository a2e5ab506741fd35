"""Efficient architecture search: a controller grows one trained network in many ways, again and again.

The first trial is the start network. Every other one is the *same* trained network grown by some widenings and then
some deepenings, and inherits its weights (``Trial.info`` says how, ``archsmith.evaluate.trained`` does it). Each
episode of finished networks moves the controller (``archsmith.strategies.growing_controller``) by REINFORCE:

    r = tan(a pi / 2),    b <- b + 0.95 (mean r - b),    A = (r - b) / 10

where a is the validation accuracy: the same gain counts more where accuracy is high already. The baseline b moves
*before* it is subtracted, and almost all the way. After a stage the best network found becomes the one that is grown,
with another list of widths.

Source: Cai, Chen, Zhang, Yu, Wang, "Efficient Architecture Search by Network Transformation", AAAI 2018, arXiv
1707.04873, with the settings of the released code. The stages are reconstructed from its two lists of widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.space import Architecture, Objective, Result, Space, Trial, Value
from archsmith.space.growing import Edit, GrowingSpace
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.controller import Adam
from archsmith.strategies.growing_controller import DeeperStep, GrowthController, WiderStep

STRATEGIES = (
    {
        "name": "eas",
        "class": "Eas",
        "title": "A controller that grows a trained network by function-preserving edits",
        "paper": "arXiv 1707.04873",
        "extra": None,
    },
)

CEILING = 0.999
"""Largest accuracy that the tangent takes: it has a pole at 1, and one perfect score would outweigh everything."""


def tangent_reward(accuracy: float, *, ceiling: float = CEILING) -> float:
    """Return ``tan(a pi / 2)`` for an accuracy in [0, 1], cut off above ``ceiling`` and below 0."""
    return math.tan(min(max(accuracy, 0.0), ceiling) * math.pi / 2)


def moved_baseline(baseline: float, rewards: Sequence[float], decay: float) -> float:
    """Return the moving value after a batch: ``b + decay * (mean - b)``. A large decay forgets *fast*."""
    return baseline + decay * (math.fsum(rewards) / len(rewards) - baseline)


@dataclass(frozen=True)
class GrowthStage:
    """A number of episodes that grow one network.

    Attributes:
        episodes: How many; None for any number, as the last stage only.
        widths: Lists of widths by kind of layer ("filters", "units"; "growths"), in place of the space's own.

    Raises:
        UserError: No episode.
    """

    episodes: int | None = None
    widths: Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.episodes, int) and not isinstance(self.episodes, bool)
        if self.episodes is not None and not (whole and self.episodes >= 1):
            raise UserError("stage.episodes", self.episodes, allowed="an integer from 1, or None")


class _Found(NamedTuple):
    """A network that was evaluated: its trial, architecture, weights and objective."""

    trial: int
    architecture: Architecture
    weights: str | None
    value: float


Action = tuple[str, tuple[int, ...]]
"""("widen", 0 or 1 for each token) or ("deepen", options)."""


class Eas(Strategy):
    """Grows networks of a ``GrowingSpace`` (``PlainSpace``, ``DenseSpace``) from one trained network.

    Args:
        space: Strings that grow.
        objectives: One, an accuracy in [0, 1] where ``reward`` is "tan".
        seed: Seed of weights and samples.
        nets: Networks of an episode.
        wider: Actions of the wider actor for each network, before those of the deeper one.
        deeper: Actions of the deeper actor.
        learning_rate: Of Adam.
        entropy_weight: Factor of the mean entropy.
        baseline_decay: How far the baseline moves to the mean reward of an episode.
        reward: "tan", or "plain": the objective itself.
        reward_scale: Divides the advantages.
        stages: One after the other; the first one grows the start network, each later one the best network so far.
        policy: "controller", or "random": fair coins and uniform options in place of the controller, the baseline.
        embedding: Width of the controller's embeddings.
        units: Units of its encoder in each direction.

    ``Trial.info`` of a grown network has ``weights`` (key of the parent's, where there are), ``parent_architecture``,
    ``edits``, ``actions``, ``log_prob`` and ``episode``; ``Trial.parent`` is the network that was grown. While the
    start network, or the last networks of a stage that is not the last, are pending, there is nothing to ask. A failed
    network has the lowest reward seen so far; before there is any it teaches nothing. An episode is ``nets`` finished
    networks in the order told; with results that come late some of them were drawn by an earlier controller.

    Raises:
        UserError: A space that does not grow, a setting out of its range, or more than one objective.
    """

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        nets: int = 10,
        wider: int = 4,
        deeper: int = 5,
        learning_rate: float = 2e-3,
        entropy_weight: float = 1e-5,
        baseline_decay: float = 0.95,
        reward: Literal["tan", "plain"] = "tan",
        reward_scale: float = 10.0,
        stages: Sequence[GrowthStage] = (GrowthStage(),),
        policy: Literal["controller", "random"] = "controller",
        embedding: int = 16,
        units: int = 50,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if not isinstance(space, GrowingSpace):
            raise UserError("space", Shown(space.name), allowed="a space that grows, such as PlainSpace or DenseSpace")
        self.strings: GrowingSpace = space
        for name, number, least in (("nets", nets, 1), ("wider", wider, 0), ("deeper", deeper, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise UserError(name, number, allowed=f"an integer from {least}")
        for name, good, given, allowed in (
            ("learning_rate", learning_rate >= 0, learning_rate, "a number from 0"),
            ("entropy_weight", entropy_weight >= 0, entropy_weight, "a number from 0"),
            ("baseline_decay", 0 <= baseline_decay <= 1, baseline_decay, "a number from 0 to 1"),
            ("reward_scale", reward_scale > 0, reward_scale, "a number above 0"),
            ("reward", reward in ("tan", "plain"), reward, "'tan' or 'plain'"),
            ("policy", policy in ("controller", "random"), policy, "'controller' or 'random'"),
            ("stages", bool(stages), stages, "at least one GrowthStage"),
            ("objectives", reward == "plain" or self.objective.direction == "maximize", self.objective, "an accuracy"),
        ):
            if not good:
                raise UserError(name, given, allowed=allowed)
        if any(stage.episodes is None for stage in stages[:-1]):
            raise UserError("stages", tuple(stages), allowed="a number of episodes for each stage but the last")
        self.nets, self.wider, self.deeper = nets, wider, deeper
        self.entropy_weight, self.baseline_decay = entropy_weight, baseline_decay
        self.reward, self.reward_scale, self.stages, self.policy = reward, reward_scale, tuple(stages), policy
        self.controller = GrowthController(
            len(space.vocabulary), space.heads, seed=seed, embedding=embedding, units=units
        )
        self.optimizer = Adam(learning_rate)
        self._codes = {token: code for code, token in enumerate(space.vocabulary, start=1)}
        self.baseline = 0.0
        self.worst: float | None = None
        self.finished: list[tuple[tuple[Action, ...], float]] = []
        self.updates = 0
        self.stage = self.stage_asked = self.stage_told = 0
        self.base: _Found | None = None
        self.best: _Found | None = None

    # ------------------------------------------------------------------------------------------------ what is asked

    @property
    def done(self) -> bool:
        """Whether the last stage has all its networks."""
        return self.stage >= len(self.stages)

    def _propose(self) -> Proposal | None:
        if self.base is None:
            return None if self.asked else Proposal(self.strings.start(), info={"start": True})
        if self.done or ((limit := self._limit()) is not None and self.stage_asked >= limit):
            return None
        architecture, actions, edits, log_prob = self._drawn(self.base.architecture)
        info: dict[str, Any] = {
            "parent_architecture": self.base.architecture.to_json(),
            "edits": [list(edit) for edit in edits],
            "actions": [[kind, list(chosen)] for kind, chosen in actions],
            "log_prob": log_prob,
            "episode": self.stage_asked // self.nets,
        }
        if self.base.weights is not None:
            info["weights"] = self.base.weights
        self.stage_asked += 1
        return Proposal(architecture, parent=self.base.trial, info=info)

    def _limit(self) -> int | None:
        episodes = self.stages[self.stage].episodes
        return None if episodes is None else episodes * self.nets

    def _drawn(self, architecture: Architecture) -> tuple[Architecture, list[Action], list[Edit], float]:
        """Return a grown network with its actions, its edits and the log-probability of the actions."""
        now: Mapping[str, Value] = architecture
        actions: list[Action] = []
        edits: list[Edit] = []
        log_prob = 0.0
        for number in range(self.wider + self.deeper):
            drawn = self._draw_wider(now) if number < self.wider else self._draw_deeper(now)
            if drawn is None:
                break  # the string is full
            action, log = drawn
            new = self._edits(now, action)
            now = self.strings.edited(now, new)
            actions.append(action)
            edits += new
            log_prob += log
        settled = self.strings.settling(now)
        return self.strings.grown(now, settled), actions, edits + settled, log_prob

    def _draw_wider(self, architecture: Mapping[str, Value]) -> tuple[Action, float]:
        codes, mask = self._read(architecture)
        p = self.controller.widen_probabilities(codes) if self.policy == "controller" else np.full(len(codes), 0.5)
        chosen = (self.rng.random(len(codes)) < p) & mask
        taken = np.where(chosen, p, 1.0 - p)[mask]
        return ("widen", tuple(int(yes) for yes in chosen)), float(np.log(np.maximum(taken, 1e-15)).sum())

    def _draw_deeper(self, architecture: Mapping[str, Value]) -> tuple[Action, float] | None:
        def mask_of(chosen: Sequence[int]) -> list[bool] | None:
            return self.strings.deepening_mask(architecture, chosen)

        if self.policy == "controller":
            drawn = self.controller.draw_deeper(self._read(architecture)[0], mask_of, self.rng)
            if drawn is None:
                return None
            step, probabilities = drawn
            log = sum(math.log(p[option]) for p, option in zip(probabilities, step.chosen, strict=True))
            return ("deepen", step.chosen), log
        chosen: list[int] = []
        log = 0.0
        while len(chosen) < len(self.strings.heads) and (mask := mask_of(chosen)) is not None:
            options = np.flatnonzero(mask)
            if not len(options):
                return None
            chosen.append(int(self.rng.choice(options)))
            log -= math.log(len(options))
        return ("deepen", tuple(chosen)), log

    # ------------------------------------------------------------------------------------------- strings and actions

    def _read(self, architecture: Mapping[str, Value]) -> tuple[tuple[int, ...], np.ndarray]:
        """Return the codes of a string, and where it can be widened."""
        codes = tuple(self._codes[token] for token in self.strings.tokens(architecture))
        return codes, np.array([edit is not None for edit in self._widenings(architecture)])

    def _widenings(self, architecture: Mapping[str, Value]) -> list[Edit | None]:
        return self.strings.widenings(architecture, self.stages[self.stage].widths)

    def _edits(self, architecture: Mapping[str, Value], action: Action) -> list[Edit]:
        kind, chosen = action
        if kind == "deepen":
            return [self.strings.deepening(architecture, chosen)]
        options = zip(self._widenings(architecture), chosen, strict=True)
        return [edit for edit, yes in options if yes and edit is not None]

    def _steps(
        self, architecture: Mapping[str, Value], actions: Sequence[Action]
    ) -> tuple[list[WiderStep], list[DeeperStep]]:
        """Return what the controller decided, from the network that was grown and the actions."""
        wider, deeper = list[WiderStep](), list[DeeperStep]()
        for kind, chosen in actions:
            codes, mask = self._read(architecture)
            if kind == "widen":
                wider.append(WiderStep(codes, tuple(map(bool, chosen)), tuple(map(bool, mask))))
            else:
                masks = [self.strings.deepening_mask(architecture, chosen[:k]) for k in range(len(chosen))]
                deeper.append(DeeperStep(codes, chosen, tuple(tuple(mask) for mask in masks if mask is not None)))
            architecture = self.strings.edited(architecture, self._edits(architecture, (kind, chosen)))
        return wider, deeper

    def action_probabilities(self, architecture: Architecture | None = None) -> dict[str, list[tuple[str, float]]]:
        """Return what the controller would do with a network.

        Args:
            architecture: By default the one that is grown now, or the start network.

        Returns:
            "widen": each token that can be widened with the probability that it is; "deepen": each block with the
            probability that a layer is added to it.
        """
        grown = architecture or (self.strings.start() if self.base is None else self.base.architecture)
        tokens = self.strings.tokens(grown)
        codes = tuple(self._codes[token] for token in tokens)
        widths = None if self.done else self.stages[self.stage].widths
        widen = [
            (token, float(p))
            for token, p, edit in zip(
                tokens,
                self.controller.widen_probabilities(codes),
                self.strings.widenings(grown, widths),
                strict=True,
            )
            if edit is not None
        ]
        mask = self.strings.deepening_mask(grown, ())
        blocks = self.controller.first_probabilities(codes, mask) if mask and any(mask) else np.zeros(0)
        return {"widen": widen, "deepen": [(f"block {number}", float(p)) for number, p in enumerate(blocks)]}

    # ----------------------------------------------------------------------------------------------- what is learned

    def _learn(self, trial: Trial, result: Result) -> None:
        value = self.objective.value(result)
        found = _Found(trial.id, trial.architecture, result.weights, value if math.isfinite(value) else math.nan)
        if self.best is None or self.objective.is_better(found.value, self.best.value):
            self.best = found
        if self.base is None:
            self.base = found
            return
        self.stage_told += 1
        reward = self._reward(value)
        if reward is not None:
            actions = tuple((str(kind), tuple(map(int, chosen))) for kind, chosen in trial.info["actions"])
            self.finished.append((actions, reward))
        if len(self.finished) >= self.nets:
            batch, self.finished = self.finished[: self.nets], self.finished[self.nets :]
            self._update(batch)
        if self._limit() is not None and self.stage_told >= int(self._limit() or 0):
            self.stage, self.stage_asked, self.stage_told, self.finished = self.stage + 1, 0, 0, []
            self.base = self.best

    def _reward(self, value: float) -> float | None:
        """Return the reward of an objective's value, None where nothing can be said yet."""
        if not math.isfinite(value):
            return self.worst
        if self.reward == "tan":
            reward = tangent_reward(value)
        else:
            reward = value if self.objective.direction == "maximize" else -value
        self.worst = reward if self.worst is None else min(self.worst, reward)
        return reward

    def _update(self, batch: Sequence[tuple[tuple[Action, ...], float]]) -> None:
        """Move the baseline, then the controller, by one episode of (actions, reward)."""
        assert self.base is not None
        self.baseline = moved_baseline(self.baseline, [reward for _, reward in batch], self.baseline_decay)
        self.updates += 1
        if self.policy == "random":
            return
        wider, deeper = list[tuple[WiderStep, float]](), list[tuple[DeeperStep, float]]()
        for actions, reward in batch:
            advantage = (reward - self.baseline) / self.reward_scale
            own_wider, own_deeper = self._steps(self.base.architecture, actions)
            wider += [(step, advantage) for step in own_wider]
            deeper += [(step, advantage) for step in own_deeper]
        _, gradient = self.controller.objective(wider, deeper, self.entropy_weight)
        self.optimizer.ascend_(self.controller.weights, gradient)

    # ---------------------------------------------------------------------------------------------------- the state

    def _state(self) -> dict[str, Any]:
        counters = ("baseline", "worst", "updates", "stage", "stage_asked", "stage_told")
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in counters},
            "finished": [[[[kind, list(chosen)] for kind, chosen in actions], r] for actions, r in self.finished],
            "base": _found_to_json(self.base),
            "best": _found_to_json(self.best),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline, self.worst, self.updates = state["baseline"], state["worst"], int(state["updates"])
        self.stage, self.stage_asked = int(state["stage"]), int(state["stage_asked"])
        self.stage_told = int(state["stage_told"])
        self.finished = [
            (tuple((kind, tuple(chosen)) for kind, chosen in actions), reward) for actions, reward in state["finished"]
        ]
        self.base, self.best = self._found(state["base"]), self._found(state["best"])

    def _found(self, data: Mapping[str, Any] | None) -> _Found | None:
        if data is None:
            return None
        value = math.nan if data["value"] is None else float(data["value"])
        return _Found(data["trial"], self._architecture(data["architecture"]), data["weights"], value)


def _found_to_json(found: _Found | None) -> dict[str, Any] | None:
    if found is None:
        return None
    value = None if math.isnan(found.value) else found.value
    return {**found._asdict(), "architecture": found.architecture.to_json(), "value": value}

"""The recurrent controller of NASNet: an LSTM that makes the decisions of any space, one softmax after the other.

Zoph et al., arXiv 1707.07012, appendix A: one layer of 100 units, all weights drawn from U(-0.1, 0.1); each decision
has a softmax of its own over the LSTM's output, and the embedding of the chosen option is the next input. Its gradient
is written out here (no torch); a test compares it with automatic differentiation.

What asks is the space's walk, so options may differ from decision to decision, be masked, or be asked only after
certain answers. Softmax and embedding belong to the name of a decision and come into being when it is first met.
"""

# U units, B architectures, A architectures still walking, n alternatives of one decision

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream
from archsmith.space import Architecture, DeadEnd, Mask, Options, Space, Value
from archsmith.space.base import nothing_valid
from archsmith.strategies.parts import Part, choose_value, parts_of

WALKS = 1_000
"""Walks that may end dead before a sample is given up."""


class Step(NamedTuple):
    """One decision that was made: its part and the index that was chosen."""

    part: Part
    chosen: int


@dataclass
class _Head:
    """Decisions of one name at one step of a batch: which rows, their probabilities, what was chosen."""

    name: str
    rows: np.ndarray  # positions among the A rows of the step
    chosen: np.ndarray
    probabilities_An: np.ndarray
    logs_An: np.ndarray  # 0 where masked
    entropies_A: np.ndarray


@dataclass
class _Moment:
    """What one step of a batch leaves for the way back."""

    rows: np.ndarray  # of the batch, those still walking
    inputs_AU: np.ndarray
    sources: list[tuple[str, np.ndarray, np.ndarray]]  # embedding, positions among the rows, index
    before_AU: np.ndarray
    cell_before_AU: np.ndarray
    gates_A4U: np.ndarray  # after their nonlinearities: input, forget, output, candidate
    squashed_AU: np.ndarray  # tanh of the cell
    output_AU: np.ndarray
    heads: list[_Head]


@dataclass(frozen=True)
class Scored:
    """A batch of architectures under the present weights.

    Attributes:
        log_probs_B: Log-probability of each.
        entropies_B: Sum of the entropies of the decisions met, of each.
        moments: For ``Controller.gradient``.
    """

    log_probs_B: np.ndarray
    entropies_B: np.ndarray
    moments: list[_Moment]


class Controller:
    """A distribution over the architectures of a space: an LSTM over its decisions (``Distribution``).

    Args:
        space: What is walked.
        seed: Seed of the weights. Each array has its own stream, so the order in which decisions are met is no matter.
        units: U, width of the LSTM and of the embeddings.
        init: Weights, biases included, are drawn from U(-init, init).

    All arithmetic is float64. Memory grows with the number of different decisions: two arrays of (n, U) for each.
    """

    def __init__(self, space: Space, *, seed: int, units: int = 100, init: float = 0.1) -> None:
        if isinstance(units, bool) or not isinstance(units, int) or units < 1:
            raise UserError("controller.units", units, allowed="an integer from 1")
        if not init > 0:
            raise UserError("controller.init", init, allowed="a positive number")
        self.space, self.seed, self.units, self.init = space, seed, units, init
        self.weights: dict[str, np.ndarray] = {}
        self._projected: dict[tuple[str, int], np.ndarray] = {}
        self._scale = np.concatenate([np.full(3 * units, 0.5), np.ones(units)])  # sigmoid(x) = (1 + tanh(x / 2)) / 2
        for name, shape in (("start", (units,)), ("x", (units, 4 * units)), ("h", (units, 4 * units))):
            self._array(name, shape)
        self._array("bias", (4 * units,))

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the weights called ``name``, drawn on first use."""
        if (known := self.weights.get(name)) is None:
            stream = numpy_stream(self.seed, "controller", name)
            self.weights[name] = known = stream.uniform(-self.init, self.init, shape)
        return known

    def _meet(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """Return the softmax weights (U, n) and biases (n,) of a part."""
        self._array(f"embedding/{part.name}", (part.count, self.units))
        weight = self._array(f"softmax/{part.name}", (self.units, part.count))
        if weight.shape[1] != part.count:
            raise UserError(
                f"decision {part.name!r}",
                part.count,
                allowed=f"{weight.shape[1]} alternatives, as at its first time",
                hint="A decision must always offer the same list; mask what is not allowed.",
            )
        return weight, self._array(f"softmax_bias/{part.name}", (part.count,))

    def changed_(self) -> None:
        """Forget what was computed ahead; to be called whenever ``weights`` were changed in place."""
        self._projected.clear()

    # ------------------------------------------------------------------------------- one architecture, step by step

    def sample(self, rng: np.random.Generator) -> tuple[Architecture, float]:
        """Return an architecture and its log-probability; see ``draw``."""
        architecture, logs = self.draw(rng)
        return architecture, math.fsum(logs)

    def draw(self, rng: np.random.Generator) -> tuple[Architecture, list[float]]:
        """Return an architecture and the log-probability of each of its decisions.

        Raises:
            UserError: ``WALKS`` walks ended dead.
        """
        reason = ""
        for _ in range(WALKS):
            walk = _Walk(self)

            def choose(part: Part, walk: _Walk = walk) -> int:
                probabilities = walk.probabilities(part)
                index = int(np.searchsorted(np.cumsum(probabilities), rng.random(), side="right"))
                if index >= part.count or probabilities[index] == 0.0:  # the sum of the probabilities fell short
                    index = int(np.flatnonzero(probabilities)[-1])
                walk.take(part, index)
                return index

            try:
                return self._walked(choose, rng.random), walk.logs
            except DeadEnd as end:
                reason = str(end)
        raise nothing_valid(self.space.name, reason)

    def _walked(self, choose: Any, place: Any) -> Architecture:
        def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
            return choose_value(path, options, mask, group, choose, place)

        return self.space.walk(decide)

    def mode(self) -> Architecture:
        """Return the architecture of the likeliest alternative at every decision in turn; of a stretch, the middle.

        Raises:
            DeadEnd: These decisions break a predicate.
        """
        walk = _Walk(self)

        def choose(part: Part) -> int:
            index = int(np.argmax(walk.probabilities(part)))
            walk.take(part, index)
            return index

        return self._walked(choose, lambda: 0.5)

    def steps(self, architecture: Architecture) -> list[Step]:
        """Return the decisions that make up an architecture, in the order of the walk.

        Raises:
            UserError: The architecture is not valid.
        """
        return [Step(*pair) for decision in self.space.trace(architecture) for pair in parts_of(decision)]

    def log_prob(self, architecture: Architecture) -> float:
        """Return the log-probability of an architecture.

        It is computed as ``sample`` does: with unchanged weights the two are equal to the last bit.

        Raises:
            UserError: The architecture is not valid.
        """
        walk = _Walk(self)
        for part, index in self.steps(architecture):
            walk.probabilities(part)
            walk.take(part, index)
        return math.fsum(walk.logs)

    def entropy(self, architecture: Architecture) -> float:
        """Return the sum of the entropies of the decisions met on the way to an architecture, in nats.

        Raises:
            UserError: The architecture is not valid.
        """
        return float(self.score([self.steps(architecture)]).entropies_B[0])

    # -------------------------------------------------------------------------------------- many, forwards and back

    def score(self, batch: Sequence[Sequence[Step]]) -> Scored:
        """Return the log-probabilities and entropies of a batch, with what ``gradient`` needs.

        Args:
            batch: The steps of each architecture; they may differ in number and in kind.
        """
        size = len(batch)
        output, cell = np.zeros((size, self.units)), np.zeros((size, self.units))
        log_probs, entropies = np.zeros(size), np.zeros(size)
        moments: list[_Moment] = []
        for t in range(max((len(steps) for steps in batch), default=0)):
            rows = np.array([row for row, steps in enumerate(batch) if len(steps) > t])
            sources = self._sources([batch[row][t - 1] for row in rows] if t else [], len(rows))
            inputs = np.empty((len(rows), self.units))
            for name, positions, chosen in sources:
                inputs[positions] = self.weights[name][chosen] if t else self.weights[name]
            before, cell_before = output[rows], cell[rows]
            gates = np.tanh(
                (inputs @ self.weights["x"] + self.weights["bias"] + before @ self.weights["h"]) * self._scale
            )
            gates[:, : 3 * self.units] = 0.5 * (1.0 + gates[:, : 3 * self.units])
            enter, forget, expose, candidate = np.split(gates, 4, axis=1)
            after = forget * cell_before + enter * candidate
            squashed = np.tanh(after)
            cell[rows], output[rows] = after, expose * squashed
            heads = self._heads([batch[row][t] for row in rows], output[rows])
            for head in heads:
                log_probs[rows[head.rows]] += head.logs_An[np.arange(len(head.rows)), head.chosen]
                entropies[rows[head.rows]] += head.entropies_A
            moments.append(_Moment(rows, inputs, sources, before, cell_before, gates, squashed, output[rows], heads))
        return Scored(log_probs, entropies, moments)

    def _sources(self, previous: list[Step], size: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Return, for each embedding that feeds a step, its name, the rows that read it and which of its vectors."""
        if not previous:
            return [("start", np.arange(size), np.zeros(size, dtype=np.int64))]
        return [
            (f"embedding/{name}", positions, np.array([previous[position].chosen for position in positions]))
            for name, positions in _by_name(previous).items()
        ]

    def _heads(self, steps: list[Step], output_AU: np.ndarray) -> list[_Head]:
        """Return the softmaxes of one step, one for each decision that some row makes there."""
        heads = []
        for name, positions in _by_name(steps).items():
            weight, bias = self._meet(steps[positions[0]].part)
            logits = output_AU[positions] @ weight + bias
            masks = [steps[position].part.mask for position in positions]
            if any(mask is not None for mask in masks):
                logits[~np.array([np.ones(len(bias), bool) if mask is None else mask for mask in masks])] = -np.inf
            logits -= logits.max(axis=1, keepdims=True)
            exponentials = np.exp(logits)
            total = exponentials.sum(axis=1, keepdims=True)
            probabilities = exponentials / total
            logs = np.where(np.isfinite(logits), logits - np.log(total), 0.0)
            chosen = np.array([steps[position].chosen for position in positions])
            heads.append(_Head(name, positions, chosen, probabilities, logs, -(probabilities * logs).sum(axis=1)))
        return heads

    def gradient(self, scored: Scored, weights_B: np.ndarray, entropy_weight: float) -> dict[str, np.ndarray]:
        """Return the gradient of ``sum_b weights_B[b] * log_prob_b + entropy_weight * sum_b entropy_b``.

        Args:
            scored: What ``score`` returned, with the weights unchanged since.
            weights_B: One factor for each architecture, taken as a constant.
            entropy_weight: Factor of all entropies.

        Returns:
            An array for each one of ``self.weights`` that takes part.
        """
        found: dict[str, np.ndarray] = {}

        def add(name: str) -> np.ndarray:
            return found.setdefault(name, np.zeros_like(self.weights[name]))

        size, units = len(weights_B), self.units
        d_output, d_cell = np.zeros((size, units)), np.zeros((size, units))
        d_gates_all = []
        for moment in reversed(scored.moments):
            rows = moment.rows
            for head in moment.heads:
                at, p = rows[head.rows], head.probabilities_An
                # d log p / d logits = one-hot - p;  d entropy / d logits = -p (log p + entropy)
                d_logits = -weights_B[at, None] * p
                d_logits[np.arange(len(at)), head.chosen] += weights_B[at]
                if entropy_weight:
                    d_logits -= entropy_weight * p * (head.logs_An + head.entropies_A[:, None])
                own = moment.output_AU[head.rows]
                weight = self.weights[f"softmax/{head.name}"]
                add(f"softmax/{head.name}")[:] += own.T @ d_logits
                add(f"softmax_bias/{head.name}")[:] += d_logits.sum(axis=0)
                d_output[at] += d_logits @ weight.T
            enter, forget, expose, candidate = np.split(moment.gates_A4U, 4, axis=1)
            d_out = d_output[rows]
            d_after = d_cell[rows] + d_out * expose * (1.0 - moment.squashed_AU**2)
            d_gates = np.concatenate(
                [
                    d_after * candidate * enter * (1.0 - enter),
                    d_after * moment.cell_before_AU * forget * (1.0 - forget),
                    d_out * moment.squashed_AU * expose * (1.0 - expose),
                    d_after * enter * (1.0 - candidate**2),
                ],
                axis=1,
            )
            d_cell[rows] = d_after * forget
            d_output[rows] = d_gates @ self.weights["h"].T
            d_inputs = d_gates @ self.weights["x"].T
            for name, positions, chosen in moment.sources:
                if name == "start":
                    add(name)[:] += d_inputs[positions].sum(axis=0)
                else:
                    np.add.at(add(name), chosen, d_inputs[positions])
            d_gates_all.append(d_gates)
        if scored.moments:
            d_gates = np.concatenate(d_gates_all)
            backwards = scored.moments[::-1]
            found["x"] = np.concatenate([moment.inputs_AU for moment in backwards]).T @ d_gates
            found["h"] = np.concatenate([moment.before_AU for moment in backwards]).T @ d_gates
            found["bias"] = d_gates.sum(axis=0)
        return found

    # ---------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Return all weights met so far as plain JSON (``packed``)."""
        return {name: packed(array) for name, array in self.weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            UserError: An array of another width.
        """
        weights = {name: unpacked(data) for name, data in state.items()}
        shape = weights["start"].shape
        if shape != (self.units,):
            raise UserError("state.units", shape[0], allowed=f"{self.units}, as this controller was made with")
        self.weights = weights
        self.changed_()


class _Walk:
    """The LSTM on its way through one architecture: the same operations for a sample and for a stored one."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.output = self.cell = np.zeros(controller.units)
        self.logs: list[float] = []
        self.source = ("start", 0)
        self.current: np.ndarray | None = None

    def probabilities(self, part: Part) -> np.ndarray:
        """Go one step on and return the probabilities (n,) of a part's alternatives."""
        controller, units = self.controller, self.controller.units
        gates = np.tanh((self._input() + self.output @ controller.weights["h"]) * controller._scale)
        opened = 0.5 * (1.0 + gates[: 3 * units])
        self.cell = opened[units : 2 * units] * self.cell + opened[:units] * gates[3 * units :]
        self.output = opened[2 * units :] * np.tanh(self.cell)
        weight, bias = controller._meet(part)
        logits = self.output @ weight + bias
        if part.mask is not None:
            logits = np.where(part.mask, logits, -np.inf)
        exponentials = np.exp(logits - logits.max())
        self.current = exponentials / exponentials.sum()
        return self.current

    def take(self, part: Part, index: int) -> None:
        """Note that ``index`` was chosen."""
        assert self.current is not None
        self.logs.append(math.log(self.current[index]))
        self.source = (f"embedding/{part.name}", index)

    def _input(self) -> np.ndarray:
        """Return what the last choice adds to the gates; it is the same until the weights change."""
        controller = self.controller
        if (known := controller._projected.get(self.source)) is None:
            name, index = self.source
            vector = controller.weights[name] if name == "start" else controller.weights[name][index]
            known = vector @ controller.weights["x"] + controller.weights["bias"]
            controller._projected[self.source] = known
        return known


class Adam:
    """Adam (arXiv 1412.6980), upwards, on named arrays; an array that has no gradient in a step is left alone.

    Args:
        learning_rate: Step size.
        betas: Decay of the two moments.
        epsilon: Added to the root of the second moment.
    """

    def __init__(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> None:
        self.learning_rate, self.betas, self.epsilon = learning_rate, betas, epsilon
        self.moments: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def ascend_(self, arrays: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]) -> None:
        """Change the arrays in place by one step along their gradients."""
        first_decay, second_decay = self.betas
        for name, gradient in gradients.items():
            if name not in self.moments:
                self.moments[name] = (0, np.zeros_like(gradient), np.zeros_like(gradient))
            step, first, second = self.moments[name]
            step += 1
            first += (1.0 - first_decay) * (gradient - first)
            second += (1.0 - second_decay) * (gradient * gradient - second)
            self.moments[name] = (step, first, second)
            root = np.sqrt(second / (1.0 - second_decay**step)) + self.epsilon
            arrays[name][...] += self.learning_rate / (1.0 - first_decay**step) * first / root

    def state_dict(self) -> dict[str, Any]:
        """Return the moments as plain JSON."""
        return {name: [step, packed(first), packed(second)] for name, (step, first, second) in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.moments = {name: (int(step), unpacked(a), unpacked(b)) for name, (step, a, b) in state.items()}


def packed(array: np.ndarray) -> list[Any]:
    """Return a float64 array as ``[shape, base64 of its little-endian bytes]``: exact, and plain JSON."""
    return [list(array.shape), base64.b64encode(array.astype("<f8").tobytes()).decode("ascii")]


def unpacked(data: Sequence[Any]) -> np.ndarray:
    """Return the array that ``packed`` wrote."""
    shape, text = data
    return np.frombuffer(base64.b64decode(text), dtype="<f8").reshape(shape).astype(np.float64)


def _by_name(steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """Return the positions of the steps of each name."""
    if len({step.part.name for step in steps}) == 1:
        return {steps[0].part.name: np.arange(len(steps))}
    positions: dict[str, list[int]] = {}
    for position, step in enumerate(steps):
        positions.setdefault(step.part.name, []).append(position)
    return {name: np.array(found) for name, found in positions.items()}

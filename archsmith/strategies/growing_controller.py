"""The controller of EAS: a bidirectional LSTM reads a network as a string, two actors decide how it grows.

The *wider actor* decides for every layer by itself whether it is widened: a logistic function of the encoder's output
there, the same for all layers. The *deeper actor* is a second LSTM that begins with the encoder's last state and says
where a layer is added, one softmax after the other: the block, the layer in it, the kernel. What cannot be is masked:
its probability is zero and the others are scaled up.

Source: Cai et al. 2018, "Efficient Architecture Search by Network Transformation", arXiv 1707.04873. Embeddings of 16,
50 units in each direction and 100 in the decoder as in the released code; the initialisation is chosen here: weights
from U(-0.1, 0.1), biases 0, forget gates 1. The gradient is written out (no torch); a test compares it with automatic
differentiation.
"""

# B strings, T positions, U units, D embedding, K decisions of a deepening

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream
from archsmith.strategies.controller import packed, unpacked

GATES = 4
"""Input, forget, output, candidate, in this order."""


class WiderStep(NamedTuple):
    """One decision of the wider actor: codes of the string, what was decided at each token, where it could be."""

    codes: tuple[int, ...]
    chosen: tuple[bool, ...]
    mask: tuple[bool, ...]


class DeeperStep(NamedTuple):
    """One deepening: codes of the string, the options chosen, their masks (fewer than heads: not all were made)."""

    codes: tuple[int, ...]
    chosen: tuple[int, ...]
    masks: tuple[tuple[bool, ...], ...]


@dataclass
class _Run:
    """What an LSTM leaves for the way back, by position in the order of time."""

    order: list[int]
    inputs_TBD: np.ndarray
    present_TB: np.ndarray
    moments: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]  # h before, c before, gates, tanh of c
    outputs_TBU: np.ndarray
    state: tuple[np.ndarray, np.ndarray]


@dataclass
class _Encoded:
    """Outputs (B, T, 2U) and the last state (h, c), each (B, 2U), with both runs."""

    codes_BT: np.ndarray
    runs: tuple[_Run, _Run]
    outputs_BTU: np.ndarray
    state: tuple[np.ndarray, np.ndarray]


class GrowthController:
    """Encoder and actors.

    Args:
        tokens: Size of the vocabulary, without padding.
        heads: Options of each decision of a deepening.
        seed: Seed of the weights; each array has its own stream.
        embedding: D, width of all embeddings.
        units: U, units of the encoder in each direction; the decoder has twice as many.
        init: Weights are drawn from U(-init, init).

    Attributes:
        weights: Arrays by name, float64.

    Raises:
        UserError: A number that is not positive.
    """

    def __init__(
        self,
        tokens: int,
        heads: Sequence[int],
        *,
        seed: int,
        embedding: int = 16,
        units: int = 50,
        init: float = 0.1,
    ) -> None:
        for name, value in (("embedding", embedding), ("units", units)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"controller.{name}", value, allowed="an integer from 1")
        if not init > 0:
            raise UserError("controller.init", init, allowed="a positive number")
        self.heads, self.units, self.embedding = tuple(heads), units, embedding
        self.weights: dict[str, np.ndarray] = {}
        shapes = {"embedding": (tokens + 1, embedding), "wider/weight": (2 * units,), "wider/bias": (1,)}
        shapes["deeper/embedding"] = (1 + sum(self.heads[:-1]), embedding)
        for number, options in enumerate(self.heads):
            shapes[f"head{number}/weight"], shapes[f"head{number}/bias"] = (2 * units, options), (options,)
        for cell, size in (("forward", units), ("backward", units), ("deeper", 2 * units)):
            shapes |= {f"{cell}/x": (embedding, GATES * size), f"{cell}/h": (size, GATES * size)}
            shapes[f"{cell}/bias"] = (GATES * size,)
        for name, shape in shapes.items():
            stream = numpy_stream(seed, "growth-controller", name)
            self.weights[name] = np.zeros(shape) if "bias" in name else stream.uniform(-init, init, shape)
        for cell, size in (("forward", units), ("backward", units), ("deeper", 2 * units)):
            self.weights[f"{cell}/bias"][size : 2 * size] = 1.0

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(array.size for array in self.weights.values())

    # ------------------------------------------------------------------------------------------------- one string

    def widen_probabilities(self, codes: Sequence[int]) -> np.ndarray:
        """Return for each token of a string the probability that it is widened; float64 of shape (T,)."""
        encoded = self._encode([codes])
        return _sigmoid(self._wider_logits(encoded)[0])

    def draw_deeper(
        self, codes: Sequence[int], mask_of: Any, rng: np.random.Generator
    ) -> tuple[DeeperStep, list[np.ndarray]] | None:
        """Return a sampled deepening and the probabilities it was drawn from, None where nothing can be added.

        Args:
            codes: The string.
            mask_of: Called with the options chosen so far; returns the mask of the next decision, None if it is not to
                be made.
            rng: Stream of the samples.
        """
        state, source = self._encode([codes]).state, 0
        chosen: list[int] = []
        masks: list[tuple[bool, ...]] = []
        probabilities: list[np.ndarray] = []
        for number in range(len(self.heads)):
            mask = mask_of(tuple(chosen))
            if mask is None:
                break
            if not any(mask):
                return None
            inputs = self.weights["deeper/embedding"][[source]]
            state, _ = self._step("deeper", inputs, *state)
            p = masked_softmax(self._head(number, state[0]), np.array([mask]))[0]
            option = min(int(np.searchsorted(np.cumsum(p), rng.random(), side="right")), len(p) - 1)
            if p[option] == 0.0:  # the sum of the probabilities fell short of the drawn number
                option = int(np.flatnonzero(p)[-1])
            chosen.append(option)
            masks.append(tuple(bool(allowed) for allowed in mask))
            probabilities.append(p)
            source = 1 + sum(self.heads[:number]) + option
        return DeeperStep(tuple(codes), tuple(chosen), tuple(masks)), probabilities

    def first_probabilities(self, codes: Sequence[int], mask: Sequence[bool]) -> np.ndarray:
        """Return the probabilities of the first decision of a deepening, the block; float64 of shape (blocks,)."""
        state, _ = self._step("deeper", self.weights["deeper/embedding"][[0]], *self._encode([codes]).state)
        return masked_softmax(self._head(0, state[0]), np.array([mask]))[0]

    # --------------------------------------------------------------------------------------------- many, and back

    def objective(
        self,
        wider: Sequence[tuple[WiderStep, float]],
        deeper: Sequence[tuple[DeeperStep, float]],
        entropy_weight: float,
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Return ``sum_steps advantage * log p(step) + entropy_weight * H`` and its gradient by the weights.

        H is the mean entropy over all steps: of a step of the wider actor the mean over the tokens that could be
        widened, of one of the deeper actor the mean over its decisions.

        Args:
            wider: Steps of the wider actor, each with its advantage.
            deeper: Steps of the deeper actor, each with its advantage.
            entropy_weight: Factor of H.
        """
        gradient = {name: np.zeros_like(array) for name, array in self.weights.items()}
        steps = len(wider) + len(deeper)
        share = entropy_weight / steps if steps else 0.0
        value = self._wider_objective(wider, share, gradient) if wider else 0.0
        if deeper:
            value += self._deeper_objective(deeper, share, gradient)
        return value, gradient

    def _wider_objective(
        self, steps: Sequence[tuple[WiderStep, float]], share: float, gradient: dict[str, np.ndarray]
    ) -> float:
        encoded = self._encode([step.codes for step, _ in steps])
        chosen, mask = np.zeros(encoded.codes_BT.shape), np.zeros(encoded.codes_BT.shape)
        for row, (step, _) in enumerate(steps):
            chosen[row, : len(step.codes)], mask[row, : len(step.codes)] = step.chosen, step.mask
        advantages = np.array([advantage for _, advantage in steps])
        p = _sigmoid(self._wider_logits(encoded))
        logs, entropies = wider_terms(p, chosen, mask)
        open_B = np.maximum(mask.sum(axis=1), 1.0)
        # d log p(decision) / d logit = decision - p;  d entropy / d logit = -p (1 - p) logit
        d_logits = advantages[:, None] * (chosen - p) * mask
        d_logits -= (share / open_B)[:, None] * p * (1 - p) * self._wider_logits(encoded) * mask
        gradient["wider/weight"] += np.einsum("bt,btu->u", d_logits, encoded.outputs_BTU)
        gradient["wider/bias"] += d_logits.sum()
        d_outputs = d_logits[:, :, None] * self.weights["wider/weight"]
        self._back_encoder(
            encoded, d_outputs, np.zeros_like(encoded.state[0]), np.zeros_like(encoded.state[1]), gradient
        )
        return float(advantages @ logs + share * entropies.sum())

    def _deeper_objective(
        self, steps: Sequence[tuple[DeeperStep, float]], share: float, gradient: dict[str, np.ndarray]
    ) -> float:
        encoded = self._encode([step.codes for step, _ in steps])
        size, decisions = len(steps), len(self.heads)
        advantages = np.array([advantage for _, advantage in steps])
        made_KB = np.array([[len(step.chosen) > k for step, _ in steps] for k in range(decisions)], dtype=float)
        sources = np.zeros((decisions, size), dtype=np.int64)
        for k in range(1, decisions):
            offset = 1 + sum(self.heads[: k - 1])
            sources[k] = [offset + step.chosen[k - 1] if len(step.chosen) > k else 0 for step, _ in steps]
        inputs = self.weights["deeper/embedding"][sources]
        run = self._run("deeper", inputs, made_KB, list(range(decisions)), encoded.state)
        counts, value = made_KB.sum(axis=0), 0.0
        d_outputs = np.zeros_like(run.outputs_TBU)
        for k in range(decisions):
            rows = np.flatnonzero(made_KB[k])
            if not len(rows):
                continue
            output = run.outputs_TBU[k][rows]
            mask = np.array([steps[int(row)][0].masks[k] for row in rows])
            chosen = np.array([steps[int(row)][0].chosen[k] for row in rows])
            p = masked_softmax(self._head(k, output), mask)
            logs = np.log(np.where(mask, p, 1.0))
            entropies = -(p * logs).sum(axis=1)
            weight = share / counts[rows]
            value += float(advantages[rows] @ logs[np.arange(len(rows)), chosen] + weight @ entropies)
            # d log p / d logits = one-hot - p;  d entropy / d logits = -p (log p + entropy)
            d_logits = -advantages[rows, None] * p
            d_logits[np.arange(len(rows)), chosen] += advantages[rows]
            d_logits -= weight[:, None] * p * (logs + entropies[:, None])
            gradient[f"head{k}/weight"] += output.T @ d_logits
            gradient[f"head{k}/bias"] += d_logits.sum(axis=0)
            d_outputs[k][rows] = d_logits @ self.weights[f"head{k}/weight"].T
        d_inputs, d_state = self._back("deeper", run, d_outputs, np.zeros_like(encoded.state[0]), None, gradient)
        np.add.at(gradient["deeper/embedding"], sources, d_inputs)
        self._back_encoder(encoded, np.zeros_like(encoded.outputs_BTU), *d_state, gradient)
        return value

    # ------------------------------------------------------------------------------------------------- the pieces

    def _wider_logits(self, encoded: _Encoded) -> np.ndarray:
        return encoded.outputs_BTU @ self.weights["wider/weight"] + self.weights["wider/bias"][0]

    def _head(self, number: int, output: np.ndarray) -> np.ndarray:
        return output @ self.weights[f"head{number}/weight"] + self.weights[f"head{number}/bias"]

    def _encode(self, strings: Sequence[Sequence[int]]) -> _Encoded:
        """Read strings of any lengths; the shorter ones are padded, and nothing depends on the padding."""
        longest = max(map(len, strings))
        codes = np.zeros((len(strings), longest), dtype=np.int64)
        for row, string in enumerate(strings):
            codes[row, : len(string)] = string
        inputs = self.weights["embedding"][codes.T]
        present = (np.arange(longest)[:, None] < np.array([len(s) for s in strings])).astype(float)
        zero = np.zeros((len(strings), self.units))
        order = list(range(longest))
        ahead = self._run("forward", inputs, present, order, (zero, zero))
        back = self._run("backward", inputs, present, order[::-1], (zero, zero))
        outputs = np.concatenate([ahead.outputs_TBU, back.outputs_TBU], axis=2).transpose(1, 0, 2)
        state = tuple(np.concatenate(pair, axis=1) for pair in zip(ahead.state, back.state, strict=True))
        return _Encoded(codes, (ahead, back), outputs, (state[0], state[1]))

    def _step(self, cell: str, inputs: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[Any, Any]:
        """Return the state after one step, and (gates, tanh of c)."""
        return self._gated(cell, inputs @ self.weights[f"{cell}/x"] + self.weights[f"{cell}/bias"], h, c)

    def _gated(self, cell: str, projected: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[Any, Any]:
        sums = projected + h @ self.weights[f"{cell}/h"]
        opened = 3 * h.shape[1]
        sums[:, :opened] *= 0.5  # sigmoid(x) = (1 + tanh(x / 2)) / 2
        gates = np.tanh(sums, out=sums)
        gates[:, :opened] *= 0.5
        gates[:, :opened] += 0.5
        enter, forget, expose, candidate = _quarters(gates)
        after = forget * c + enter * candidate
        squashed = np.tanh(after)
        return (expose * squashed, after), (gates, squashed)

    def _run(
        self,
        cell: str,
        inputs_TBD: np.ndarray,
        present_TB: np.ndarray,
        order: list[int],
        state: tuple[np.ndarray, np.ndarray],
    ) -> _Run:
        """Run a cell over positions in an order; where a row is not present its state stays and its output is 0."""
        h, c = state
        outputs = np.zeros((len(order), *h.shape))
        moments: list[Any] = []
        projected = inputs_TBD @ self.weights[f"{cell}/x"] + self.weights[f"{cell}/bias"]
        complete = np.all(present_TB > 0, axis=1).tolist()
        for t in order:
            (new_h, new_c), (gates, squashed) = self._gated(cell, projected[t], h, c)
            moments.append((h, c, gates, squashed))
            if complete[t]:
                outputs[t], h, c = new_h, new_h, new_c
            else:
                present = present_TB[t][:, None]
                outputs[t] = present * new_h
                h, c = present * new_h + (1 - present) * h, present * new_c + (1 - present) * c
        return _Run(order, inputs_TBD, present_TB, moments, outputs, (h, c))

    def _back(
        self,
        cell: str,
        run: _Run,
        d_outputs_TBU: np.ndarray,
        d_h: np.ndarray,
        d_c: np.ndarray | None,
        gradient: dict[str, np.ndarray],
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Go back through a run; return the gradients by its inputs and by its first state."""
        d_c = np.zeros_like(d_h) if d_c is None else d_c
        d_inputs = np.zeros_like(run.inputs_TBD)
        for t, (h, c, gates, squashed) in zip(run.order[::-1], run.moments[::-1], strict=True):
            present = run.present_TB[t][:, None]
            enter, forget, expose, candidate = _quarters(gates)
            d_out = present * (d_h + d_outputs_TBU[t])
            d_after = present * d_c + d_out * expose * (1 - squashed**2)
            d_sums = np.concatenate(
                [
                    d_after * candidate * enter * (1 - enter),
                    d_after * c * forget * (1 - forget),
                    d_out * squashed * expose * (1 - expose),
                    d_after * enter * (1 - candidate**2),
                ],
                axis=1,
            )
            gradient[f"{cell}/x"] += run.inputs_TBD[t].T @ d_sums
            gradient[f"{cell}/h"] += h.T @ d_sums
            gradient[f"{cell}/bias"] += d_sums.sum(axis=0)
            d_inputs[t] = d_sums @ self.weights[f"{cell}/x"].T
            d_h = d_sums @ self.weights[f"{cell}/h"].T + (1 - present) * d_h
            d_c = d_after * forget + (1 - present) * d_c
        return d_inputs, (d_h, d_c)

    def _back_encoder(
        self,
        encoded: _Encoded,
        d_outputs_BTU: np.ndarray,
        d_h: np.ndarray,
        d_c: np.ndarray,
        gradient: dict[str, np.ndarray],
    ) -> None:
        d_outputs = d_outputs_BTU.transpose(1, 0, 2)
        for part, (cell, run) in enumerate(zip(("forward", "backward"), encoded.runs, strict=True)):
            own = slice(part * self.units, (part + 1) * self.units)
            d_inputs, _ = self._back(cell, run, d_outputs[:, :, own], d_h[:, own], d_c[:, own], gradient)
            np.add.at(gradient["embedding"], encoded.codes_BT.T, d_inputs)

    # -------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Return all weights as plain JSON (``archsmith.strategies.controller.packed``)."""
        return {name: packed(array) for name, array in self.weights.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            UserError: Arrays of another controller.
        """
        weights = {name: unpacked(data) for name, data in state.items()}
        shapes = {name: array.shape for name, array in weights.items()}
        if shapes != (own := {name: array.shape for name, array in self.weights.items()}):
            raise UserError("state.controller", shapes, allowed=f"arrays of {own}")
        self.weights = weights


def wider_terms(p: np.ndarray, chosen: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the log-probability of the wider actor's decisions, and the mean entropy of those open to it.

    Args:
        p: Probabilities of widening, (B, T).
        chosen: 1 where it was decided so.
        mask: 1 where it could be.
    """
    p = np.clip(p, 1e-15, 1 - 1e-15)  # a saturated logistic function is 0 or 1 exactly
    logs = (mask * (chosen * np.log(p) + (1 - chosen) * np.log(1 - p))).sum(axis=1)
    entropies = -(mask * (p * np.log(p) + (1 - p) * np.log(1 - p))).sum(axis=1)
    return logs, entropies / np.maximum(mask.sum(axis=1), 1.0)


def masked_softmax(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the softmax over what is allowed and 0 elsewhere; (B, n), with something allowed in every row."""
    logits = np.where(mask, logits, -np.inf)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _quarters(gates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    size = gates.shape[1] // GATES
    return gates[:, :size], gates[:, size : 2 * size], gates[:, 2 * size : 3 * size], gates[:, 3 * size :]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))

"""Selection by perturbation: an operation is worth what the supernet loses when it is taken away.

``Perturbation`` is a state machine that knows no network. It asks for mixing weights to be evaluated (``ask``), is told
accuracy and loss (``tell``), and decides edge by edge, then node by node. Between two decisions the caller trains the
supernet on; ``epochs`` and ``events`` say when. All of its state is JSON (``state``, ``load``), down to the scores of a
decision that is half made, and its random order comes from named streams, so it can be stopped anywhere.

Source: Wang, Cheng, Chen, Tang, Hsieh, "Rethinking Architecture Selection in Differentiable NAS", ICLR 2021, arXiv
2108.04392.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream

Row: TypeAlias = tuple[float, ...]
Mixing: TypeAlias = dict[str, tuple[Row, ...]]
"""For every group of edges a row of mixing weights for each."""

Scores: TypeAlias = tuple[float, float]
"""Accuracy and loss of the supernet on the whole validation part."""

Criterion = Literal["acc", "loss"]
Kind = Literal["op", "edge"]


@dataclass(frozen=True)
class Event:
    """A moment of the selection, at which every group of edges decides one thing.

    Attributes:
        epoch: Fine-tuning epoch, from 0, before which it happens.
        kind: "op" chooses the operation of an edge, "edge" the edges of a node.
    """

    epoch: int
    kind: Kind


class Perturbation:
    """Decides the operations of all edges, then which edges the nodes keep.

    An event asks, for an undecided edge of every group drawn at random, how the supernet does without each of its
    operations: that weight is zero and nothing is normalised again. The operation without which it does worst gets the
    edge (of equals the first one). With ``per_node``, events follow that decide about a node with more incoming edges:
    the edge without which the supernet does best is dropped (of equals the last one) until that many are left. All
    groups ask about the supernet as it was when the event began, and decide together at its end.

    Args:
        options: Operations of every edge, by group.
        targets: Node that each edge leads to, by group; needed with ``per_node``.
        per_node: Edges that a node keeps; None keeps all of them, and there is no second phase.
        interval: Epochs of fine-tuning behind an event.
        criterion: What a loss of strength is: "acc", accuracy, or "loss", for operations.
        edge_criterion: The same for edges; as ``criterion`` if None.
        never: Operations that are never chosen, nor asked about: in spaces whose architectures do not have them.
        order: "random", or "given": by number.
        seed: Of the random order.

    Raises:
        UserError: An edge without an operation that may be chosen, targets that do not fit, an interval below 1.

    Example:
        >>> select = Perturbation({"cell": [("skip", "conv"), ("skip", "conv")]}, seed=0)
        >>> mixing = {"cell": ((0.5, 0.5), (0.75, 0.25))}
        >>> while not select.done:
        ...     select.decide(mixing, lambda asked: (sum(row[1] for row in asked["cell"]), 0.0))
        >>> select.operations()
        {'cell': ('conv', 'conv')}
    """

    def __init__(
        self,
        options: Mapping[str, Sequence[Sequence[str]]],
        *,
        targets: Mapping[str, Sequence[int]] | None = None,
        per_node: int | None = None,
        interval: int = 5,
        criterion: Criterion = "acc",
        edge_criterion: Criterion | None = None,
        never: Sequence[str] = (),
        order: Literal["random", "given"] = "random",
        seed: int = 0,
    ) -> None:
        self.options = {group: tuple(tuple(edge) for edge in edges) for group, edges in options.items()}
        self.per_node, self.interval, self.never, self.order, self.seed = per_node, interval, tuple(never), order, seed
        self.criteria: dict[str, Criterion] = {"op": criterion, "edge": edge_criterion or criterion}
        _check(self, targets)
        self.targets = {
            group: tuple(targets[group]) if targets is not None else (0,) * len(edges)
            for group, edges in self.options.items()
        }
        self.chosen: dict[str, dict[int, int]] = {group: {} for group in self.options}
        self.dropped: dict[str, list[int]] = {group: [] for group in self.options}
        self.reduced: dict[str, list[int]] = {group: [] for group in self.options}
        self.events_done = 0
        self.evaluations = 0
        self._decided: dict[str, list[int]] = {}  # of the present event: subject, then its choice or drops
        self._scores: list[Scores] = []  # of the question that is open

    # ------------------------------------------------------------------ schedule

    @property
    def events(self) -> tuple[Event, ...]:
        """All events in order.

        The last one happens before the last epoch. In the published runs without a second phase this is one epoch
        earlier than the interval says, so that E edges take ``interval * (E - 1)`` epochs; with a second phase on N
        nodes it is ``interval * (E + N - 1) + 1``.
        """
        edges = max(map(len, self.options.values()))
        nodes = max(len(self._crowded(group)) for group in self.options)
        op, edge = get_args(Kind)
        kinds: tuple[Kind, ...] = (op,) * edges + (edge,) * nodes
        last = self.interval * (len(kinds) - 1)
        if self.per_node is None:
            last = max(last - 1, len(kinds) - 1)
        return tuple(Event(min(number * self.interval, last), kind) for number, kind in enumerate(kinds))

    @property
    def epochs(self) -> int:
        """Epochs of fine-tuning in all."""
        return self.events[-1].epoch + 1

    @property
    def done(self) -> bool:
        """Whether everything is decided."""
        return self.events_done == len(self.events)

    def due(self, epoch: int) -> bool:
        """Return whether an event is to be finished before this epoch of fine-tuning (from 0) begins."""
        return not self.done and self.events[self.events_done].epoch <= epoch

    # ------------------------------------------------------------------ questions

    def decide(
        self,
        mixing: Mapping[str, Sequence[Sequence[float]]],
        evaluate: Callable[[Mixing], Scores],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Finish the present event, or stop on the way, to go on later.

        Args:
            mixing: Mixing weights of the supernet as it is, for every group a row for each edge; rows of decided edges
                are replaced. The same ones when it goes on.
            evaluate: Scores of the supernet under the mixing weights that it is given.
            should_stop: Asked before every evaluation.

        Returns:
            True if the event is finished.

        Raises:
            UserError: A score is NaN, or what ``ask`` raises.
        """
        before = self.events_done
        while self.events_done == before:
            asked = self.ask(mixing)
            if asked is None:
                break
            if should_stop():
                return False
            self.tell(*evaluate(asked))
        return True

    def ask(self, mixing: Mapping[str, Sequence[Sequence[float]]]) -> Mixing | None:
        """Return the mixing weights whose scores are wanted next; None once everything is decided.

        Raises:
            UserError: Rows of another supernet.
        """
        if self.done:
            return None
        present = self.applied(mixing)
        group, subject, candidates, zeroed = self._question()
        candidate = candidates[len(self._scores)]
        rows = list(present[group])
        if self._kind == "op":
            rows[subject] = tuple(0.0 if column == candidate else value for column, value in enumerate(rows[subject]))
        for edge in (*zeroed, *([candidate] if self._kind == "edge" else [])):
            rows[edge] = (0.0,) * len(rows[edge])
        return {**present, group: tuple(rows)}

    def tell(self, accuracy: float, loss: float) -> None:
        """Take the scores of what ``ask`` gave; once the question is answered, decide.

        Raises:
            UserError: NaN.
        """
        if math.isnan((accuracy, loss)[self.criteria[self._kind] == "loss"]):
            hint = "The supernet diverged; lower its learning rates."
            raise UserError("score", "NaN", allowed="a number for every perturbation of the supernet", hint=hint)
        self.evaluations += 1
        self._scores.append((float(accuracy), float(loss)))
        self._settle()

    # ------------------------------------------------------------------ decisions

    def fixed(self) -> dict[str, dict[int, Row]]:
        """Return the rows of edges that are decided (one-hot) or dropped (zero), by group and edge."""
        result: dict[str, dict[int, Row]] = {}
        for group, edges in self.options.items():
            width = max(map(len, edges))
            result[group] = {
                edge: tuple(float(column == operation and edge not in self.dropped[group]) for column in range(width))
                for edge, operation in sorted(self.chosen[group].items())
            }
        return result

    def applied(self, mixing: Mapping[str, Sequence[Sequence[float]]]) -> Mixing:
        """Return mixing weights with the rows that are decided in place of theirs.

        Raises:
            UserError: Rows of another supernet.
        """
        result: Mixing = {}
        for group, edges in self.options.items():
            rows = [tuple(float(value) for value in row) for row in mixing.get(group, ())]
            width = max(map(len, edges))
            if [len(row) for row in rows] != [width] * len(edges):
                raise UserError("mixing", Shown(f"{group}: {len(rows)} rows"), allowed=f"{len(edges)} rows of {width}")
            for edge, row in self.fixed()[group].items():
                rows[edge] = row
            result[group] = tuple(rows)
        return result

    def operations(self) -> dict[str, tuple[str | None, ...]]:
        """Return the operation of every edge by group; None where it is undecided or the edge is dropped."""
        return {
            group: tuple(
                edges[edge][self.chosen[group][edge]]
                if edge in self.chosen[group] and edge not in self.dropped[group]
                else None
                for edge in range(len(edges))
            )
            for group, edges in self.options.items()
        }

    # ------------------------------------------------------------------ exact resume

    def state(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return {
            "chosen": {group: sorted(map(list, chosen.items())) for group, chosen in self.chosen.items()},
            "dropped": {group: list(edges) for group, edges in self.dropped.items()},
            "reduced": {group: list(nodes) for group, nodes in self.reduced.items()},
            "events_done": self.events_done,
            "evaluations": self.evaluations,
            "decided": {group: list(values) for group, values in self._decided.items()},
            "scores": [list(scores) for scores in self._scores],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned.

        Raises:
            UserError: It is the state of a selection with other groups.
        """
        if set(state["chosen"]) != set(self.options):
            raise UserError("state", sorted(state["chosen"]), allowed=f"that of the groups {sorted(self.options)}")
        self.chosen = {group: {int(e): int(o) for e, o in state["chosen"][group]} for group in self.options}
        self.dropped = {group: [int(edge) for edge in state["dropped"][group]] for group in self.options}
        self.reduced = {group: [int(node) for node in state["reduced"][group]] for group in self.options}
        self.events_done, self.evaluations = int(state["events_done"]), int(state["evaluations"])
        self._decided = {group: [int(value) for value in values] for group, values in state["decided"].items()}
        self._scores = [(float(accuracy), float(loss)) for accuracy, loss in state["scores"]]

    # ------------------------------------------------------------------ inside

    @property
    def _kind(self) -> Kind:
        return self.events[self.events_done].kind

    def _crowded(self, group: str) -> tuple[int, ...]:
        """Return the nodes that have more edges than they may keep."""
        if self.per_node is None:
            return ()
        into = self.targets[group]
        return tuple(node for node in sorted(set(into)) if into.count(node) > self.per_node)

    def _open(self, group: str) -> list[int]:
        """Return the edges or nodes of a group that this kind of event may be about."""
        if self._kind == "op":
            return [edge for edge in range(len(self.options[group])) if edge not in self.chosen[group]]
        return [node for node in self._crowded(group) if node not in self.reduced[group]]

    def _allowed(self, group: str, edge: int) -> list[int]:
        """Return the operations of an edge that may be chosen."""
        return [column for column, name in enumerate(self.options[group][edge]) if name not in self.never]

    def _question(self) -> tuple[str, int, list[int], list[int]]:
        """Return the group whose turn it is, its edge or node, the candidates, and the edges dropped for now."""
        for group in self.options:
            if not self._open(group):
                continue
            subject, *dropped = self._decided.get(group, [self._drawn(group)])
            if self._kind == "op":
                if not dropped:
                    return group, subject, self._allowed(group, subject), []
                continue
            into = [edge for edge, node in enumerate(self.targets[group]) if node == subject]
            left = [edge for edge in into if edge not in dropped]
            if self.per_node is not None and len(left) > self.per_node:
                return group, subject, left, dropped
        raise AssertionError("every event has a question")

    def _drawn(self, group: str) -> int:
        """Return which edge or node of a group the present event is about: the same whenever it is asked."""
        subjects = self._open(group)
        if self.order == "given":
            return subjects[0]
        return subjects[int(numpy_stream(self.seed, "perturbation", group, self.events_done).integers(len(subjects)))]

    def _settle(self) -> None:
        """Take decisions whose scores are complete; close the event once every group has decided."""
        group, subject, candidates, dropped = self._question()
        if len(self._scores) < len(candidates):
            return
        hurts = [-accuracy if self.criteria[self._kind] == "acc" else loss for accuracy, loss in self._scores]
        if self._kind == "op":
            decision = candidates[hurts.index(max(hurts))]  # the first of equals
        else:
            decision = candidates[len(hurts) - 1 - hurts[::-1].index(min(hurts))]  # the last of equals
        self._decided[group] = [subject, *dropped, decision]
        self._scores = []
        if all(self._complete(other) for other in self.options):
            self._close()

    def _complete(self, group: str) -> bool:
        if not self._open(group):
            return True
        if group not in self._decided:
            return False
        subject, *decided = self._decided[group]
        if self._kind == "op" or self.per_node is None:
            return bool(decided)
        return self.targets[group].count(subject) - len(decided) <= self.per_node

    def _close(self) -> None:
        for group, (subject, *decided) in self._decided.items():
            if self._kind == "op":
                self.chosen[group][subject] = decided[0]
            else:
                self.dropped[group] += decided
                self.reduced[group].append(subject)
        self._decided = {}
        self.events_done += 1


def _check(select: Perturbation, targets: Mapping[str, Sequence[int]] | None) -> None:
    """Refuse arguments of a selection that do not go together."""
    if isinstance(select.interval, bool) or not isinstance(select.interval, int) or select.interval < 1:
        raise UserError("interval", select.interval, allowed="an integer of at least 1: epochs between two decisions")
    for criterion in select.criteria.values():
        if criterion not in ("acc", "loss"):
            raise UserError("criterion", criterion, allowed="'acc' or 'loss'")
    if select.order not in ("random", "given"):
        raise UserError("order", select.order, allowed="'random' or 'given'")
    if not select.options or not all(select.options.values()):
        raise UserError("options", select.options, allowed="at least one edge in at least one group")
    for edges in select.options.values():
        for edge in edges:
            if all(name in select.never for name in edge):
                raise UserError("options", edge, allowed="an operation that may be chosen on every edge")
    if select.per_node is None:
        return
    if select.per_node < 1:
        raise UserError("per_node", select.per_node, allowed="None or at least 1")
    lengths = {group: len(edges) for group, edges in select.options.items()}
    if targets is None or {group: len(nodes) for group, nodes in targets.items()} != lengths:
        raise UserError(
            "targets", targets, allowed=f"the target of every edge, {lengths}: nodes keep {select.per_node}"
        )


def optimal_mixture(skipped_error: float, computed_error: float, covariance: float = 0.0) -> float:
    """Return the weight of the computed estimate that makes the error of a mixture of two estimates smallest.

    An edge that mixes ``t * o + (1 - t) * x``, x being a skip and o an operation, estimates one feature map m as all
    others do. Its error is smallest at ``t = (var(x - m) - cov) / (var(x - m) + var(o - m) - 2 cov)``. So the better
    the supernet is trained (x close to m), the more weight the skip gets: the size of a weight is no strength.

    Args:
        skipped_error: ``var(x - m)``.
        computed_error: ``var(o - m)``.
        covariance: Of both errors.

    Raises:
        UserError: Both errors are zero, or always equal: every mixture is as good.

    Source: proposition 1 of arXiv 2108.04392.
    """
    total = skipped_error + computed_error - 2 * covariance
    if not total > 0:
        raise UserError("errors", (skipped_error, computed_error), allowed="errors that differ")
    return (skipped_error - covariance) / total

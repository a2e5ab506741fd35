"""A cache around any evaluator: a network that was evaluated before costs nothing again, and is counted."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from archsmith.core.errors import UserError
from archsmith.evaluate.base import Evaluator, WeightStore
from archsmith.space import Result, Trial


class CachedEvaluator:
    """Evaluates every network once per fidelity; a repetition returns the first result with ``seconds`` 0.

    Two trials ask for the same network when their ``network_digest`` is equal: different architectures of the same
    canonical form as well (they get the result of the one that came first, even where a table recorded both).

    Args:
        evaluator: Who evaluates what is new; its results depend on neither parent nor seed (but see ``by_seed``).
        by_seed: Whether trials with different seeds are different evaluations.
        failures: Whether failed results are remembered too; if not, the network is tried again.
        limit: Results kept, the least recently used leave first; None for all.

    Attributes:
        evaluations: Trials that the evaluator answered.
        repetitions: Trials that were answered for free.

    A search that goes on after a break fills the cache again by ``remember``.

    Raises:
        UserError: ``limit`` is not positive.
    """

    def __init__(
        self, evaluator: Evaluator, *, by_seed: bool = False, failures: bool = True, limit: int | None = None
    ) -> None:
        if limit is not None and limit < 1:
            raise UserError("limit", limit, allowed="an integer from 1, or None for no limit")
        self.evaluator, self.by_seed, self.failures, self.limit = evaluator, by_seed, failures, limit
        self.evaluations = 0
        self.repetitions = 0
        self._known: OrderedDict[tuple[str, float | None, int | None], Result] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def _key(self, trial: Trial) -> tuple[str, float | None, int | None]:
        return trial.architecture.network_digest, trial.fidelity, trial.seed if self.by_seed else None

    def is_known(self, trial: Trial) -> bool:
        """Return whether ``evaluate`` would answer from memory."""
        return self._key(trial) in self._known

    def remember(self, trial: Trial, result: Result) -> None:
        """Take in a result that was obtained elsewhere; the first result of a network stays."""
        key = self._key(trial)
        if key in self._known or not (self.failures or result.status == "ok"):
            return
        self._known[key] = result
        if self.limit is not None and len(self._known) > self.limit:
            self._known.popitem(last=False)

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Return the known result for free, or ask the evaluator.

        Raises:
            UserError: What the evaluator raises.
        """
        key = self._key(trial)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            self.repetitions += 1
            return replace(known, seconds=0.0)
        result = self.evaluator.evaluate(trial, weights=weights)
        self.evaluations += 1
        self.remember(trial, result)
        return result

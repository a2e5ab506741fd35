"""One evaluation, from the outside: whatever a candidate does, a result comes out of it.

What a candidate can do wrong is a failed ``Result`` with its reason. What the *user* got wrong (an evaluator of another
space, an objective that the evaluator does not report) shows at the first trial of a study and is raised there; at a
later trial it is a failure like any other, because a search must not end on one odd architecture.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from archsmith.core.errors import UserError
from archsmith.evaluate.base import Evaluator, WeightStore
from archsmith.space import Objective, Result, Trial

_LONGEST_REASON = 1_000


@dataclass(frozen=True)
class Attempt:
    """What came of evaluating a trial once.

    Attributes:
        trial: The trial.
        result: Its result; None when whoever evaluated it died, so that the trial can be taken up again.
        misuse: The error behind a failed result, when it speaks of wrong use rather than of a bad candidate.
        lost: How the worker died, when there is no result.
        out_of_memory: Whether the process that evaluated is better not used again.
    """

    trial: Trial
    result: Result | None
    misuse: UserError | None = None
    lost: str | None = None
    out_of_memory: bool = False


def attempt(evaluator: Evaluator, trial: Trial, weights: WeightStore | None = None) -> Attempt:
    """Evaluate a trial here and now; an exception becomes a failed result, ``KeyboardInterrupt`` passes."""
    started = time.perf_counter()
    try:
        result = evaluator.evaluate(trial, weights=weights)
        if not isinstance(result, Result):
            raise UserError(
                "evaluator",
                type(result).__name__,
                allowed="an evaluator whose evaluate returns an archsmith.space.Result",
            )
        return Attempt(trial, result)
    except MemoryError as error:
        reason = f"out of memory: {error}" if str(error) else "out of memory"
        return Attempt(trial, Result.failed(_cut(reason), seconds=time.perf_counter() - started), out_of_memory=True)
    except UserError as error:
        return Attempt(trial, Result.failed(_cut(str(error)), seconds=time.perf_counter() - started), misuse=error)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Attempt(trial, Result.failed(_cut(reason), seconds=time.perf_counter() - started))


def judged(made: Attempt, objectives: Sequence[Objective]) -> Result:
    """Return the result that counts: one whose objectives are numbers, or a failed one that says what is wrong.

    Raises:
        UserError: The first trial (id 1) shows wrong use: its evaluator refused it as none of its own, or reports
            other metrics than the objectives ask for.
    """
    result, misuse = made.result, made.misuse
    assert result is not None
    if result.status == "ok":
        for objective in objectives:
            if objective.metric not in result.metrics and objective.metric not in result.costs:
                known = sorted({*result.metrics, *result.costs})
                misuse = UserError(
                    "objectives",
                    objective.metric,
                    allowed=f"what the evaluator reports: {known}",
                    hint="Name one of these as the objective's metric.",
                )
                result = replace(result, status="failed", reason=_cut(str(misuse)))
                break
            value = objective.value(result)
            if value != value:
                result = replace(result, status="failed", reason=f"{objective.metric} is NaN")
                break
    if misuse is not None and made.trial.id == 1:
        raise misuse
    return result


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."

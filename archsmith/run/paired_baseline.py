"""The paired baseline: is what a method chose better than what chance would have chosen, all else being equal?

Every pair (a parent, its data order and its budget) is measured once for each contender. Parents differ more than
contenders do, so the figure that counts is the difference within a pair, and its interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from archsmith.core.errors import UserError
from archsmith.run.intervals import mean_interval
from archsmith.run.statistics import Paired, compare_paired

RANDOM = "random"
"""Name of the baseline among the contenders."""

Measure = Callable[[int], Sequence[float]]
"""From the number of a pair to the accuracy after each epoch; the last one is the result."""


@dataclass(frozen=True)
class BaselineRow:
    """One contender over all pairs.

    Attributes:
        name: Its name.
        finals: Accuracy at the end, by pair.
        mean: Their mean.
        stderr: Standard error of the mean.
        difference: Mean of contender minus random, within pairs; 0 for random itself.
        difference_stderr: Standard error of that mean.
        low, high: 95 % interval of the mean difference, by Student's t over pairs.
        paired: Wins, ties, losses, the bootstrap interval and a signed-rank test of the same pairs.
        epochs: Mean number of epochs until ``share`` of the pair's own final accuracy is reached.
        epochs_difference: Mean of that minus random's, with its 95 % interval (Student's t).
        kept: Mean accuracy as a share of the dense network's; None without one.
    """

    name: str
    finals: tuple[float, ...]
    mean: float
    stderr: float
    difference: float
    difference_stderr: float
    low: float
    high: float
    paired: Paired
    epochs: float
    epochs_difference: tuple[float, float, float]
    kept: float | None


@dataclass(frozen=True)
class PairedBaseline:
    """All contenders against random choice.

    Attributes:
        rows: One for each contender, random's among them, in the order given.
        pairs: The pairs measured.
        share: Share of the final accuracy whose epoch is counted.
    """

    rows: tuple[BaselineRow, ...]
    pairs: tuple[int, ...]
    share: float

    def __getitem__(self, name: str) -> BaselineRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no contender {name!r}; there are {[row.name for row in self.rows]}")

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return asdict(self)

    def to_markdown(self, digits: int = 4) -> str:
        """Return the report as a table."""
        title = (
            f"| contender | accuracy (se), n = {len(self.pairs)} | minus random [95 %] | won/tied/lost "
            f"| epochs to {self.share:.0%} | share of dense |"
        )
        lines = [title, "|---|---|---|---|---|---|"]
        for row in self.rows:
            against = row.name != RANDOM
            gap = f"{row.difference:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}]" if against else ""
            won = f"{row.paired.wins}/{row.paired.ties}/{row.paired.losses}" if against else ""
            kept = "" if row.kept is None else f"{row.kept:.1%}"
            lines.append(
                f"| {row.name} | {row.mean:.{digits}f} ({row.stderr:.{digits}f}) | {gap} | {won} "
                f"| {row.epochs:.2f} | {kept} |"
            )
        return "\n".join(lines)


def compare_with_random(
    contenders: Mapping[str, Measure],
    random: Measure,
    pairs: Sequence[int],
    *,
    dense: Measure | None = None,
    share: float = 0.95,
) -> PairedBaseline:
    """Measure every contender and random choice on the same pairs and return what differs.

    Any method that picks a sub-network can be a contender: its measure builds pair ``i``'s parent, lets the method
    choose, trains with pair ``i``'s data order and the common budget, and returns the test accuracies.

    Args:
        contenders: By name what is to be judged, controls included ("fresh", say).
        random: The baseline: the same with a choice by chance of the same size.
        pairs: Numbers of the pairs, all different, at least 2.
        dense: The parent itself, trained alike; shares are of its accuracy.
        share: Share of the final accuracy whose epoch is counted as a measure of convergence.

    Raises:
        UserError: Fewer than two pairs or repeated ones, a contender named like a control, a share out of (0, 1], or
            curves of different lengths.
    """
    if len(pairs) < 2 or len(set(pairs)) < len(pairs):
        raise UserError("pairs", list(pairs), allowed="at least 2, all different: an interval needs a spread")
    if taken := sorted({RANDOM, "dense"} & set(contenders)):
        raise UserError("contenders", taken, allowed="other names; these are the controls")
    if not 0 < share <= 1:
        raise UserError("share", share, allowed="a number above 0, up to 1")
    measures = {**contenders, RANDOM: random, **({} if dense is None else {"dense": dense})}
    curves = {name: [[float(a) for a in measure(pair)] for pair in pairs] for name, measure in measures.items()}
    lengths = {len(curve) for several in curves.values() for curve in several}
    if len(lengths) != 1 or lengths == {0}:
        raise UserError("curves", sorted(lengths), allowed="one length, the common budget in epochs, for all")
    whole = statistics.fmean(curve[-1] for curve in curves["dense"]) if dense is not None else None
    rows = tuple(_row(name, curves[name], curves[RANDOM], share, whole) for name in measures)
    return PairedBaseline(rows, tuple(pairs), share)


def epochs_to_share(curve: Sequence[float], share: float) -> int:
    """Return after how many epochs ``share`` of the last accuracy of ``curve`` is reached for the first time."""
    return next(epoch for epoch, accuracy in enumerate(curve, 1) if accuracy >= share * curve[-1])


def _row(
    name: str, curves: Sequence[Sequence[float]], random: Sequence[Sequence[float]], share: float, whole: float | None
) -> BaselineRow:
    finals, others = [curve[-1] for curve in curves], [curve[-1] for curve in random]
    gaps = [a - b for a, b in zip(finals, others, strict=True)]
    epochs = [epochs_to_share(curve, share) for curve in curves]
    waits = [a - epochs_to_share(b, share) for a, b in zip(epochs, random, strict=True)]
    gap, wait = mean_interval(gaps), mean_interval(waits)
    assert gap is not None and wait is not None
    mean = statistics.fmean(finals)
    return BaselineRow(
        name=name,
        finals=tuple(finals),
        mean=mean,
        stderr=_stderr(finals),
        difference=gap[0],
        difference_stderr=_stderr(gaps),
        low=gap[1],
        high=gap[2],
        paired=compare_paired(finals, others),
        epochs=statistics.fmean(epochs),
        epochs_difference=wait,
        kept=mean / whole if whole else None,
    )


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))

"""Latencies of one run: each is measured once in its life, and found again when the run is resumed.

A decision that rests on a measurement repeats bit for bit only if the measurement does not change. So every one goes to
the journal with its samples and its provenance before anything is decided by it, and is read from there ever after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from archsmith.core.protocols import Logger
from archsmith.cost import Latency

ATTEMPTS = 3
"""Measurements of one network, of which the steadiest counts, while they are too noisy for a claim."""

MEASURED, REPEATED = "latency_measured", "latency_repeated"

Measure = Callable[[], Latency]


class Measured:
    """What was measured, by a key for each network (its digest).

    Args:
        journal: Where measurements are recorded and found again; None keeps them in memory.
    """

    def __init__(self, journal: Logger | None) -> None:
        self._journal = journal
        self._known: dict[tuple[str, str], float] = {}
        for kind in (MEASURED, REPEATED):
            for event in journal.events(kind) if journal is not None else ():
                self._known.setdefault((kind, event["digest"]), float(event["median_ms"]))

    def __contains__(self, key: object) -> bool:
        return (MEASURED, key) in self._known

    def ms(self, key: str, measure: Measure) -> float:
        """Return the median latency in ms; ``measure`` is called only if it is not known."""
        return self._of(MEASURED, key, measure)

    def again_ms(self, key: str, measure: Measure) -> float:
        """Return a second measurement of a network, which says how far measurements repeat."""
        return self._of(REPEATED, key, measure)

    def _of(self, kind: str, key: str, measure: Measure) -> float:
        if (kind, key) not in self._known:
            latency = steadiest(measure)
            if self._journal is not None:
                self._journal.record(kind, digest=key, **_record(latency))
            self._known[kind, key] = latency.median_ms
        return self._known[kind, key]


def steadiest(measure: Measure) -> Latency:
    """Return a latency that is steady enough for a claim, or the steadiest of ``ATTEMPTS``."""
    found = [measure()]
    while found[-1].noisy and len(found) < ATTEMPTS:
        found.append(measure())
    return found[-1] if not found[-1].noisy else min(found, key=lambda each: each.iqr_ms / each.median_ms)


def _record(latency: Latency) -> dict[str, Any]:
    return {"median_ms": latency.median_ms, "latency": latency.to_dict()}

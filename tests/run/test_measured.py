"""Latencies that are measured once in the life of a run."""

from __future__ import annotations

import pytest
from search_samples import Notes

from archsmith.cost.latency import Latency, Provenance
from archsmith.run.measured import Measured, steadiest

WHERE = Provenance("torch", "cpu", 1, "fp32", ((1, 2),), "reference-1", 1, 1.0, "2", None, "3", "c", "a", 1, ())


def latency(*samples):
    return Latency(samples * 5, (1.0,) * (5 * len(samples)), 1, WHERE)


def series(*found):
    rest = list(found)

    def measure():
        return rest.pop(0)

    return measure, rest


def test_a_network_is_measured_once_and_found_again_in_the_journal():
    notes = Notes()
    measured = Measured(notes)
    measure, left = series(latency(2.0, 2.1), latency(9.0, 9.1))
    assert measured.ms("a", measure) == measured.ms("a", measure) == pytest.approx(2.05)
    assert len(left) == 1 and "a" in measured and "b" not in measured
    (event,) = notes.events("latency_measured")
    assert event["digest"] == "a" and Latency.from_dict(event["latency"]).median_ms == event["median_ms"]
    again = Measured(notes)  # the run was killed, and goes on

    def never():
        raise AssertionError

    assert again.ms("a", never) == measured.ms("a", never) and "a" in again


def test_a_second_measurement_is_kept_beside_the_first():
    notes = Notes()
    measured = Measured(notes)
    measure, _ = series(latency(2.0, 2.0), latency(2.2, 2.2))
    measured.ms("a", measure)
    assert measured.again_ms("a", measure) == 2.2 and measured.ms("a", measure) == 2.0
    assert Measured(notes).again_ms("a", measure) == 2.2


def test_older_journals_have_the_median_alone():
    notes = Notes()
    notes.record("latency_measured", digest="a", median_ms=3.0)
    assert Measured(notes).ms("a", lambda: latency(1.0)) == 3.0


def test_of_noisy_measurements_the_steadiest_counts():
    wild, wilder, steady = latency(1.0, 2.0), latency(1.0, 9.0), latency(5.0, 5.1)
    measure, left = series(wilder, steady, wild)
    assert steadiest(measure) == steady and left == [wild]
    measure, left = series(wilder, wild, wilder)
    assert steadiest(measure) == wild and not left


def test_without_a_journal_they_are_kept_in_memory():
    measured = Measured(None)
    assert measured.ms("a", lambda: latency(1.0)) == 1.0 and "a" in measured

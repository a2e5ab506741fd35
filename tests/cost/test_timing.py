"""The measuring protocol under a clock that the test owns."""

import random
import statistics
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.cost.timing import interleave, median_interval, quartile_range


class FakeMachine:
    """Targets that take the given seconds per call, one entry per block (the last repeats); notes who ran when."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def clock(self):
        return self.now

    def target(self, name, *seconds):
        remaining = list(seconds)

        def run(calls):
            self.log.append((name, calls))
            self.now += calls * (remaining.pop(0) if len(remaining) > 1 else remaining[0])

        return run


def test_targets_take_turns_after_warmup_and_calibration():
    machine = FakeMachine()
    targets = {"a": machine.target("a", 0.001), "b": machine.target("b", 0.010)}
    samples = interleave(targets, rounds=10, warmup=7, block_ms=5.0, clock=machine.clock)
    assert machine.log[:5] == [("a", 7), ("a", 1), ("a", 5), ("b", 7), ("b", 1)]
    assert machine.log[5:] == [("a", 5), ("b", 1)] * 10
    assert (samples["a"].repeats, samples["b"].repeats) == (5, 1)
    assert samples["a"].milliseconds == pytest.approx([1.0] * 10)
    assert samples["b"].milliseconds == pytest.approx([10.0] * 10)


def test_samples_are_block_times_divided_by_calls_in_order():
    machine = FakeMachine()
    seconds = [0.004 + 0.001 * i for i in range(10)]
    run = machine.target("a", 1.0, 0.006, *seconds)  # warm-up, calibration, then the rounds
    samples = interleave({"a": run}, rounds=10, warmup=1, block_ms=5.0, clock=machine.clock)["a"]
    assert samples.milliseconds == pytest.approx([1e3 * s for s in seconds])


def test_calibration_grows_by_ten_at_most_and_survives_a_coarse_clock():
    machine = FakeMachine()
    interleave({"a": machine.target("a", 1e-6)}, rounds=10, warmup=1, block_ms=5.0, clock=machine.clock)
    assert [calls for _, calls in machine.log[:6]] == [1, 1, 10, 100, 1000, 5000]
    coarse = FakeMachine()
    run = coarse.target("a", 1e-6)
    samples = interleave({"a": run}, rounds=10, warmup=1, block_ms=5.0, clock=lambda: coarse.now // 0.001 * 0.001)
    assert 5000 <= samples["a"].repeats <= 20000
    stopped = interleave({"a": run}, rounds=10, warmup=1, block_ms=5.0, clock=lambda: 0.0)
    assert stopped["a"].repeats == 100_000


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounds": 9}, r"rounds: got 9; allowed: at least 10"),
        ({"warmup": 0}, r"warmup: got 0; allowed: at least 1 call"),
        ({"block_ms": 0.0}, r"block_ms: got 0.0; allowed: a positive number"),
        ({"block_ms": float("nan")}, r"block_ms: got nan"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(UserError, match=text):
        interleave({}, **({"rounds": 10, "warmup": 1, "block_ms": 1.0, "clock": lambda: 0.0} | options))


def test_quartile_range_by_hand():
    assert quartile_range([1, 2, 3, 4, 5]) == 2
    assert quartile_range([5, 1, 4, 2]) == pytest.approx(4.25 - 1.75)


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (9, 2), (10, 2), (15, 4), (20, 6), (50, 18)])
def test_median_interval_has_the_ranks_of_the_sign_test(n, rank):
    samples = list(range(1, n + 1))
    random.Random(n).shuffle(samples)
    assert median_interval(samples) == (rank, n + 1 - rank)
    # The defining property, literally: this rank covers 95 %, the next does not.
    coverage = [1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n for k in (rank, rank + 1)]
    assert coverage[0] >= 0.95 > coverage[1]


def test_median_interval_covers_the_median():
    generator = random.Random(1)
    n, trials = 10, 4000
    hits = 0
    for _ in range(trials):
        low, high = median_interval([generator.expovariate(1.0) for _ in range(n)])
        hits += low <= 0.6931471805599453 <= high
    exact = 1 - 2 * (1 + 10) / 2**10
    assert abs(hits / trials - exact) < 4 * (exact * (1 - exact) / trials) ** 0.5


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=40))
def test_median_interval_holds_the_sample_median_and_follows_a_scale(samples):
    low, high = median_interval(samples)
    assert min(samples) <= low <= statistics.median(samples) <= high <= max(samples)
    assert median_interval([2 * s for s in samples]) == (2 * low, 2 * high)


def test_too_few_samples_for_an_interval():
    with pytest.raises(ValueError, match=r"5 samples give no interval of confidence 0.95"):
        median_interval([1, 2, 3, 4, 5])

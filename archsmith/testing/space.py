"""The contract of a space: inherit ``SpaceContract`` in a test file and override the fixture ``space``.

The suite samples ``SAMPLES`` architectures with fixed seeds and checks the laws that strategies rely on. Spaces of at
most ``ENUMERATED`` architectures are also enumerated; uniform sampling is checked where the space claims it.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from itertools import islice, pairwise
from typing import ClassVar

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Architecture, EncodingKind, Invalid, Space

SAMPLES = 25
ENUMERATED = 2_000
DRAWS_PER_ARCHITECTURE = 40


def agree_elsewhere(first: Architecture, second: Architecture, path: str) -> bool:
    """Return whether two architectures have equal values on every path of both, ``path`` excepted."""
    return all(second[other] == value for other, value in first.items() if other != path and other in second)


def changed_paths(first: Architecture, second: Architecture) -> list[str]:
    """Return the paths that both architectures have with different values."""
    return [path for path, value in first.items() if path in second and second[path] != value]


class SpaceContract:
    """Laws of ``archsmith.space.Space``; override ``space``, and the class attributes where the space differs."""

    lossless: ClassVar[tuple[EncodingKind, ...]] = ("one-hot", "ordinal")
    """Kinds of encoding that decode back to the same architecture."""

    single_changes: ClassVar[bool] = True
    """Whether each architecture has a valid one that differs in one decision (False with fixed sums, say)."""

    uniform: ClassVar[bool] = False
    """Whether the space promises uniform sampling over its valid architectures; checked when it is small."""

    @pytest.fixture
    def space(self) -> Space:
        """Return the space under test."""
        raise NotImplementedError("override the fixture 'space'")

    @pytest.fixture
    def samples(self, space: Space) -> list[Architecture]:
        """Return sampled architectures, one per seed."""
        return [space.sample(np.random.default_rng(seed)) for seed in range(SAMPLES)]

    def test_samples_are_valid_and_named(self, space: Space, samples: list[Architecture]) -> None:
        """Every sample validates and carries the space's name."""
        for sample in samples:
            assert space.contains(sample)
            assert sample.space == space.name

    def test_sampling_depends_on_the_stream_only(self, space: Space, samples: list[Architecture]) -> None:
        """The same seed gives the same architecture, whatever happened before."""
        again = [space.sample(np.random.default_rng(seed)) for seed in range(SAMPLES)]
        assert again == samples

    def test_walks_end_in_valid_architectures(self, space: Space) -> None:
        """A uniform decider with replay of nothing ends in something valid."""
        for seed in range(SAMPLES):
            assert space.contains(space.replay({}, np.random.default_rng(seed)))

    def test_json_round_trip_is_exact(self, samples: list[Architecture]) -> None:
        """JSON text and copies give back an equal architecture with the same digests and types."""
        for sample in samples:
            for again in (
                Architecture.from_json(json.dumps(sample.to_json())),
                copy.deepcopy(sample),
            ):
                assert again == sample
                assert (again.digest, again.network_digest) == (sample.digest, sample.network_digest)
                assert list(again.items()) == list(sample.items())
                assert [type(value) for value in again.values()] == [type(value) for value in sample.values()]

    def test_equality_is_equality_of_digests(self, samples: list[Architecture]) -> None:
        """Equal decisions, equal digest; different decisions, different digest."""
        for first in samples:
            for second in samples:
                assert (dict(first) == dict(second)) == (first.digest == second.digest) == (first == second)

    def test_trace_lists_the_decisions(self, space: Space, samples: list[Architecture]) -> None:
        """The trace has one entry per decision, and each choice was among its options."""
        for sample in samples:
            trace = space.trace(sample)
            assert {decision.path: decision.choice for decision in trace} == dict(sample)
            assert len({decision.path for decision in trace}) == len(trace)
            for decision in trace:
                assert decision.choice in decision.options
                assert decision.group

    def test_replay_reproduces(self, space: Space, samples: list[Architecture]) -> None:
        """Replaying an architecture by path gives it back and draws nothing."""
        rng = np.random.default_rng(0)
        before = rng.bit_generator.state
        for sample in samples:
            assert space.replay(sample, rng) == sample
        assert rng.bit_generator.state == before

    def test_replay_drops_what_does_not_exist(self, space: Space, samples: list[Architecture]) -> None:
        """Answers to unknown paths and impossible answers do no harm."""
        rng = np.random.default_rng(1)
        for sample in samples:
            assert space.replay({**sample, "no/such/path": 1}, rng) == sample
            if len(sample):
                path = next(iter(sample))
                assert space.contains(space.replay({**sample, path: "no such option"}, rng))

    def test_mutation_changes_one_decision(self, space: Space, samples: list[Architecture]) -> None:
        """A mutation is valid, different, and differs in one decision apart from what conditions switch."""
        if space.size == 1:
            pytest.skip("a space of one architecture has no mutants")
        for seed, sample in enumerate(samples):
            mutant = space.mutate(sample, np.random.default_rng(seed))
            assert space.contains(mutant)
            assert mutant != sample
            if self.single_changes:
                assert len(changed_paths(sample, mutant)) <= 1
            assert space.mutate(sample, np.random.default_rng(seed)) == mutant

    def test_subtree_mutation_keeps_the_rest(self, space: Space, samples: list[Architecture]) -> None:
        """A subtree mutation leaves paths outside the subtree alone, or says that nothing can differ."""
        for seed, sample in enumerate(samples):
            for path in islice(sample, 3):
                prefix = path.rsplit("/", 1)[0]
                try:
                    mutant = space.mutate(sample, np.random.default_rng(seed), subtree=prefix)
                except UserError:
                    continue
                outside = [p for p in changed_paths(sample, mutant) if p != prefix and not p.startswith(f"{prefix}/")]
                assert space.contains(mutant)
                assert mutant != sample
                assert outside == []

    def test_crossover_takes_from_the_parents(self, space: Space, samples: list[Architecture]) -> None:
        """A child is valid; its decisions stem from a parent wherever a parent's answer was allowed."""
        for seed, (first, second) in enumerate(pairwise(samples)):
            child = space.crossover(first, second, np.random.default_rng(seed))
            assert space.contains(child)
            for decision in space.trace(child):
                inherited = [p[decision.path] for p in (first, second) if decision.path in p]
                allowed = [
                    value
                    for value in inherited
                    if value in decision.options
                    and (decision.mask is None or decision.mask[list(decision.options).index(value)])  # type: ignore[arg-type]
                ]
                assert decision.choice in allowed or not allowed
        assert space.crossover(samples[0], samples[0], np.random.default_rng(0)) == samples[0]

    def test_neighbours_differ_in_one_decision(self, space: Space, samples: list[Architecture]) -> None:
        """Neighbours are valid, all different, and agree with the architecture on all shared paths but one."""
        for sample in samples[:5]:
            seen = list(islice(space.neighbours(sample), 200))
            assert len(set(seen)) == len(seen)
            for neighbour in seen:
                assert space.contains(neighbour)
                assert neighbour != sample
                assert len(changed_paths(sample, neighbour)) == 1

    def test_enumeration_counts_the_size(self, space: Space, samples: list[Architecture]) -> None:
        """Small spaces: as many architectures as ``size`` says, all valid and distinct, every sample among them."""
        if not space.size <= ENUMERATED:
            first = list(islice(space.enumerate(), 20)) if space.size != math.inf else []
            assert len(set(first)) == len(first)
            return
        everything = list(space.enumerate())
        assert len(everything) == len(set(everything)) == space.size
        assert all(space.contains(each) for each in everything)
        assert set(samples) <= set(everything)
        assert list(space.enumerate()) == everything

    def test_sampling_is_uniform(self, space: Space) -> None:
        """Small spaces that promise it: a chi-square statistic within 4 standard errors of its expectation."""
        if not self.uniform:
            pytest.skip("the space does not promise uniform sampling")
        assert 2 <= space.size <= ENUMERATED // 10, (
            "attach a smaller space of the kind to show that it samples uniformly"
        )
        size = int(space.size)
        draws = DRAWS_PER_ARCHITECTURE * size
        rng = np.random.default_rng(12345)
        counts = Counter(space.sample(rng) for _ in range(draws))
        expected = draws / size
        statistic = sum((count - expected) ** 2 for count in counts.values()) / expected
        statistic += (size - len(counts)) * expected
        assert abs(statistic - (size - 1)) <= 4 * math.sqrt(2 * (size - 1))

    def test_lossless_encodings_decode(self, space: Space, samples: list[Architecture]) -> None:
        """decode(encode(a)) == a, and different architectures have different encodings."""
        for kind in self.lossless:
            rows = {sample: space.encode(sample, kind) for sample in samples}
            assert len({row.shape for row in rows.values()}) == 1
            assert len({row.tobytes() for row in rows.values()}) == len(rows)
            for sample, row in rows.items():
                assert row.dtype == np.float64
                assert space.decode(kind, row) == sample

    def test_decode_never_invents(self, space: Space, samples: list[Architecture]) -> None:
        """An array that is no encoding is Invalid, and says why."""
        for kind in self.lossless:
            row = space.encode(samples[0], kind)
            if row.size:
                found = space.decode(kind, np.full_like(row, np.nan))
                assert isinstance(found, Invalid)
                assert found.reason

    def test_foreign_architectures_are_refused(self, space: Space, samples: list[Architecture]) -> None:
        """Another space's name, a missing decision and an unknown path are errors that name the field."""
        sample = samples[0]
        with pytest.raises(UserError, match=r"architecture\.space"):
            space.validate(Architecture(dict(sample), space=f"not {space.name}"))
        with pytest.raises(UserError, match="no/such/path"):
            space.validate({**sample, "no/such/path": 1})
        if len(sample):
            path = next(iter(sample))
            with pytest.raises(UserError) as raised:
                space.validate({other: value for other, value in sample.items() if other != path})
            assert path in str(raised.value)

    def test_a_decider_must_choose_an_option(self, space: Space, samples: list[Architecture]) -> None:
        """An answer that is not an option is an error of the decider."""
        if len(samples[0]):
            with pytest.raises(ValueError, match="allowed"):
                space.walk(lambda path, options, mask, group: ("no", "such", "option"))

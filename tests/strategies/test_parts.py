from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from archsmith.space import Categorical, Count, Decide, Mask, Options, Ordinal, ProductSpace, Real, Space, Subset, Value
from archsmith.strategies.parts import BINS, Part, choose_value, parts_of
from archsmith.testing.strategies import EXAMPLE_SPACES


def wide_space() -> ProductSpace:
    return ProductSpace(
        "wide",
        {
            "huge": Count(0, 10**30),
            "long": Count(3, 90_003, 3),
            "set": Subset([f"s{i}" for i in range(40)], minimum=2, maximum=5),
            "real": Real(-1.0, 3.0),
            "point": Real(2.0, 2.0),
            "choice": Categorical(["a", "b"]),
        },
    )


def repeating(chosen: Mapping[str, int]) -> Decide:
    def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
        return choose_value(path, options, mask, group, lambda part: chosen[part.name], lambda: 0.5)

    return decide


@pytest.mark.parametrize("space", [*(make() for make in EXAMPLE_SPACES.values()), wide_space()], ids=lambda s: s.name)
def test_parts_lead_back_to_the_value(space: Space) -> None:
    """Choosing the parts of an architecture again gives it back, up to the place inside a stretch."""
    for seed in range(20):
        architecture = space.sample(np.random.default_rng(seed))
        chosen = {part.name: index for d in space.trace(architecture) for part, index in parts_of(d)}

        again = space.walk(repeating(chosen))
        same = {part.name: index for d in space.trace(again) for part, index in parts_of(d)}
        assert same == chosen
        for path, value in architecture.items():
            if path not in ("lr", "momentum", "real", "huge", "long", "steps"):
                assert again[path] == value


def test_uniform_parts_reach_every_stretch_and_only_valid_sizes() -> None:
    space = wide_space()
    rng = np.random.default_rng(0)
    parts: set[str] = set()

    def choose(part: Part) -> int:
        parts.add(part.name)
        return int(rng.integers(part.count))

    def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
        return choose_value(path, options, mask, group, choose, rng.random)

    found = [space.walk(decide) for _ in range(300)]  # walk checks every answer against the options
    assert "point" not in parts
    assert {len(a["set"]) for a in found} <= {2, 3, 4, 5}  # type: ignore[arg-type]
    assert len({int(a["huge"]) * BINS // 10**30 for a in found}) >= BINS  # type: ignore[arg-type]


def test_masks_reach_the_parts() -> None:
    mask = np.zeros(5_000, dtype=bool)
    mask[4_100:4_103] = True

    def only_allowed(part: Part) -> int:
        assert part.mask is not None and part.mask.sum() == 1 and part.ordered
        return int(np.argmax(part.mask))

    drawn = {
        choose_value("p", range(5_000), mask, "g", only_allowed, np.random.default_rng(seed).random)
        for seed in range(50)
    }
    assert drawn == {4_100, 4_101, 4_102}


def test_short_lists_are_one_table() -> None:
    space = ProductSpace("toy", {"width": Count(0, 1_152), "k": Ordinal([3, 5])})
    architecture = space.validate({"width": 7, "k": 5})
    parts = [pair for d in space.trace(architecture) for pair in parts_of(d)]
    assert [(part.name, part.count, index) for part, index in parts] == [("width", 1_153, 7), ("k", 2, 1)]

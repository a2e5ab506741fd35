from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Invalid, Recording, Space, Uniform, first_allowed
from archsmith.space.base import completed_walks
from archsmith.space.bisection import Bisected, bisection_code
from archsmith.space.module_space import ModuleSpace
from archsmith.space.modules import (
    Affine,
    BatchNormalization,
    Concat,
    Conv2D,
    Dropout,
    Empty,
    MaxPooling2D,
    MaybeSwap,
    Module,
    Optional,
    Or,
    ReLU,
    Repeat,
    RepeatTied,
    Residual,
    Sigmoid,
    Tanh,
    UserHyperparams,
    window_output,
)
from archsmith.testing.space import SpaceContract

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "deeparchitect.json").read_text())["cases"]
IMAGE = (3, 8, 8)

SPACES: dict[str, Module] = {
    "concat of conv and affine": Concat([Conv2D([8, 16], [1, 3, 5], [1, 2]), ReLU(), Affine([10, 20])]),
    "tied repeat": Concat(
        [
            RepeatTied(
                Concat(
                    [Conv2D([8, 16], [3, 5]), MaybeSwap(ReLU(), BatchNormalization()), Optional(Dropout([0.5, 0.9]))]
                ),
                [1, 2, 4],
            ),
            Affine([10]),
        ]
    ),
    "or of unequal branches": Or(
        [Empty(), Concat([Affine([4, 8]), Or([ReLU(), Tanh(), Sigmoid()])]), Dropout([0.1, 0.2])]
    ),
}


class TestUntied(SpaceContract):
    lossless: ClassVar = ("one-hot", "ordinal")

    @pytest.fixture
    def space(self) -> Space:
        body = Repeat(Residual(Concat([Conv2D([4, 8], [3, 7], [1, 2], ["SAME", "VALID"]), Optional(ReLU())])), [1, 2])
        return ModuleSpace("untied", Concat([body, UserHyperparams(lr=[0.1, 0.01]), Affine([10])]), IMAGE)


class TestTied(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return ModuleSpace("tied", SPACES["tied repeat"], IMAGE)


@pytest.mark.parametrize("name", SPACES)
def test_published_counts_are_those_of_the_enumeration(name: str) -> None:
    expected = GOLDEN[f"number of fully specified models: {name}"]["expected"]
    space = ModuleSpace("counted", SPACES[name], IMAGE)
    assert space.size == expected == len(set(space.enumerate()))


def test_single_values_are_never_asked_for() -> None:
    space = ModuleSpace("one", Concat([Conv2D([8], [3]), ReLU(), Affine([10, 20]), Dropout([0.5])]), IMAGE)
    asked = Recording(first_allowed)
    space.walk(asked)
    expected = GOLDEN["singleton domains are propagated: first choice presented"]["expected"]
    assert [list(each.options) for each in asked.decisions] == [expected["choices"]]  # type: ignore[arg-type]
    chosen = space.validate({"2-Affine/units": 20})
    assert list(space.output_shape(chosen)) == GOLDEN["output dims after the only choice"]["expected"]


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("padded dims")])
def test_window_outputs(name: str) -> None:
    case = GOLDEN[name]["input"]
    found = [window_output(case[side], case["window"], case["stride"], case["padding"]) for side in ("h", "w")]
    assert found == GOLDEN[name]["expected"]


@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("residual output dims, stride 2 and more channels", Residual(Conv2D([16], [3], [2])), (3, 8, 8)),
        ("residual output dims, rank change", Residual(Affine([50])), (3, 4, 4)),
    ],
)
def test_residual_shapes(name: str, module: Module, shape: tuple[int, ...]) -> None:
    found = ModuleSpace("residual", module, shape)
    given = found.output_shape(found.validate({}))
    last = (*given[1:], given[0]) if len(given) == 3 else given
    assert list(last) == GOLDEN[name]["expected"]


@pytest.mark.parametrize("count", [5, 8])
def test_bisection_codes(count: int) -> None:
    expected = GOLDEN[f"bisection codes for {count} values"]["expected"]
    assert {str(i): bisection_code(i, count) for i in range(count)} == expected
    for index in range(count):
        answers = iter(expected[str(index)])
        bisected = Bisected(lambda *_, answers=answers: int(next(answers)))
        assert bisected("path", tuple("abcdefgh"[:count]), None, "group") == "abcdefgh"[index]
    masked = Bisected(lambda path, *_: {"x?0-2": 1}[path])
    assert masked("x", ("a", "b", "c"), np.array([True, False, True]), "g") == "c"


def test_samples_are_uniform_at_every_decision() -> None:
    space = ModuleSpace("or", Or([ReLU(), Or([Tanh(), Sigmoid(), Empty()])]), (5,))
    rng = np.random.default_rng(0)
    draws = 6_000
    counts = Counter(tuple(space.tokens(space.sample(rng))) for _ in range(draws))
    expected = {"ReLU": 1 / 2, "Tanh": 1 / 6, "Sigmoid": 1 / 6, "Empty": 1 / 6}
    for name, share in expected.items():
        assert abs(counts[(name,)] - draws * share) < 4 * (draws * share * (1 - share)) ** 0.5


def test_what_does_not_fit_is_not_counted() -> None:
    space = ModuleSpace("narrow", Repeat(Conv2D([1], [3, 7], paddings=["VALID"]), [1, 2]), (1, 8, 8))
    # one copy: 3 or 7 fit; two copies: 3-3 fits, 7 leaves 2 pixels and 3-7 needs 7 of 6
    assert space.size == 3 == len(list(completed_walks(space.walk)))
    with pytest.raises(UserError, match="architecture"):
        space.validate({"times": 2, "copy0/size": 7, "copy1/size": 3})
    with pytest.raises(UserError, match=r"needs a feature map \(C, H, W\)"):
        ModuleSpace("flat", Concat([Affine([4]), Conv2D([8], [3])]), IMAGE).sample(np.random.default_rng(0))


def test_equal_networks_have_equal_network_digests() -> None:
    space = ModuleSpace("same", Concat([Optional(ReLU()), Or([ReLU(), Empty()])]), (4,))
    by_digest = Counter(each.network_digest for each in space.enumerate())
    # (empty, relu) equals (relu, empty); (relu, relu) and (empty, empty) stand alone
    assert sorted(by_digest.values()) == [1, 1, 2]


def test_published_values_and_replay() -> None:
    space = ModuleSpace("user", Concat([UserHyperparams(lr=[0.1, 0.01], batch=[32]), Affine([10, 20])]), (4,))
    sample = space.sample(np.random.default_rng(1))
    assert set(space.published(sample)) == {"lr", "batch"}
    assert space.walk(lambda path, *_: sample[path]) == sample
    assert space.program(sample) == space.program(space.replay(sample, np.random.default_rng(2)))
    assert isinstance(space.decode("one-hot", np.ones_like(space.encode(sample, "one-hot"))), Invalid)


def test_tied_copies_are_asked_once() -> None:
    space = ModuleSpace("tied", SPACES["tied repeat"], IMAGE)
    recording = Recording(Uniform(np.random.default_rng(3)))
    sample = space.walk(recording)
    assert len(recording.decisions) == len({each.path for each in recording.decisions}) <= 6
    four = space.validate({**sample, "0-RepeatTied/times": 4})
    assert Counter(space.tokens(four))["Conv2D"] == 4


def test_bad_expressions_say_so() -> None:
    with pytest.raises(UserError, match=r"Dropout\.keep: got \[0\]"):
        Dropout([0])
    with pytest.raises(UserError, match=r"Conv2D\.filters: got \[\]"):
        Conv2D([], [3])
    with pytest.raises(UserError, match=r"padding: got \['same'\]"):
        MaxPooling2D([2], [2], ["same"])
    with pytest.raises(
        UserError, match=r"UserHyperparams\.lr: got \[0\.1, 0\.1\]; allowed: at least one value, all diff"
    ):
        UserHyperparams(lr=[0.1, 0.1])
    with pytest.raises(UserError, match=r"Or\.modules: got \[\]"):
        Or([])
    with pytest.raises(UserError, match=r"RepeatTied: got \[0\]"):
        RepeatTied(ReLU(), [0])

import numpy as np
import pytest
from growing_samples import GOLDEN

from archsmith.core.errors import UserError
from archsmith.families.densenet_space import DenseSpace, ratio_stem
from archsmith.families.plain_space import LARGE_WIDTHS, PlainSpace
from archsmith.space import Architecture, Space
from archsmith.space.growing import GrowingSpace, Layer, next_width
from archsmith.testing.space import SpaceContract

START = "conv-4-3 pool conv-4-3 pool conv-4-3 pool conv-4-3 pool fc-8"
SMALL = {"filters": (4, 8), "units": (8, 16), "kernels": (3, 5), "blocks": 2, "depth": 2}


class TestPlainSpace(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return PlainSpace(depth=4, longest=20)


class TestSmallPlainSpace(SpaceContract):
    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        return PlainSpace(**{**SMALL, "blocks": 1, "longest": 4})


class TestDenseSpace(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return DenseSpace(depth=6, longest=15)


def codes(space, tokens):
    return [space.vocabulary.index(token) + 1 for token in tokens]


def test_the_published_vocabulary_and_codes():
    case = GOLDEN["encoder vocabulary and code of the start net"]
    space = PlainSpace()
    given = case["input"]
    assert (list(space.filters), list(space.units)) == (given["filters"], given["units"])
    assert list(space.kernels) == given["kernels"]
    assert len(space.vocabulary) + 1 == case["expected"]["size"]  # and one for padding
    tokens = space.tokens(space.start())
    assert list(tokens) == given["net"]
    assert codes(space, tokens) == case["expected"]["codes"]


@pytest.mark.parametrize("space", [PlainSpace(), DenseSpace()], ids=["plain", "dense"])
def test_strings_fit_the_encoder(space):
    assert isinstance(space, GrowingSpace)
    for seed in range(20):
        tokens = space.tokens(space.sample(np.random.default_rng(seed)))
        assert len(tokens) <= space.longest == 50
        assert set(tokens) <= set(space.vocabulary)


def test_strings_come_back():
    space = PlainSpace()
    assert space.from_tokens(START.split()) == space.start()
    for seed in range(5):
        sample = space.sample(np.random.default_rng(seed))
        assert space.from_tokens(space.tokens(sample)) == sample
    for text, message in (
        ("conv-4-3 fc-8", "4 groups of convolutions"),
        (START.replace("conv-4-3", "conv-5-3"), "filters"),
        (START + " conv-4-3", "4 groups of convolutions"),
        ("dense", "conv-<filters>-<kernel>, fc-<units> or pool"),
    ):
        with pytest.raises(UserError, match=message):
            space.from_tokens(text.split())


def test_widths_go_to_the_next_larger_value():
    space = PlainSpace()
    full = space.from_tokens(START.replace("conv-4-3 pool fc-8", "conv-40-3 pool fc-8 fc-80").split())
    edits = space.widenings(full)
    assert edits == [("widen", b, 0, 8) if i % 2 == 0 else None for b in range(3) for i in range(2)] + [
        None,
        None,
        ("widen", 4, 0, 16),
        None,
    ]
    assert next_width(12, LARGE_WIDTHS["filters"]) == 16 and next_width(640, LARGE_WIDTHS["filters"]) is None
    large = PlainSpace(filters=sorted({*space.filters, *LARGE_WIDTHS["filters"]}))
    assert large.widenings(large.start(), LARGE_WIDTHS)[0] == ("widen", 0, 0, 16)
    dense = DenseSpace()
    assert dense.widenings(dense.start()) == [("widen", 0, 0, 6), None, ("widen", 1, 0, 6), None, ("widen", 2, 0, 6)]


def test_deepening_is_masked_to_what_is_there():
    space = PlainSpace()
    net = space.from_tokens(START.replace("fc-8", "fc-8 fc-8 fc-8").split())
    assert space.deepening_mask(net, ()) == [True] * 5
    assert space.deepening_mask(net, (4,)) == [True] * 3 + [False] * 7
    assert space.deepening_mask(net, (0,)) == [True] + [False] * 9
    assert space.deepening_mask(net, (0, 0)) == [True] * 3
    assert space.deepening_mask(net, (4, 2)) is None  # no kernel behind linear layers
    assert space.deepening(net, (4, 2, 0)) == ("deepen", 4, 2)
    assert space.deepening(net, (0, 0, 2)) == ("deepen", 0, 0, 5)
    full = space.grown(net, [("deepen", 4, 0)] * 7)
    assert space.deepening_mask(full, ()) == [True] * 4 + [False]
    longest = space.of_layers([[Layer(4, 3)] * 10] * 4 + [[Layer(8)] * 6])
    assert len(space.tokens(longest)) == 50 and space.deepening_mask(longest, ()) == [False] * 5
    dense = DenseSpace()
    assert dense.deepening_mask(dense.start(), (1,)) == [True] + [False] * 19
    assert dense.heads == (3, 20)


def test_new_layers_have_the_width_of_the_one_before():
    space = PlainSpace()
    grown = space.grown(space.start(), [("widen", 1, 0, 8), ("deepen", 1, 0, 5), ("deepen", 4, 0)])
    expected = "conv-4-3 pool conv-8-3 conv-8-5 pool conv-4-3 pool conv-4-3 pool fc-8 fc-8"
    assert " ".join(space.tokens(grown)) == expected


def test_stem_and_transitions_keep_their_ratio_and_never_shrink():
    space = DenseSpace()
    assert space.dense(space.start()) == (8, ((4,), (4,), (4,)), (6, 5))
    net = space.grown(space.start(), [("widen", 0, 0, 12), ("widen", 1, 0, 6)])
    assert space.dense(net) == (8, ((12,), (6,), (4,)), (10, 8))
    settled = space.grown(net, space.settling(net))
    assert space.dense(settled) == (14, ((12,), (6,), (4,)), (13, 9))  # int(2 * 22 / 3) = 14
    narrow = space.grown(settled, [("deepen", 2, 0)] * 5)
    assert ratio_stem(space.dense(narrow).growths) == 10
    again = space.grown(narrow, space.settling(narrow))
    assert space.dense(again).stem == 14
    with pytest.raises(UserError, match="at least 14, which the stem has"):
        space.grown(again, [("stem", 10)])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("space", [PlainSpace(**SMALL), DenseSpace(growths=(4, 6, 8), depth=4)], ids=["plain", "dense"])
def test_matches_are_edits_that_lead_there(space, seed):
    rng = np.random.default_rng(seed)
    parent = space.start()
    child = parent
    for _ in range(6):
        options = [edit for edit in space.widenings(child) if edit is not None]
        chosen: list[int] = []
        while len(chosen) < len(space.heads) and any(mask := space.deepening_mask(child, chosen) or [True]):
            chosen.append(int(rng.choice(np.flatnonzero(mask))))
        if len(chosen) == len(space.heads):
            options.append(space.deepening(child, chosen))
        if options:
            child = space.grown(child, [options[int(rng.integers(len(options)))]])
    edits = space.match(parent, child)
    assert edits is not None
    assert space.grown(parent, edits) == child
    if child != parent:
        assert space.match(child, parent) is None
    for other in (space.sample(rng) for _ in range(3)):
        found = space.match(child, other)
        assert found is None or space.grown(child, found) == other


def test_names_tell_settings_apart_and_settings_come_back():
    space = PlainSpace(**SMALL)
    again = PlainSpace(**space.settings())
    assert space.name == again.name != PlainSpace().name == "plain"
    assert DenseSpace(**DenseSpace(depth=3).settings()).name != DenseSpace().name == "dense"
    assert isinstance(again.start(), Architecture)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PlainSpace(filters=(8, 4)), r"plain\.filters: got \(8, 4\); allowed: positive integers, ascending"),
        (lambda: PlainSpace(kernels=(2, 3)), r"plain\.kernels: got \(2, 3\); allowed: odd numbers"),
        (lambda: PlainSpace(longest=8), "longest from 2 \\* blocks \\+ 1"),
        (lambda: DenseSpace(growths=()), r"dense\.growths"),
        (lambda: DenseSpace(reduction=0.0), r"dense\.reduction: got 0.0"),
        (lambda: DenseSpace(depth=0), "blocks and depth from 1"),
        (lambda: DenseSpace().uniform(12, 41), r"depth: got 41; allowed: 4 \+ 6 n"),
        (lambda: PlainSpace().grown(PlainSpace().start(), [("shrink", 0, 0)]), "edit: got .*shrink"),
        (lambda: PlainSpace().grown(PlainSpace().start(), [("widen", 0, 1, 8)]), "a layer of blocks with"),
        (lambda: PlainSpace().grown(PlainSpace().start(), [("widen", 4, 0, 4)]), "a width of at least 8"),
        (lambda: PlainSpace().grown(PlainSpace().start(), [("deepen", 4, 0, 3)]), "a kernel size behind convolutions"),
        (lambda: PlainSpace().grown(PlainSpace().start(), [("widen", 0, 0, 9)]), "filters"),
        (lambda: PlainSpace().grown(PlainSpace().start(), [("widen", 0, 0, "8")]), "edit: got .*; allowed: a name and"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()

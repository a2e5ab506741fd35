import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.tasks.split import first_per_class, planned_splits, shuffled, split_off

NAMES = ("a", "b", "c")


def test_shuffle_golden():
    # Ranks of the first raw words of PCG64; a change here changes every recorded split and every resumed run.
    assert shuffled(8, 0, "shuffle", 0).tolist() == [5, 6, 0, 3, 4, 2, 1, 7]
    assert sorted(shuffled(1000, 1, "x").tolist()) == list(range(1000))
    assert not np.array_equal(shuffled(1000, 1, "x"), shuffled(1000, 2, "x"))


@given(
    counts=st.lists(st.integers(4, 40), min_size=3, max_size=3), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_split_is_stratified_and_complete(counts, fraction, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(3), counts))
    rest, taken = split_off(np.arange(len(labels)), labels, fraction=fraction, stream=("t", "valid"), class_names=NAMES)
    assert np.array_equal(np.sort(np.concatenate([rest, taken])), np.arange(len(labels)))
    for c, count in enumerate(counts):
        assert (labels[taken] == c).sum() == max(1, round(fraction * count))


def test_first_per_class_keeps_order():
    labels = np.array([1, 0, 1, 1, 0, 2])
    assert first_per_class(np.arange(6), labels, 2).tolist() == [0, 1, 2, 4, 5]
    assert first_per_class(np.array([2, 3, 5]), labels, 1).tolist() == [2, 5]


def test_missing_parts_are_split_off_without_overlap():
    labels = np.arange(300) % 3
    splits = planned_splits("t", labels, {"train": np.arange(300)}, class_names=NAMES)
    assert {k: len(v) for k, v in splits.items()} == {"train": 216, "valid": 24, "test": 60}
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(300))


def test_the_test_part_does_not_depend_on_the_valid_fraction():
    labels = np.arange(300) % 3
    one, two = (
        planned_splits("t", labels, {"train": np.arange(300)}, class_names=NAMES, valid_fraction=f)["test"]
        for f in (0.1, 0.4)
    )
    assert np.array_equal(one, two)


def test_split_belongs_to_the_name_of_the_task():
    labels = np.arange(300) % 3
    one, two = (planned_splits(n, labels, {"train": np.arange(300)}, class_names=NAMES)["test"] for n in ("t", "u"))
    assert not np.array_equal(one, two)


def test_given_parts_stay_and_limit_takes_the_first_of_each_class():
    labels = np.arange(90) % 3
    parts = {"train": np.arange(60), "valid": np.arange(60, 75), "test": np.arange(75, 90)}
    assert all(np.array_equal(v, parts[k]) for k, v in planned_splits("t", labels, parts, class_names=NAMES).items())
    limited = planned_splits("t", labels, parts, class_names=NAMES, limit=2)
    assert {k: v.tolist() for k, v in limited.items()} == {
        "train": [0, 1, 2, 3, 4, 5],
        "valid": [60, 61, 62, 63, 64, 65],
        "test": [75, 76, 77, 78, 79, 80],
    }


def test_fraction_for_a_part_that_is_given():
    labels = np.arange(90) % 3
    with pytest.raises(
        UserError, match=r"test_fraction: got 0.3; allowed: nothing here, because the data brings its own test"
    ):
        planned_splits(
            "t", labels, {"train": np.arange(60), "test": np.arange(60, 90)}, class_names=NAMES, test_fraction=0.3
        )


def test_class_with_a_single_image():
    labels = np.array([0, 0, 0, 1, 2, 2])
    with pytest.raises(
        UserError, match="labels: got class 'b' with 1 training example; allowed: enough examples per class"
    ):
        split_off(np.arange(6), labels, fraction=0.2, stream=("t", "valid"), class_names=NAMES)

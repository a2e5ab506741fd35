import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.tasks import Augment, open_task


@pytest.fixture(scope="module")
def digits():
    return open_task("digits")


def test_recorded_data_and_split(digits):
    # The hash covers the pixels, the labels and every index of the split: it changes only with the data set itself.
    assert digits.digest == "e19457dee3086e7baeb7c0693ea58d1e3b262ce89077d6be6fcf5bc2aefb55a6"
    assert {split: digits.size(split) for split in digits.splits} == {"train": 1151, "valid": 287, "test": 359}
    assert digits.input_shape == (1, 8, 8)
    assert digits.class_names == tuple("0123456789")


def test_split_covers_all_images_without_overlap(digits):
    indices = np.concatenate([digits.split_indices(split) for split in digits.splits])
    assert sorted(indices.tolist()) == list(range(1797))


def test_split_is_stratified(digits):
    from sklearn.datasets import load_digits

    labels = load_digits().target
    whole = np.bincount(labels)
    for split, share in (("test", 0.2), ("valid", 0.16)):
        assert np.abs(np.bincount(labels[digits.split_indices(split)]) - share * whole).max() <= 1


def test_defaults_and_options(digits):
    assert digits.augment == Augment(crop=1)
    assert open_task("digits", augment=False).augment == Augment()
    assert open_task("digits", resolution=16).augment == Augment(crop=2)
    limited = open_task("digits", limit=10)
    assert {split: limited.size(split) for split in limited.splits} == {"train": 80, "valid": 20, "test": 100}
    assert np.isin(limited.split_indices("test"), digits.split_indices("test")).all()
    larger = open_task("digits", valid_fraction=0.5)
    assert np.array_equal(larger.split_indices("test"), digits.split_indices("test"))
    assert larger.size("valid") > 700


def test_a_linear_classifier_learns_the_training_part(digits):
    from sklearn.linear_model import LogisticRegression

    train = next(digits.batches("train", batch_size=1151))
    model = LogisticRegression(max_iter=500).fit(train.inputs.flatten(1).numpy(), train.targets.numpy())
    scores = digits.evaluate(lambda x: x.new_tensor(model.predict_log_proba(x.flatten(1).numpy())), "test")
    assert scores["accuracy"] > 0.94
    assert scores["examples"] == 359


def test_wrong_options():
    with pytest.raises(UserError, match="data: got '/tmp'; allowed: nothing for the task digits"):
        open_task("digits", data="/tmp")
    with pytest.raises(UserError, match=r"test_fraction: got 0.2; allowed: nothing for the task digits"):
        open_task("digits", test_fraction=0.2)

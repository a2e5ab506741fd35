import numpy as np
import pytest
import torch
from darts_runs import small_task

from archsmith.core.errors import UserError
from archsmith.tasks import LoaderTask
from archsmith.train.parts import filled_up


def test_validation_examples_are_filled_up_from_the_training_part():
    task = small_task()
    train, valid = task.split_indices("train"), task.split_indices("valid")
    weights, logits = filled_up(task, 0.5, 3)
    wanted = -(-(len(train) + len(valid)) // 2)
    judged = weights.split_indices("valid")
    assert len(judged) == wanted > len(valid) and set(valid) <= set(judged)
    assert not set(judged) & set(weights.split_indices("train"))
    assert set(judged) | set(weights.split_indices("train")) == {*train, *valid}
    assert np.array_equal(logits.split_indices("train"), judged)
    assert np.array_equal(weights.split_indices("test"), task.split_indices("test"))
    assert np.array_equal(task.split_indices("train"), train)  # the given task is left as it is
    again, other = filled_up(task, 0.5, 3)[0], filled_up(task, 0.5, 4)[0]
    assert np.array_equal(again.split_indices("train"), weights.split_indices("train"))
    assert not np.array_equal(other.split_indices("train"), weights.split_indices("train"))


def test_enough_validation_examples_move_nothing():
    task = small_task()
    weights, logits = filled_up(task, 0.05, 0)
    assert np.array_equal(weights.split_indices("train"), task.split_indices("train"))
    assert np.array_equal(logits.split_indices("train"), task.split_indices("valid"))


def test_what_cannot_be_parted_is_refused():
    with pytest.raises(UserError, match=r"valid_fraction: got 0\.99; allowed: a share that leaves training examples"):
        filled_up(small_task(), 0.99, 0)
    pair = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
    task = LoaderTask(pair, pair, num_classes=2)
    with pytest.raises(UserError, match="whose parts can be exchanged"):
        filled_up(task, 0.1, 0)

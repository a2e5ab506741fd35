"""The readers on real files, where they are at hand."""

import numpy as np
import pytest
import torch
from shared_data import cifar10_arrays, fashion_mnist_arrays, shared_data

from archsmith.tasks import open_task


def test_fashion_mnist_files_are_read_as_they_are():
    task = open_task("fashion-mnist", data=shared_data("fashion_mnist"))
    arrays = fashion_mnist_arrays()
    assert [task.size(split) for split in task.splits] == [3600, 400, 1000]
    pixels = task.examples(1000) * task.normalisation["std"][0] + task.normalisation["mean"][0]
    assert np.array_equal((pixels[:, 0] * 255).round().numpy(), arrays["x_test"])
    labels = torch.cat([batch.targets for batch in task.batches("test", batch_size=300)])
    assert np.array_equal(labels.numpy(), arrays["y_test"])


@pytest.fixture
def cifar10(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **cifar10_arrays())
    return tmp_path / "cifar10.npz"


def test_cifar10_subset(cifar10):
    task = open_task("cifar10", data=cifar10)
    assert [task.size(split) for split in task.splits] == [3600, 400, 1000]
    # The well-known statistics of the complete training set, to the precision that 3,600 of 50,000 images allow.
    assert task.normalisation["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)
    assert task.normalisation["std"] == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.01)
    labels = torch.cat([batch.targets for batch in task.batches("valid", batch_size=64)])
    assert torch.bincount(labels).tolist() == [40] * 10


def test_cifar10_at_half_resolution_keeps_the_mean(cifar10):
    whole, half = open_task("cifar10", data=cifar10), open_task("cifar10", data=cifar10, resolution=16)
    assert half.input_shape == (3, 16, 16) and half.augment.crop == 2
    assert half.normalisation["mean"] == pytest.approx(whole.normalisation["mean"], abs=1e-3)
    assert max(half.normalisation["std"]) < max(whole.normalisation["std"])

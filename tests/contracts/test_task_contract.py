"""Every task that can be made without outside data obeys the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_samples import cifar_arrays, random_images, write_cifar_batches, write_idx_folder, write_image_folder
from torch.utils.data import DataLoader, TensorDataset

from archsmith.tasks import Augment, ImageClassification, LoaderTask, open_task, task_table
from archsmith.testing.tasks import TaskContract

EVERYTHING = Augment(crop=1, flip=True, cutout=2, mixup=0.4, label_smoothing=0.1)


def _digits(folder):
    return open_task("digits", limit=20)


def _mnist(folder):
    return open_task("mnist", data=write_idx_folder(folder, suffix=""), mixup=1.0)


def _fashion(folder):
    return open_task("fashion-mnist", data=write_idx_folder(folder), resolution=14)


def _cifar_npz(folder):
    np.savez(folder / "cifar10.npz", **cifar_arrays())
    return open_task("cifar10", data=folder, cutout=8, channels_last=True)


def _cifar_batches(folder):
    return open_task("cifar10", data=write_cifar_batches(folder))


def _images(folder):
    if not (folder / "cat").exists():
        write_image_folder(folder, per_class=40)
    return open_task("images", data=folder, resolution=8)


def _arrays(folder):
    x, y = random_images(120, (2, 6, 6))
    np.savez(
        folder / "a.npz",
        x_train=x[:80],
        y_train=y[:80],
        x_valid=x[80:100],
        y_valid=y[80:100],
        x_test=x[100:],
        y_test=y[100:],
    )
    return open_task("arrays", data=folder / "a.npz")


def _in_memory(folder):
    x, y = random_images(99, (8, 8))
    return ImageClassification.from_arrays((x / 255).astype(np.float32), y, augment=EVERYTHING, channels_last=True)


def _dataset(n, seed):
    x, y = random_images(n, (1, 6, 6), seed=seed)
    return TensorDataset(torch.from_numpy(x).float() / 255, torch.from_numpy(y))


def _loader_pair(folder):
    return LoaderTask(
        DataLoader(_dataset(50, 0), batch_size=16, shuffle=True),
        DataLoader(_dataset(21, 1), batch_size=8),
        num_classes=3,
        augment=EVERYTHING,
    )


def _loader_triple(folder):
    generator = torch.Generator()
    return LoaderTask(
        DataLoader(_dataset(50, 0), batch_size=16, shuffle=True, generator=generator, drop_last=True),
        DataLoader(_dataset(21, 1), batch_size=8, generator=generator),
        DataLoader(_dataset(22, 2), batch_size=8),
        num_classes=3,
    )


BY_NAME = {
    "digits": [_digits],
    "mnist": [_mnist],
    "fashion-mnist": [_fashion],
    "cifar10": [_cifar_npz, _cifar_batches],
    "images": [_images],
    "arrays": [_arrays],
}
IN_PYTHON = [_in_memory, _loader_pair, _loader_triple]


class TestTasks(TaskContract):
    @pytest.fixture(
        params=[*(make for group in BY_NAME.values() for make in group), *IN_PYTHON], ids=lambda f: f.__name__
    )
    def make_task(self, request, tmp_path):
        return lambda: request.param(tmp_path)


# tests/tasks/test_spoken_digits.py: its outputs are sequences; tests/tasks/test_text_tasks.py: inputs are token ids
ELSEWHERE = {"spoken-digits", "ag-news", "phrases", "sst2", "text"}


def test_every_named_task_is_attached():
    assert {row["name"] for row in task_table() if row["title"] != "from another package"} == {*BY_NAME, *ELSEWHERE}

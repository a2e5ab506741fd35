"""Image classification over arrays in memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.tasks.augment import Augment
from archsmith.tasks.base import Batch, Forward
from archsmith.tasks.bounds import one_of, whole
from archsmith.tasks.classification import classification_loss, classification_scores
from archsmith.tasks.image_data import ImageData, RawImages, image_data
from archsmith.tasks.indexed import IndexedTask
from archsmith.tasks.resize import RESAMPLE, resized
from archsmith.tasks.split import Indices, planned_splits

_CHUNK = 1024


@final
class ImageClassification(IndexedTask):
    """Images in memory with one label each.

    Args:
        name: Name of the task.
        data: Checked images and labels.
        splits: Index arrays into ``data`` for ``"train"``, ``"valid"``, ``"test"``.
        augment: What the training step does to a batch.
        resolution: Resize to this height and width; None keeps the size.
        resample: How, see ``archsmith.tasks.resize.resized``.
        channels_last: Give batches in the channels-last memory format (same values).

    The normalisation is computed per channel from the training split alone. The digest covers the arrays as given, the
    labels, the split and the resizing.

    Raises:
        UserError: ``augment`` does not fit the image size.
    """

    metric = "accuracy"
    resume_note = ""  # the order is a function of seed, epoch and step

    def __init__(
        self,
        name: str,
        data: ImageData,
        splits: Mapping[str, Indices],
        *,
        augment: Augment | None = None,
        resolution: int | None = None,
        resample: str = "auto",
        channels_last: bool = False,
    ) -> None:
        images = data.images if resolution is None else resized(data.images, resolution, resample=resample)
        _, channels, height, width = images.shape
        self.name = name
        self.input_shape = (channels, height, width)
        self.class_names = data.class_names
        self.num_classes = len(data.class_names)
        self.digest = _digest(data, splits, resolution, resample)
        self.splits = tuple(splits)
        self.augment = (augment or Augment()).fitting(height, width)
        mean, std = channel_statistics(images, splits["train"])
        self.normalisation = {"mean": mean.tolist(), "std": std.tolist()}
        self._indices = {split: torch.from_numpy(np.asarray(indices)) for split, indices in splits.items()}
        self._labels = torch.from_numpy(data.labels)
        # Channels-last images are kept as (N, H, W, C): picking rows then gives that format without another copy.
        self._channels_last = channels_last
        self._images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if channels_last else images)
        unit = 255.0 if images.dtype == np.uint8 else 1.0
        self._black = torch.from_numpy(-mean / std).float()
        # One factor and one offset per value, in storage order: broadcasting over three channels would run scalar code.
        values = (height * width, channels) if channels_last else (channels, height * width)
        per_channel = (1, channels) if channels_last else (channels, 1)
        scale = torch.from_numpy(1.0 / (unit * std)).float().reshape(per_channel)
        self._scale = scale.expand(values).flatten()
        self._shift = self._black.reshape(per_channel).expand(values).flatten()

    @classmethod
    def from_arrays(
        cls,
        x_train: NDArray[Any],
        y_train: NDArray[Any],
        *,
        x_valid: NDArray[Any] | None = None,
        y_valid: NDArray[Any] | None = None,
        x_test: NDArray[Any] | None = None,
        y_test: NDArray[Any] | None = None,
        name: str = "arrays",
        class_names: Sequence[str] | None = None,
        valid_fraction: float | None = None,
        test_fraction: float | None = None,
        augment: Augment | None = None,
        resolution: int | None = None,
        resample: str = "auto",
        channels_last: bool = False,
    ) -> ImageClassification:
        """Make a task from numpy arrays; parts that are not given are split off the training part, stratified.

        Args:
            x_train: Images ``(N, H, W)`` or ``(N, C, H, W)``, uint8 or float32 in [0, 1].
            y_train: Labels ``(N,)``, integers from 0.
            x_valid: Images to choose by.
            y_valid: Their labels.
            x_test: Images for the final number.
            y_test: Their labels.
            name: Name of the task; it also seeds the split.
            class_names: One name per class; the numbers when None.
            valid_fraction: Share split off for the valid part, 0.1 when None.
            test_fraction: Share split off for the test part, 0.2 when None.
            augment: What the training step does; nothing when None.
            resolution: Resize to this height and width.
            resample: ``"auto"``, ``"area"`` or ``"bilinear"``.
            channels_last: Memory format of the batches.

        Raises:
            UserError: Names the array or option that is wrong.
        """
        given = {"train": (x_train, y_train), "valid": (x_valid, y_valid), "test": (x_test, y_test)}
        parts = {}
        for part, (x, y) in given.items():
            if (x is None) != (y is None):
                raise UserError(
                    f"{'x' if x is None else 'y'}_{part}", None, allowed=f"both x_{part} and y_{part}, or none"
                )
            if x is not None:
                parts[part] = (x, y)
        if resolution is not None:
            whole("resolution", resolution, low=4, high=1024)
        one_of("resample", resample, RESAMPLE)
        data = image_data(RawImages(parts, None if class_names is None else tuple(class_names)))
        splits = planned_splits(
            name,
            data.labels,
            data.parts,
            class_names=data.class_names,
            valid_fraction=valid_fraction,
            test_fraction=test_fraction,
        )
        return cls(
            name,
            data,
            splits,
            augment=augment,
            resolution=resolution,
            resample=resample,
            channels_last=channels_last,
        )

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Task.loss``."""
        return classification_loss(
            forward,
            batch,
            augment=self.augment,
            num_classes=self.num_classes,
            fill=self._black,
            generator=generator,
        )

    def evaluate(self, forward: Forward, split: str, *, batch_size: int = 256) -> dict[str, float | int]:
        """See ``Task.evaluate``."""
        return classification_scores(forward, self.batches(split, batch_size=batch_size), num_classes=self.num_classes)

    def scored_on_training(self) -> ImageClassification:
        """Return the task with its training images as "valid" too: all of them, in order, without augmentation."""
        other = copy.copy(self)
        other._indices = {**self._indices, "valid": self._of("train")}
        return other

    def batch_of(self, chosen: Tensor) -> Batch:
        """See ``IndexedTask.batch_of``."""
        return Batch(self._inputs(chosen), self._labels[chosen])

    def _inputs(self, chosen: Tensor) -> Tensor:
        """Return the normalised images ``chosen``, float32 ``(B, C, H, W)``."""
        picked = self._images.index_select(0, chosen).to(torch.float32)
        picked.view(len(picked), -1).mul_(self._scale).add_(self._shift)
        return picked.permute(0, 3, 1, 2) if self._channels_last else picked


def channel_statistics(images: NDArray[Any], indices: Indices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation per channel of the chosen images, in units where white is 1.

    Sums are float64: for bytes they are exact, hence the same on every machine. A channel without any variation gets
    the deviation 1, so that it becomes zero instead of NaN.

    Args:
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1].
        indices: Which of them.
    """
    channels = images.shape[1]
    unit = 255.0 if images.dtype == np.uint8 else 1.0
    total, squares = np.zeros(channels), np.zeros(channels)
    for first in range(0, len(indices), _CHUNK):
        piece = images[indices[first : first + _CHUNK]].astype(np.float64)
        total += piece.sum(axis=(0, 2, 3))
        squares += np.einsum("bchw,bchw->c", piece, piece)
    pixels = len(indices) * images.shape[2] * images.shape[3]
    mean = total / pixels
    variance = np.maximum(squares / pixels - mean**2, 0.0)
    std = np.sqrt(variance) / unit
    return mean / unit, np.where(std > 1e-6, std, 1.0)


def _digest(data: ImageData, splits: Mapping[str, Indices], resolution: int | None, resample: str) -> str:
    """Return SHA-256 over the arrays as given, the split and what is done to them."""
    header: list[object] = [str(data.images.dtype), data.images.shape, data.class_names]
    if resolution is not None and data.images.shape[2:] != (resolution, resolution):
        header += [resolution, resample]
    digest = hashlib.sha256(repr(header).encode())
    digest.update(np.ascontiguousarray(data.images).data)
    digest.update(data.labels.astype("<i8").data)
    for split, indices in splits.items():
        digest.update(f"{split}:{len(indices)}".encode())
        digest.update(np.ascontiguousarray(indices, dtype="<i8").data)
    return digest.hexdigest()

"""Image arrays with labels: checked once, then trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.split import Indices

Arrays = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class RawImages:
    """What a reader found, not yet checked.

    Attributes:
        parts: ``"train"`` and maybe ``"valid"``, ``"test"`` to pairs (images, labels).
        class_names: Names in label order where the source states them.
    """

    parts: Mapping[str, Arrays]
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class ImageData:
    """Checked images of all parts in one array.

    Attributes:
        images: ``(N, C, H, W)``, uint8, or float32 in [0, 1].
        labels: ``(N,)`` int64 in ``0..K-1``; every class occurs in the training part.
        parts: Index arrays into both, by part.
        class_names: ``K`` names.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    parts: Mapping[str, Indices]
    class_names: tuple[str, ...]


def image_data(raw: RawImages) -> ImageData:
    """Check raw arrays and join them.

    Raises:
        UserError: Names the array (``x_train``, ``y_test``, ...), what it holds and what is allowed.
    """
    if "train" not in raw.parts:
        raise UserError("data", Shown("no training part"), allowed="at least x_train and y_train")
    images, labels, parts, end = [], [], {}, 0
    for part, (x, y) in raw.parts.items():
        images.append(checked_images(f"x_{part}", x))
        labels.append(checked_labels(f"y_{part}", y, len(images[-1])))
        parts[part] = np.arange(end, end + len(images[-1]))
        end += len(images[-1])
        if images[-1].shape[1:] != images[0].shape[1:] or images[-1].dtype != images[0].dtype:
            raise UserError(
                f"x_{part}",
                Shown(f"{images[-1].dtype} images of shape {images[-1].shape[1:]}"),
                allowed=f"what x_train has, {images[0].dtype} images of shape {images[0].shape[1:]}",
            )
    classes = _class_names(labels[0], raw.class_names)
    for part, y in zip(parts, labels, strict=True):
        if y.max() >= len(classes):
            raise UserError(
                f"y_{part}",
                Shown(f"the label {y.max()}"),
                allowed=f"labels of the training part, 0 to {len(classes) - 1}",
            )
    joined = images[0] if len(images) == 1 else np.concatenate(images)
    return ImageData(np.ascontiguousarray(joined), np.concatenate(labels), parts, classes)


def checked_images(field: str, value: Any) -> NDArray[Any]:
    """Return images as ``(N, C, H, W)``, uint8 or float32 in [0, 1].

    Args:
        field: Name for the error text.
        value: Array ``(N, H, W)`` or ``(N, C, H, W)``.

    Raises:
        UserError: Wrong type, shape or range, NaN, or no image at all.
    """
    images = np.asarray(value)
    if images.dtype not in (np.uint8, np.float32):
        raise UserError(
            field,
            Shown(f"dtype {images.dtype}"),
            allowed="uint8 (0 to 255) or float32 (0 to 1)",
            hint="convert with .astype('uint8'), or scale into 0..1 and use .astype('float32').",
        )
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(
            field, Shown(f"shape {np.shape(value)}"), allowed="(N, H, W) or (N, C, H, W), nothing of it zero"
        )
    if images.shape[1] > 4 and images.shape[3] in (1, 3, 4):
        raise UserError(
            field,
            Shown(f"shape {images.shape}, which looks like (N, H, W, C)"),
            allowed="(N, H, W) or (N, C, H, W)",
            hint="move the channels with x.transpose(0, 3, 1, 2).",
        )
    if images.dtype == np.float32:
        if not np.isfinite(images).all():
            bad = int(np.argmax(~np.isfinite(images).reshape(len(images), -1).all(1)))
            raise UserError(
                field, Shown(f"NaN or infinity, first in image {bad}"), allowed="finite numbers from 0 to 1"
            )
        low, high = float(images.min()), float(images.max())
        if low < 0.0 or high > 1.0:
            raise UserError(
                field,
                Shown(f"floats from {low:g} to {high:g}"),
                allowed="floats from 0 to 1",
                hint="divide by the largest value (255 for bytes); normalisation is done by the task.",
            )
    return images


def checked_labels(field: str, value: Any, count: int) -> NDArray[np.int64]:
    """Return labels as ``(N,)`` int64.

    Args:
        field: Name for the error text.
        value: Integer array ``(N,)`` or ``(N, 1)``.
        count: Number of images they belong to.

    Raises:
        UserError: Not integers, another number than ``count``, or negative ones.
    """
    labels = np.asarray(value)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(field, Shown(f"dtype {labels.dtype}"), allowed="integers, 0 for the first class")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != count:
        raise UserError(
            field,
            Shown(f"labels of shape {labels.shape} for {count} images"),
            allowed=f"one label per image, ({count},)",
        )
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise UserError(field, Shown(f"the label {labels.min()}"), allowed="labels from 0, without negative ones")
    return labels


def _class_names(train_labels: NDArray[np.int64], names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names after checking that the training labels are exactly ``0..K-1``."""
    present = np.unique(train_labels)
    count = int(present[-1]) + 1 if names is None else len(names)
    if names is not None and present[-1] >= count:
        raise UserError(
            "class_names", Shown(f"{count} names for the labels 0 to {present[-1]}"), allowed="one name per class"
        )
    if names is not None and len(set(names)) != count:
        raise UserError("class_names", tuple(names), allowed="names that differ")
    if present[0] != 0 and names is None:
        raise UserError(
            "y_train",
            Shown(f"labels from {present[0]} to {present[-1]}"),
            allowed="labels that start at 0",
            hint=f"subtract {present[0]} from every label." if len(present) == count - present[0] else "",
        )
    # A stray huge label must not make a huge list: at most the first few missing ones are looked for.
    if len(present) != count:
        have = set(present.tolist())
        missing = [c for c in range(min(count, len(present) + 5)) if c not in have][:5]
        shown = ", ".join(str(c) if names is None else repr(names[c]) for c in missing)
        raise UserError(
            "y_train",
            Shown(f"no training image of class {shown}" + (" ..." if count - len(present) > len(missing) else "")),
            allowed=f"labels 0 to {count - 1} that all occur",
            hint="number the classes without gaps, or add images of the empty class.",
        )
    if count < 2:
        raise UserError("y_train", Shown("one class only"), allowed="at least 2 classes")
    return tuple(str(c) for c in range(count)) if names is None else tuple(names)

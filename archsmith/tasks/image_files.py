"""The tasks that read images from local files: well-known sets, folders of images, arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.folders import read_folder
from archsmith.tasks.image_data import RawImages, image_data
from archsmith.tasks.options import image_options, image_task
from archsmith.tasks.readers import existing_path, read_images
from archsmith.tasks.vision import ImageClassification

TASKS = (
    {"name": "mnist", "title": "handwritten digits, 28x28 grey", "data": "file or folder", "metric": "accuracy"},
    {"name": "fashion-mnist", "title": "clothing, 28x28 grey", "data": "file or folder", "metric": "accuracy"},
    {"name": "cifar10", "title": "objects and animals, 32x32 colour", "data": "file or folder", "metric": "accuracy"},
    {"name": "images", "title": "your images, one folder per class", "data": "folder", "metric": "accuracy"},
    {"name": "arrays", "title": "your arrays, x_train, y_train ...", "data": "file or folder", "metric": "accuracy"},
)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What is known of a set: its shape, its classes, and the usual augmentation."""

    shape: tuple[int, int, int] | None = None
    class_names: tuple[str, ...] | None = None
    crop_share: float = 0.0
    flip: bool = False


_KNOWN = {
    "mnist": _Known(shape=(1, 28, 28), class_names=tuple("0123456789"), crop_share=2 / 28),
    "fashion-mnist": _Known(
        shape=(1, 28, 28),
        class_names=(
            "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
        ),
        crop_share=2 / 28,
        flip=True,
    ),
    "cifar10": _Known(
        shape=(3, 32, 32),
        class_names=(
            "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
        ),
        crop_share=4 / 32,
        flip=True,
    ),
    "images": _Known(crop_share=1 / 8, flip=True),
    "arrays": _Known(),
}  # fmt: skip


def make(name: str, *, data: Any, options: Mapping[str, Any]) -> ImageClassification:
    """Return one of the tasks above; see ``archsmith.tasks.open_task``."""
    chosen = image_options(name, options)
    known = _KNOWN[name]
    path = existing_path(name, data)
    if name == "images":
        if not path.is_dir():
            raise UserError("data", str(path), allowed="a folder with one sub-folder of images per class")
        raw = read_folder(path, resolution=chosen.resolution, resample=chosen.resample)
    else:
        raw = read_images(path, name=name)
    if known.shape is not None:
        raw = RawImages({part: (_shaped(f"x_{part}", x, known.shape), y) for part, (x, y) in raw.parts.items()})
    checked = image_data(RawImages(raw.parts, known.class_names or raw.class_names))
    return image_task(name, checked, chosen, crop_share=known.crop_share, flip=known.flip)


def _shaped(field: str, images: Any, shape: tuple[int, int, int]) -> Any:
    """Return images as ``(N, *shape)``; the channels may be missing when one, or come last.

    Raises:
        UserError: Another shape.
    """
    channels, height, width = shape
    found = np.shape(images)[1:]
    if found == shape or (channels == 1 and found == (height, width)):
        return images
    if found == (height, width, channels):
        return np.moveaxis(images, 3, 1)
    raise UserError(
        field,
        Shown(f"images of shape {found}"),
        allowed=f"{shape}, or {(height, width, channels)} with the channels last",
    )

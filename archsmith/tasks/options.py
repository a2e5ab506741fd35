"""Options of the named image tasks, and how they become a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from archsmith.core.errors import UserError
from archsmith.tasks.augment import Augment
from archsmith.tasks.bounds import flag, one_of, real, whole
from archsmith.tasks.image_data import ImageData
from archsmith.tasks.resize import RESAMPLE
from archsmith.tasks.split import Indices, planned_splits
from archsmith.tasks.vision import ImageClassification


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What ``open_task`` accepts beside ``data`` for every image task; None means the task's own default.

    Attributes:
        resolution: Resize to this height and width, 4 to 1024.
        resample: ``"auto"``, ``"area"`` or ``"bilinear"``.
        limit: Use the first so many images per class of each given part, for quick trials.
        valid_fraction: Share of the training part that becomes the valid part, 0.01 to 0.5.
        test_fraction: Share that becomes the test part where the data brings none, 0.01 to 0.5.
        channels_last: Memory format of the batches.
        augment: False switches every default augmentation off.
        crop: Largest random shift in pixels.
        flip: Random mirroring.
        cutout: Side of the square cut out, in pixels.
        mixup: Beta parameter of mixing two examples.
        label_smoothing: Share of the target spread over all classes.
    """

    resolution: int | None = None
    resample: str = "auto"
    limit: int | None = None
    valid_fraction: float | None = None
    test_fraction: float | None = None
    channels_last: bool = False
    augment: bool = True
    crop: int | None = None
    flip: bool | None = None
    cutout: int = 0
    mixup: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.resolution is not None:
            whole("resolution", self.resolution, low=4, high=1024)
        one_of("resample", self.resample, RESAMPLE)
        if self.limit is not None:
            whole("limit", self.limit, low=2, high=10**9)
        for field in ("valid_fraction", "test_fraction"):
            if getattr(self, field) is not None:
                real(field, getattr(self, field), low=0.01, high=0.5)
        flag("channels_last", self.channels_last)
        flag("augment", self.augment)

    def augmentation(self, height: int, width: int, *, crop_share: float, flip: bool) -> Augment:
        """Return the settings for images of this size; ``crop_share`` and ``flip`` are the task's defaults.

        Args:
            height: Pixels.
            width: Pixels.
            crop_share: Default shift as a share of the shorter side, rounded to at least one pixel; 0 for none.
            flip: Default mirroring.
        """
        default_crop = max(1, round(crop_share * min(height, width))) if crop_share and self.augment else 0
        return Augment(
            crop=default_crop if self.crop is None else self.crop,
            flip=(flip and self.augment) if self.flip is None else self.flip,
            cutout=self.cutout,
            mixup=self.mixup,
            label_smoothing=self.label_smoothing,
        )


def image_options(task: str, given: Mapping[str, Any]) -> ImageOptions:
    """Return the options after checking their names and values.

    Raises:
        UserError: An unknown name (the known ones are listed), or a value out of bounds.
    """
    known = [f.name for f in fields(ImageOptions)]
    for key in given:
        if key not in known:
            raise UserError(f"option of task {task}", key, allowed=", ".join(known))
    return ImageOptions(**given)


def image_task(
    name: str,
    data: ImageData,
    options: ImageOptions,
    *,
    crop_share: float = 0.0,
    flip: bool = False,
    splits: Mapping[str, Indices] | None = None,
) -> ImageClassification:
    """Make the task that the options describe.

    Args:
        name: Name of the task.
        data: Checked images.
        options: The user's options.
        crop_share: Default random shift as a share of the shorter side.
        flip: Default mirroring.
        splits: The final split; planned from ``data.parts`` and the options when None.
    """
    height, width = (options.resolution,) * 2 if options.resolution else data.images.shape[2:]
    return ImageClassification(
        name,
        data,
        splits
        or planned_splits(
            name,
            data.labels,
            data.parts,
            class_names=data.class_names,
            valid_fraction=options.valid_fraction,
            test_fraction=options.test_fraction,
            limit=options.limit,
        ),
        augment=options.augmentation(height, width, crop_share=crop_share, flip=flip),
        resolution=options.resolution,
        resample=options.resample,
        channels_last=options.channels_last,
    )

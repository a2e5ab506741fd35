"""The handwritten digits embedded in scikit-learn: real data that is always there.

1,797 grey images of 8x8 pixels by 43 people (Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits",
its test part). The split is fixed and stratified: 359 test, 288 valid and 1,150 training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.tasks.image_data import RawImages, image_data
from archsmith.tasks.options import image_options, image_task
from archsmith.tasks.split import planned_splits, split_off
from archsmith.tasks.vision import ImageClassification

TASKS = (
    {
        "name": "digits",
        "title": "handwritten digits, 1,797 grey images of 8x8 (in scikit-learn)",
        "data": "embedded",
        "metric": "accuracy",
    },
)

_VALID, _TEST = 0.2, 0.2


def make(name: str, *, data: Any, options: Mapping[str, Any]) -> ImageClassification:
    """Return the task ``digits``; see ``archsmith.tasks.open_task``."""
    from sklearn.datasets import load_digits

    if data is not None:
        raise UserError("data", str(data), allowed="nothing for the task digits, whose images are embedded")
    chosen = image_options(name, options)
    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)  # values 0..16, so that the division is exact
    checked = image_data(RawImages({"train": (images, bunch.target)}))
    # The test part is taken first, with a share of its own: it is the same whatever the options say.
    if chosen.test_fraction is not None:
        raise UserError(
            "test_fraction", chosen.test_fraction, allowed="nothing for the task digits, whose test part is fixed"
        )
    names, labels = checked.class_names, checked.labels
    rest, test = split_off(checked.parts["train"], labels, fraction=_TEST, stream=(name, "test"), class_names=names)
    parts = {"train": rest, "test": test}
    splits = planned_splits(
        name,
        labels,
        parts,
        class_names=names,
        valid_fraction=chosen.valid_fraction or _VALID,
        limit=chosen.limit,
    )
    return image_task(name, checked, chosen, crop_share=1 / 8, splits=splits)

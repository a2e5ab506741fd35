"""A small family and an evaluator that trains it; other processes import them, so the imports are few."""

from typing import Any

from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.families.modules import ModuleFamily
from archsmith.space.modules import Affine, Concat, Conv2D, Dropout, MaxPooling2D, ReLU
from archsmith.tasks.base import Task

MODULE = Concat([Conv2D([4, 6], [3]), ReLU(), MaxPooling2D([2], [2]), Dropout([0.9]), Affine([10])])
FAMILY = ModuleFamily(image=(1, 8, 8), num_classes=10, module=MODULE, label="tiny")
QUICK: dict[str, Any] = {"epochs": 3, "batch_size": 32, "lr": 0.1, "costs": ()}


def evaluator_on(task: Task, **changes: Any) -> TrainedEvaluator:
    return TrainedEvaluator(FAMILY, task, **{**QUICK, **changes})

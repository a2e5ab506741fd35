"""Who learns from which examples in a search."""

from __future__ import annotations

from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.tasks.base import Task
from archsmith.tasks.split import shuffled


def filled_up(task: Task, fraction: float, seed: int) -> tuple[Task, Task]:
    """Return the task for the weights and the one for the logits: the latter learn from the validation examples.

    Where these are fewer than a share of all, training examples are moved over to reach it. For what follows the search
    the given task is as it was: the moved ones are training examples again.

    Args:
        task: Over examples in memory.
        fraction: Share of training and validation examples together that the validation part must have, rounded up.
        seed: Names which examples are moved.

    Returns:
        The task with fewer training and more validation examples, and the same one with the validation examples in its
        training part too.

    Raises:
        UserError: The task cannot be parted, or nothing would be left to train on.
    """
    parted: Any = task
    if not hasattr(task, "with_splits"):
        raise UserError("task", task.name, allowed="a task over examples in memory, whose parts can be exchanged")
    train, valid = parted.split_indices("train"), parted.split_indices("valid")
    missing = max(0, int(np.ceil(fraction * (len(train) + len(valid)) - 1e-9)) - len(valid))
    if missing >= len(train):
        raise UserError("valid_fraction", fraction, allowed="a share that leaves training examples")
    moved = train[shuffled(len(train), seed, "moved")[:missing]]
    judged = np.sort(np.concatenate([valid, moved]))
    weights: Any = parted.with_splits({"train": np.setdiff1d(train, moved), "valid": judged})
    return weights, weights.with_splits({"train": judged})

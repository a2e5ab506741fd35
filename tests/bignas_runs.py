"""The command line of a small BigNAS run on few digits."""

from __future__ import annotations

import json
from pathlib import Path

TRAINING = {"epochs": 1, "batch_size": 16, "children": 2, "calibration_batches": 1}
LEVELS = {"resolution": 2, "width": 2, "depth": 1, "kernel": 1, "expansion": 1}
BIGNAS = {**TRAINING, "optimizer": "sgd", "lr": 0.05, "levels": LEVELS, "mutations": 8, "points": 3}


def words(out: Path, *more: str) -> list[str]:
    """Return the words of a run with one delivered point, behind ``archsmith``."""
    quick = {**BIGNAS, "batch_size": 32, "mutations": 4, "points": 1, "levels": json.dumps(LEVELS)}
    given = ["search", "--method", "bignas", "--task", "digits", "--task-set", "limit=60", "--threads", "1", "--quiet"]
    given += [word for name, value in quick.items() for word in ("--set", f"{name}={value}")]
    return [*given, "--out", str(out), *more]

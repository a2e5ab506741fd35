"""Tasks: what is to be learned, from which data, and how a step is scored.

``open_task("digits")`` makes a task by its name, ``task_table()`` lists the names. In Python, the classes
``ImageClassification`` (``from_arrays``) and ``LoaderTask`` take data that is in memory already. Importing this package
imports no torch: the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archsmith.tasks.augment import Augment
    from archsmith.tasks.base import Batch, Forward, Task
    from archsmith.tasks.catalogue import open_task, task_table
    from archsmith.tasks.loaders import LoaderTask
    from archsmith.tasks.speech import SpeechRecognition
    from archsmith.tasks.text import TextClassification
    from archsmith.tasks.vision import ImageClassification

__all__ = [
    "Augment",
    "Batch",
    "Forward",
    "ImageClassification",
    "LoaderTask",
    "SpeechRecognition",
    "Task",
    "TextClassification",
    "open_task",
    "task_table",
]

_HOMES = {
    "Augment": "augment",
    "Batch": "base",
    "Forward": "base",
    "ImageClassification": "vision",
    "LoaderTask": "loaders",
    "SpeechRecognition": "speech",
    "Task": "base",
    "TextClassification": "text",
    "open_task": "catalogue",
    "task_table": "catalogue",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

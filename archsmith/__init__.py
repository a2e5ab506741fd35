"""archsmith: neural architecture search that ends with a trained, verified, standalone network within your budget.

The names below are loaded on first use; importing archsmith itself imports neither torch nor scipy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(("Outcome", "report", "resume", "search", "search_file", "shrink", "verify"), "archsmith.api"),
    **dict.fromkeys(
        ("Architecture", "Budget", "Objective", "ProductSpace", "Result", "Space", "Trial"), "archsmith.space"
    ),
    **dict.fromkeys(("Task", "open_task"), "archsmith.tasks"),
    "CutSchedule": "archsmith.atoms.unit_budget",
    "Shrinker": "archsmith.atoms.shrinker",
    **dict.fromkeys(("ArchsmithError", "MissingExtra", "UserError"), "archsmith.core.errors"),
}

__all__ = ["__version__", "atoms", *_LAZY]


def __getattr__(name: str) -> Any:
    """Load a public name from the room where it lives."""
    if name == "atoms":
        return import_module("archsmith.atoms")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'archsmith' has no attribute {name!r}; public names: {', '.join(sorted(_LAZY))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

"""Atoms: the smallest units that can be cut out of a network, and the surgery that cuts them.

An atom is a set of tensor slices that live and die together, with a scale (its gate), a score and a cost. ``groups``
says what the units are, ``score`` which of them are dead or must go for a budget, ``penalty`` pushes them towards zero,
``surgery`` removes them from the model, the optimiser and every other table at once.

For networks of any make: ``finding`` (``archsmith.atoms.find``) finds the units, ``transaction`` cuts them, ``records``
say what was cut, ``shrinker`` does both in a training loop, ``grow`` undoes. These names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "find": "archsmith.atoms.finding",
    "apply_": "archsmith.atoms.transaction",
    "CutRefused": "archsmith.atoms.plan",
    "Record": "archsmith.atoms.records",
    "record": "archsmith.atoms.records",
    "rebuild": "archsmith.atoms.records",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    """Load a public name from the file where it lives."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'archsmith.atoms' has no attribute {name!r}; public names: {', '.join(_LAZY)}")

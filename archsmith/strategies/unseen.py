"""Sampling without repetition, on any space."""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from archsmith.space import Architecture, Space

TRIES = 200
"""Samples that may all be known before a finite space is listed instead."""

LISTED = 20_000
"""Largest space of which all that is left is listed; beyond, the first that is left is taken."""


def unseen_sample(space: Space, rng: np.random.Generator, seen: Container[str]) -> Architecture | None:
    """Return a sample whose digest is not in ``seen``; ``None`` when a finite space has none left.

    Distributed as the space samples, given that it is new, while new ones are not rarer than about one in ``TRIES``;
    then uniformly over what is left (up to ``LISTED`` architectures), or the first in the order of ``enumerate``.
    """
    for _ in range(TRIES):
        if (architecture := space.sample(rng)).digest not in seen:
            return architecture
    if space.size == math.inf:
        return None
    left = (architecture for architecture in space.enumerate() if architecture.digest not in seen)
    if space.size > LISTED:
        return next(left, None)
    listed = list(left)
    return listed[int(rng.integers(len(listed)))] if listed else None

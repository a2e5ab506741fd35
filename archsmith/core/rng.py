"""Named random streams: one per component, derived from the run's seed by name.

A stream's seed depends on the root seed and its name only, never on how often another stream was used. So a scorer
never moves the training stream, and a stream named by (epoch, step) needs no state in a checkpoint: after a kill it is
simply made again.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(root: int, *names: str | int) -> int:
    """Return the seed of the stream ``names`` under the root seed, in [0, 2**63).

    Args:
        root: Seed of the run, any integer.
        names: Path of the stream, for example ``("augment", epoch, step)``.

    The mapping is BLAKE2b over the decimal and text forms, stable across processes, machines and versions.
    """
    text = "\x1f".join([str(int(root)), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def numpy_stream(root: int, *names: str | int) -> np.random.Generator:
    """Return a fresh numpy generator (PCG64) for the stream ``names``."""
    return np.random.Generator(np.random.PCG64(seed_of(root, *names)))

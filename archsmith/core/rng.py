"""Named random streams: one per component, derived from the run's seed by name.

A stream's seed depends on the root seed and its name only, never on how often another stream was used. So a scorer
never moves the training stream, and a stream named by (epoch, step) needs no state in a checkpoint: after a kill it is
simply made again.
"""

from __future__ import annotations

import hashlib
import json
import operator

import numpy as np


def seed_of(root: int, *names: str | int) -> int:
    """Return the seed of the stream ``names`` under the root seed, in [0, 2**63).

    Args:
        root: Seed of the run, any integer.
        names: Path of the stream, for example ``("augment", epoch, step)``. Integers of numpy equal Python's; the text
            ``"1"`` and the number 1 are different names.

    The mapping is BLAKE2b over the JSON list ``[root, *names]``, stable across processes, machines and versions.

    Raises:
        TypeError: A name is neither text nor an integer (a float, say), or ``root`` is no integer.
    """
    path = [operator.index(root), *(name if isinstance(name, str) else operator.index(name) for name in names)]
    digest = hashlib.blake2b(json.dumps(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_stream(root: int, *names: str | int) -> np.random.Generator:
    """Return a fresh numpy generator (PCG64) for the stream ``names``."""
    return np.random.Generator(np.random.PCG64(seed_of(root, *names)))

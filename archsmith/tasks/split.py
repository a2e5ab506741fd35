"""Splits and shuffles that are the same on every machine.

Orders come from sorting raw 64-bit words of PCG64: the words are a published algorithm, whereas numpy's own
``permutation`` may change between versions, and with it every recorded split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream

Indices = NDArray[np.int64]
DEFAULT_VALID = 0.1
DEFAULT_TEST = 0.2


def shuffled(n: int, seed: int, *names: str | int) -> Indices:
    """Return the numbers ``0..n-1`` in the order of the stream ``names`` under ``seed``."""
    words = numpy_stream(seed, *names).bit_generator.random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


def halved(indices: Indices, seed: int) -> tuple[Indices, Indices]:
    """Return two random halves, each ascending; the odd one belongs to the first."""
    order = indices[shuffled(len(indices), seed, "halves")]
    middle = -(-len(order) // 2)
    return np.sort(order[:middle]), np.sort(order[middle:])


def first_per_class(indices: Indices, labels: NDArray[np.int64], n: int) -> Indices:
    """Return the first ``n`` indices of each class, in their old order; classes with fewer keep what they have."""
    kept = [indices[labels[indices] == c][:n] for c in np.unique(labels[indices])]
    return np.sort(np.concatenate(kept))


def split_off(
    indices: Indices, labels: NDArray[np.int64], *, fraction: float, stream: tuple[str, ...], class_names: Sequence[str]
) -> tuple[Indices, Indices]:
    """Take a fixed share of every class away.

    Args:
        indices: Examples to share out.
        labels: Label of every example (indexed by ``indices``).
        fraction: Share taken from each class, rounded, at least one example.
        stream: Names the split; the run's seed has no part in it.
        class_names: For the error text.

    Returns:
        What is left and what was taken, each in ascending order.

    Raises:
        UserError: A class has too few examples to leave one on both sides.
    """
    taken = []
    for c, name in enumerate(class_names):
        members = indices[labels[indices] == c]
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise UserError(
                "labels",
                Shown(f"class {name!r} with {len(members)} training example{'s' * (len(members) != 1)}"),
                allowed=f"enough examples per class to split off the {stream[-1]} part, at least 2",
                hint=f"add examples of that class, or give a {stream[-1]} part of your own.",
            )
        taken.append(members[shuffled(len(members), 0, "split", *stream, c)[:count]])
    chosen = np.sort(np.concatenate(taken))
    return np.setdiff1d(indices, chosen), chosen


def planned_splits(
    name: str,
    labels: NDArray[np.int64],
    parts: Mapping[str, Indices],
    *,
    class_names: Sequence[str],
    valid_fraction: float | None = None,
    test_fraction: float | None = None,
    limit: int | None = None,
) -> dict[str, Indices]:
    """Return the index arrays of train, valid and test.

    Parts that the data brings are used as they are; a missing test part is split off the training part first, then a
    missing valid part, both stratified and by a seed that belongs to the task's name.

    Args:
        name: Name of the task.
        labels: Label of every example.
        parts: Index arrays of the parts that the data brings, ``"train"`` among them.
        class_names: One per class.
        valid_fraction: Share of the training part that becomes the valid part, 0.1 when None.
        test_fraction: Share of the training part that becomes the test part, 0.2 when None.
        limit: Keep the first ``limit`` examples per class of every given part.

    Raises:
        UserError: A fraction was given for a part that the data brings, or a class has too few examples.
    """
    pools = {k: v if limit is None else first_per_class(v, labels, limit) for k, v in parts.items()}
    for part, fraction in (("valid", valid_fraction), ("test", test_fraction)):
        if part in pools and fraction is not None:
            raise UserError(
                f"{part}_fraction", fraction, allowed=f"nothing here, because the data brings its own {part} part"
            )
    if "test" not in pools:
        fraction = DEFAULT_TEST if test_fraction is None else test_fraction
        pools["train"], pools["test"] = split_off(
            pools["train"], labels, fraction=fraction, stream=(name, "test"), class_names=class_names
        )
    if "valid" not in pools:
        fraction = DEFAULT_VALID if valid_fraction is None else valid_fraction
        pools["train"], pools["valid"] = split_off(
            pools["train"], labels, fraction=fraction, stream=(name, "valid"), class_names=class_names
        )
    return {part: pools[part] for part in ("train", "valid", "test")}

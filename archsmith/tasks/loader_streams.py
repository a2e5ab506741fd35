"""The random streams that a user's loader draws from: seeded while it works, put back afterwards.

A loader may draw from torch's, numpy's and Python's global streams (in its sampler, its transforms, its workers' seeds)
and from a generator it was given. All become functions of one seed, and the training's own use of the global streams
is neither seen nor disturbed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

_SEEDED = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


@contextmanager
def global_streams(seed: int) -> Iterator[None]:
    """Seed torch's (CPU), numpy's and Python's global streams inside the block; restore them afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def seed_generators(loader: Any, seed: int) -> None:
    """Seed the generators that the loader and its samplers were given; the global streams are left alone."""
    for holder in (loader, *_samplers(loader)):
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
            generator.manual_seed(seed)


def announce_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch`` of the loader and its samplers, where they have it."""
    for holder in (loader, *_samplers(loader)):
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)


def has_state(loader: Any) -> bool:
    """Return whether the loader can store where it is and go on from there."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def repeatable(loader: Any) -> bool:
    """Return whether seeding makes an epoch of this loader repeat itself.

    Not so with an iterable dataset (its order is its own), persistent workers (they carry their random state from epoch
    to epoch) and unknown samplers without ``set_epoch``.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.persistent_workers:
        return False
    # With a batch sampler of the user's own, loader.sampler is a placeholder of torch's that orders nothing.
    order = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    if type(order) is BatchSampler:
        order = order.sampler
    return type(order) in _SEEDED or hasattr(order, "set_epoch")


def _samplers(loader: Any) -> list[Any]:
    """Return the loader's sampler, its batch sampler, and the sampler inside that, without repeats."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(s): s for s in found if s is not None}.values())

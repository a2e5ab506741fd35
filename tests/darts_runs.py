"""Tiny searches for tests: a few random-looking images that can be learned, and monitors that stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from archsmith.families.darts import DartsFamily
from archsmith.run.relaxed_search import RelaxedSearcher
from archsmith.tasks.vision import ImageClassification

OPERATIONS = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")


def small_task(images: int = 48, side: int = 8) -> ImageClassification:
    """Return three classes of noisy images, brighter in another third each."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 3
    pixels = rng.uniform(0, 0.6, (images, 3, side, side)).astype("f4")
    for number, label in enumerate(labels):
        pixels[number, :, 2 * label : 2 * label + 3] += 0.4
    return ImageClassification.from_arrays(pixels, labels, name="thirds", valid_fraction=0.2, test_fraction=0.1)


def small_family(**changes: Any) -> DartsFamily:
    """Return a family of three cells with two nodes and four operations for the images of ``small_task``."""
    small = {"image": (3, 8, 8), "num_classes": 3, "channels": 4, "cells": 3, "nodes": 2, "operations": OPERATIONS}
    return DartsFamily(**{**small, **changes})


class Stop:
    """A monitor that asks to stop after a number of steps; None never does."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after

    def step(self, total: int, **figures: float) -> None:
        """Count a step."""
        if self.left is not None:
            self.left -= 1

    def should_stop(self) -> bool:
        """Return whether all steps are done."""
        return self.left is not None and self.left <= 0


def to_the_end(searcher: RelaxedSearcher) -> list[dict[str, Any]]:
    """Run a search to its end and return the figures of its epochs."""
    figures = []
    while not searcher.done:
        epoch = searcher.advance(Stop())
        assert epoch is not None
        figures.append(epoch)
    return figures


def stop_after(searcher: RelaxedSearcher, steps: int) -> None:
    """Run exactly this many steps."""
    monitor = Stop(steps)
    while not monitor.should_stop() and not searcher.done:
        searcher.advance(monitor)


def copied(state: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a checkpoint that later training does not reach."""
    tensors, values = state
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, values

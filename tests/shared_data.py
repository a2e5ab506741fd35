"""Real image sets for tests: found where the environment says, decoded from their compact form, skipped when absent."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import numpy as np
import pytest


def shared_data(name: str) -> Path:
    """Return the folder of a set under ARCHSMITH_DATA, or ``shared/data`` beside the repository; skip when absent."""
    root = Path(os.environ.get("ARCHSMITH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (root / name).is_dir():
        pytest.skip(f"no real data at {root / name}; set ARCHSMITH_DATA to the folder that holds it")
    return root / name


def cifar10_arrays() -> dict[str, np.ndarray]:
    """Return the balanced CIFAR-10 subset: 4,000 training and 1,000 test images, (N, 3, 32, 32) bytes."""
    folder = shared_data("cifar10")
    arrays = {}
    for part in ("train", "test"):
        # Stored as the planes (G, R - G, B - G), differenced along both image axes, modulo 256.
        with lzma.open(folder / f"{part}.npy.xz") as stream:
            planes = np.load(stream).cumsum(2, dtype="u1").cumsum(3, dtype="u1")
        arrays[f"x_{part}"] = np.stack([planes[1] + planes[0], planes[0], planes[2] + planes[0]], 1)
        arrays[f"y_{part}"] = np.load(folder / f"{part}_labels.npy")
    return arrays


def fashion_mnist_arrays() -> dict[str, np.ndarray]:
    """Return the balanced Fashion-MNIST subset: 4,000 training and 1,000 test images, (N, 28, 28) bytes."""
    folder = shared_data("fashion_mnist")
    arrays = {}
    for part, stem in (("train", "train4k"), ("test", "test1k")):
        images = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        arrays[f"x_{part}"] = np.frombuffer(images, "u1", offset=16).reshape(-1, 28, 28)
        arrays[f"y_{part}"] = np.frombuffer(labels, "u1", offset=8)
    return arrays

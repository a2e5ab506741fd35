"""Resizing of image arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

RESAMPLE = ("auto", "area", "bilinear")
_CHUNK = 1024


def resized(images: NDArray[Any], resolution: int, *, resample: str = "auto") -> NDArray[Any]:
    """Return images of ``resolution`` x ``resolution`` pixels, the aspect ratio not kept.

    Args:
        images: ``(N, C, H, W)``, uint8 or float32.
        resolution: New height and width.
        resample: ``"area"`` averages the pixels each new one covers; ``"bilinear"`` interpolates (over a wider
            neighbourhood when shrinking); ``"auto"`` is area when the image does not grow, else bilinear.

    Returns:
        Array of the same dtype; bytes are rounded to the nearest. The array itself when the size is right already.
    """
    count, channels, height, width = images.shape
    if height == width == resolution:
        return images
    area = resample == "area" or (resample == "auto" and resolution <= min(height, width))
    out = np.empty((count, channels, resolution, resolution), images.dtype)
    for first in range(0, count, _CHUNK):
        piece = torch.from_numpy(images[first : first + _CHUNK]).float()
        if area:
            scaled = functional.interpolate(piece, size=(resolution, resolution), mode="area")
        else:
            scaled = functional.interpolate(piece, size=(resolution, resolution), mode="bilinear", antialias=True)
        top = 1.0 if images.dtype == np.float32 else 255.0
        scaled = scaled.clamp_(0.0, top)
        out[first : first + _CHUNK] = (scaled if images.dtype == np.float32 else scaled.round_()).numpy()
    return out

"""Log mel filterbank features and their differences over time, from waves, with numpy alone.

Frame i is centred on sample ``(i + 1/2) hop`` and a wave of n samples has ``ceil(n / hop)`` frames; samples outside of
the wave are zero. So lengths in frames are lengths in samples divided by the hop, and the shortest word has a frame.

Source: Davis and Mermelstein 1980 (mel scale filters); Furui 1986 (differences by regression). The numbers are those
customary in speech recognition: 25 ms Hamming windows, pre-emphasis 0.97, regression over two frames on each side.
"""

# N samples, T frames, M bands, P planes

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PLANES = 3
"""Static features, their differences, and the differences of these."""

_LOWEST_HZ = 20.0
_WINDOW_SECONDS = 0.025
_EMPHASIS = 0.97
_FLOOR = 1e-8  # energy of a window of about 1e-5 of full scale: what 16 bits cannot tell from silence
_REACH = 2


def mel(frequency: NDArray[np.float64] | float) -> Any:
    """Return ``1127 ln(1 + f / 700)`` for a frequency in Hz."""
    return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)


def mel_filters(bands: int, size: int, rate: int) -> NDArray[np.float64]:
    """Return triangles (bands, size // 2 + 1) over the bins of a Fourier transform.

    Their corners are evenly spaced in mel from 20 Hz to half of the sampling rate; each has height 1, and is linear in
    mel between its corners.

    Args:
        bands: Number of triangles.
        size: Length of the Fourier transform.
        rate: Samples per second.
    """
    corners = np.linspace(mel(_LOWEST_HZ), mel(rate / 2), bands + 2)
    bins = mel(np.arange(size // 2 + 1) * rate / size)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return np.maximum(0.0, np.minimum(rising, falling))


def log_mel(wave: NDArray[Any], rate: int, *, bands: int, hop: int) -> NDArray[np.float64]:
    """Return log energies (M, T) of a wave.

    Args:
        wave: Samples (N,) in [-1, 1], N at least 1.
        rate: Samples per second.
        bands: M.
        hop: Samples between two frames; T is ``ceil(N / hop)``.
    """
    samples = np.asarray(wave, np.float64)
    samples = samples - _EMPHASIS * np.concatenate([samples[:1], samples[:-1]])
    window = round(_WINDOW_SECONDS * rate)
    frames = -(-len(samples) // hop)
    before = (window - hop) // 2
    padded = np.zeros(max(0, before) + frames * hop + window)
    padded[max(0, before) : max(0, before) + len(samples)] = samples
    starts = np.arange(frames) * hop + max(0, -before)
    pieces = padded[starts[:, None] + np.arange(window)] * np.hamming(window)
    size = 1 << (2 * window - 1).bit_length()  # at least twice the window: the lowest triangles are narrow
    power = np.abs(np.fft.rfft(pieces, size)) ** 2
    return np.log(mel_filters(bands, size, rate) @ power.T + _FLOOR)


def differences(features_MT: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the slope of each feature over time, by regression over two frames on each side; the ends repeat."""
    frames = features_MT.shape[1]
    padded = np.pad(features_MT, ((0, 0), (_REACH, _REACH)), mode="edge")
    total = np.zeros_like(features_MT)
    for step in range(1, _REACH + 1):
        total += step * (padded[:, _REACH + step :][:, :frames] - padded[:, _REACH - step :][:, :frames])
    return total / (2 * sum(step**2 for step in range(1, _REACH + 1)))


def speech_features(wave: NDArray[Any], rate: int, *, bands: int, hop: int) -> NDArray[np.float32]:
    """Return log energies, their differences and the differences of these, (3, M, T); see ``log_mel``."""
    static = log_mel(wave, rate, bands=bands, hop=hop)
    slopes = differences(static)
    return np.stack([static, slopes, differences(slopes)]).astype(np.float32)

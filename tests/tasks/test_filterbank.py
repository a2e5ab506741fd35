import numpy as np
import pytest

from archsmith.tasks.filterbank import differences, log_mel, mel, mel_filters, speech_features

RATE = 8000


def tone(hertz, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


def test_mel():
    assert mel(700.0) == pytest.approx(1127 * np.log(2))
    assert mel(1000.0) == pytest.approx(1000.0, abs=0.1)


def test_filters_are_triangles_that_share_corners():
    filters = mel_filters(40, 512, RATE)
    assert filters.shape == (40, 257) and filters.min() == 0 and filters.max() <= 1
    assert bool((filters.sum(1) > 0).all())
    middle = slice(int(np.argmax(filters[0])) + 1, int(np.argmax(filters[-1])))
    assert filters[:, middle].sum(0) == pytest.approx(1.0)  # neighbours fall and rise together


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 2500.0])
def test_a_tone_lies_in_its_band(hertz):
    energies = log_mel(tone(hertz), RATE, bands=40, hop=80)
    corners = np.linspace(mel(20.0), mel(RATE / 2), 42)[1:-1]
    assert set(energies[:, 5:-5].argmax(0)) == {int(np.abs(corners - mel(hertz)).argmin())}


def test_lengths_follow_the_hop():
    for samples, frames in ((1, 1), (80, 1), (81, 2), (1148, 15)):
        assert log_mel(np.ones(samples), RATE, bands=8, hop=80).shape == (8, frames)


def test_a_frame_is_centred_on_its_own_samples():
    click = np.zeros(1600)
    click[800:880] = np.random.default_rng(0).standard_normal(80)  # frame 10 of 80 samples
    energies = log_mel(click, RATE, bands=8, hop=80).sum(0)
    assert energies.argmax() == 10
    assert set(np.flatnonzero(energies > energies.min() + 1).tolist()) == {9, 10, 11}  # a window is 2.5 frames


def test_one_frame_is_the_plain_computation():
    wave = tone(440.0) + 0.3 * tone(1234.0)
    emphasised = wave - 0.97 * np.concatenate([wave[:1], wave[:-1]])
    frame = 20
    start = frame * 80 - 60
    power = np.abs(np.fft.rfft(emphasised[start : start + 200] * np.hamming(200), 512)) ** 2
    expected = np.log(mel_filters(40, 512, RATE) @ power + 1e-8)
    assert log_mel(wave, RATE, bands=40, hop=80)[:, frame] == pytest.approx(expected)


def test_differences_are_slopes():
    ramp = np.stack([3.0 * np.arange(10), np.full(10, 7.0)])
    slopes = differences(ramp)
    assert slopes[0, 2:-2] == pytest.approx(3.0) and slopes[1] == pytest.approx(0.0)
    assert slopes[0, 0] == pytest.approx((1 * 3 + 2 * 6) / 10)  # the ends repeat


def test_planes():
    features = speech_features(tone(500.0), RATE, bands=40, hop=80)
    assert features.shape == (3, 40, 50) and features.dtype == np.float32
    assert features[2] == pytest.approx(
        differences(differences(log_mel(tone(500.0), RATE, bands=40, hop=80))), abs=1e-5
    )

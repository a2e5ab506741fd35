import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsmith.tasks.resize import resized


@given(factor=st.integers(2, 4), seed=st.integers(0, 99), floats=st.booleans())
@settings(max_examples=20, deadline=None)
def test_area_is_the_mean_of_the_covered_pixels(factor, seed, floats):
    images = np.random.default_rng(seed).integers(0, 256, (3, 2, 4 * factor, 4 * factor), dtype=np.uint8)
    means = images.reshape(3, 2, 4, factor, 4, factor).mean((3, 5))
    if floats:
        found = resized((images / 255).astype(np.float32), 4)
        assert found.dtype == np.float32
        assert np.allclose(found, means / 255, atol=1e-6)
    else:
        found = resized(images, 4)
        assert found.dtype == np.uint8
        assert np.abs(found - means).max() <= 0.5 + 1e-4


def test_area_takes_both_sides_of_a_rectangle():
    images = np.arange(16, dtype=np.uint8).reshape(1, 1, 2, 8).repeat(4, axis=2) * 10
    assert resized(images, 4).shape == (1, 1, 4, 4)
    assert resized(images, 4)[0, 0, 0].tolist() == [5, 25, 45, 65]


def test_bilinear_interpolates_when_growing():
    ramp = np.tile(np.array([0, 100], np.uint8), (2, 1))[None, None]
    assert resized(ramp, 4)[0, 0, 0].tolist() == [0, 25, 75, 100]
    assert np.array_equal(resized(ramp, 4), resized(ramp, 4, resample="bilinear"))
    assert resized(ramp, 4, resample="area")[0, 0, 0].tolist() == [0, 0, 100, 100]


@pytest.mark.parametrize("count", [1, 1030])
def test_every_image_is_resized_by_itself(count):
    images = np.arange(count, dtype=np.uint32).astype(np.uint8)[:, None, None, None] * np.ones((1, 1, 6, 6), np.uint8)
    assert np.array_equal(resized(images, 5, resample="bilinear"), images[:, :, :5, :5])


def test_right_size_is_left_alone():
    images = np.zeros((2, 1, 6, 6), np.uint8)
    assert resized(images, 6) is images

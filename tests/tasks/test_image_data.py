import numpy as np
import pytest
from image_samples import random_images

from archsmith.core.errors import UserError
from archsmith.tasks.image_data import RawImages, image_data

X, Y = random_images(12, (1, 5, 5))


def made(x=X, y=Y, names=None, **parts):
    return image_data(RawImages({"train": (x, y), **parts}, names))


def test_parts_are_joined_in_order():
    x2, y2 = random_images(6, (5, 5), seed=1)
    data = made(test=(x2, y2.astype(np.uint8)[:, None]))
    assert data.images.shape == (18, 1, 5, 5)
    assert np.array_equal(data.images[data.parts["test"]][:, 0], x2)
    assert np.array_equal(data.labels[data.parts["test"]], y2)
    assert data.labels.dtype == np.int64
    assert data.class_names == ("0", "1", "2")


def test_floats_are_kept_as_given():
    x = (X / 255).astype(np.float32)
    assert made(x).images.dtype == np.float32
    assert np.array_equal(made(x).images, x)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (X.astype(np.int32), "x_train: got dtype int32; allowed: uint8 .0 to 255. or float32 .0 to 1."),
        (X.astype(np.float64) / 255, "x_train: got dtype float64"),
        (np.array([[None]]), "x_train: got dtype object"),
        (X.astype(np.float32), "x_train: got floats from 0 to 25[0-5]; allowed: floats from 0 to 1.*divide"),
        (X[0, 0], r"x_train: got shape \(5, 5\); allowed: \(N, H, W\) or \(N, C, H, W\)"),
        (X[:0], r"x_train: got shape \(0, 1, 5, 5\)"),
        (np.zeros((12, 8, 8, 3), np.uint8), r"which looks like \(N, H, W, C\).*transpose\(0, 3, 1, 2\)"),
    ],
)
def test_wrong_images(x, text):
    with pytest.raises(UserError, match=text):
        made(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_names_the_first_image(bad):
    x = (X / 255).astype(np.float32)
    x[4, 0, 2, 2] = x[7, 0, 0, 0] = bad
    with pytest.raises(UserError, match="x_train: got NaN or infinity, first in image 4"):
        made(x)


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (Y[:-1], r"y_train: got labels of shape \(11,\) for 12 images; allowed: one label per image, \(12,\)"),
        (np.eye(3, dtype=int)[Y], r"y_train: got labels of shape \(12, 3\)"),
        (Y.astype(float), "y_train: got dtype float64; allowed: integers"),
        (Y - 1, "y_train: got the label -1; allowed: labels from 0"),
        (Y + 1, "y_train: got labels from 1 to 3; allowed: labels that start at 0.*subtract 1"),
        (np.where(Y == 1, 3, Y), "y_train: got no training image of class 1; allowed: labels 0 to 3 that all occur"),
        (np.where(Y == 1, 10**12, Y), "y_train: got no training image of class 1, 3, 4, 5, 6 ..."),
        (Y * 0, "y_train: got one class only; allowed: at least 2 classes"),
    ],
)
def test_wrong_labels(y, text):
    with pytest.raises(UserError, match=text):
        made(y=y)


def test_empty_class_is_named():
    with pytest.raises(UserError, match="y_train: got no training image of class 'fish'"):
        made(names=("cat", "dog", "bird", "fish"))


def test_wrong_names():
    with pytest.raises(UserError, match="class_names: got 2 names for the labels 0 to 2"):
        made(names=("cat", "dog"))
    with pytest.raises(UserError, match=r"class_names: got .*; allowed: names that differ"):
        made(names=("cat", "dog", "dog"))


def test_parts_that_do_not_fit_each_other():
    with pytest.raises(UserError, match=r"x_test: got uint8 images of shape \(1, 4, 4\); allowed: what x_train has"):
        made(test=random_images(6, (4, 4)))
    with pytest.raises(UserError, match="x_test: got float32 images"):
        made(test=((X / 255).astype(np.float32), Y))
    with pytest.raises(UserError, match="y_valid: got the label 3; allowed: labels of the training part, 0 to 2"):
        made(valid=(X[:2], np.array([0, 3])))
    with pytest.raises(UserError, match="data: got no training part"):
        image_data(RawImages({"test": (X, Y)}))

import pytest

from archsmith.core.errors import UserError
from archsmith.tasks import Augment
from archsmith.tasks.options import ImageOptions, image_options


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"resolution": 2}, "resolution: got 2; allowed: a whole number from 4 to 1024"),
        ({"resolution": 16.0}, "resolution: got 16.0"),
        ({"resample": "cubic"}, "resample: got 'cubic'; allowed: auto, area, bilinear"),
        ({"limit": 1}, "limit: got 1; allowed: a whole number from 2"),
        ({"valid_fraction": 0}, "valid_fraction: got 0; allowed: a number from 0.01 to 0.5"),
        ({"valid_fraction": "0.1"}, "valid_fraction: got '0.1'"),
        ({"test_fraction": 0.9}, "test_fraction: got 0.9"),
        ({"channels_last": "yes"}, "channels_last: got 'yes'; allowed: true or false"),
        ({"augment": 1}, "augment: got 1"),
        ({"colour": True}, "option of task t: got 'colour'; allowed: resolution, .*label_smoothing"),
    ],
)
def test_wrong_options(given, text):
    with pytest.raises(UserError, match=text):
        image_options("t", given)


def test_wrong_augmentation_is_named():
    for given, text in (({"crop": -1}, "crop: got -1"), ({"flip": 0}, "flip: got 0"), ({"mixup": -1}, "mixup: got -1")):
        with pytest.raises(UserError, match=text):
            image_options("t", given).augmentation(8, 8, crop_share=0.1, flip=True)


def test_default_augmentation_scales_with_the_image():
    def default(side, **given):
        return ImageOptions(**given).augmentation(side, side, crop_share=4 / 32, flip=True)

    assert default(32) == Augment(crop=4, flip=True)
    assert default(16) == Augment(crop=2, flip=True)
    assert default(4) == Augment(crop=1, flip=True)
    assert default(32, augment=False, cutout=5) == Augment(cutout=5)
    assert default(32, augment=False, flip=True) == Augment(flip=True)
    assert default(32, crop=0, flip=False, label_smoothing=0.1) == Augment(label_smoothing=0.1)

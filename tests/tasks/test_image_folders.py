import numpy as np
import pytest
from image_samples import write_image_folder
from PIL import Image

from archsmith.core.errors import UserError
from archsmith.tasks.folders import read_folder


def test_classes_in_one_folder(tmp_path):
    write_image_folder(tmp_path)
    raw = read_folder(tmp_path)
    x, y = raw.parts["train"]
    assert list(raw.parts) == ["train"] and raw.class_names == ("cat", "dog")
    assert x.shape == (20, 3, 8, 10) and x.dtype == np.uint8
    assert y.tolist() == [0] * 10 + [1] * 10
    with Image.open(tmp_path / "dog" / "03.png") as image:
        assert np.array_equal(x[13], np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_parts_in_folders(tmp_path, valid):
    write_image_folder(tmp_path, parts=("train", valid, "test"))
    assert {k: len(x) for k, (x, _) in read_folder(tmp_path).parts.items()} == {"train": 20, "valid": 20, "test": 20}


def test_grey_images_have_one_channel_unless_one_is_coloured(tmp_path):
    write_image_folder(tmp_path, colour=False)
    assert read_folder(tmp_path).parts["train"][0].shape == (20, 1, 8, 10)
    Image.fromarray(np.full((8, 10, 3), (255, 0, 0), np.uint8)).save(tmp_path / "cat" / "red.PNG")
    x = read_folder(tmp_path).parts["train"][0]
    assert x.shape == (21, 3, 8, 10)
    assert (x[:10, 0] == x[:10, 1]).all() and x[10, :, 0, 0].tolist() == [255, 0, 0]


def test_resolution_cuts_the_centre_and_allows_different_sizes(tmp_path):
    write_image_folder(tmp_path, per_class=2)
    halves = np.zeros((8, 24, 3), np.uint8)
    halves[:, 8:16] = 200  # the centre
    Image.fromarray(halves).save(tmp_path / "cat" / "wide.png")
    with pytest.raises(
        UserError, match=r"image .*wide.png: got 24x8 pixels; allowed: 10x8 like 00.png.*resolution=<pixels>"
    ):
        read_folder(tmp_path)
    x = read_folder(tmp_path, resolution=4).parts["train"][0]
    assert x.shape == (5, 3, 4, 4)
    assert (x[2] == 200).all()


def test_corrupt_image_is_named(tmp_path):
    write_image_folder(tmp_path)
    path = tmp_path / "dog" / "05.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"image .*dog.05\.png: got .*; allowed: an undamaged image file"):
        read_folder(tmp_path)
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"image .*dog.05\.png: got cannot identify image file"):
        read_folder(tmp_path)


def test_sixteen_bit_image_is_refused_instead_of_clipped(tmp_path):
    write_image_folder(tmp_path)
    Image.fromarray(np.full((8, 10), 40000, np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(UserError, match=r"deep.png: got mode I.*; allowed: 8-bit"):
        read_folder(tmp_path)


def test_empty_class_is_named(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "fish").mkdir()
    (tmp_path / "fish" / "notes.txt").write_text("none yet")
    with pytest.raises(UserError, match=r"data: got no image in .*fish; allowed: images"):
        read_folder(tmp_path)


def test_folder_without_classes(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match="without sub-folders; allowed: a folder with one sub-folder of images per class"
    ):
        read_folder(tmp_path)


def test_strange_class_in_the_test_part(tmp_path):
    write_image_folder(tmp_path, parts=("train", "test"))
    (tmp_path / "test" / "fish").mkdir()
    with pytest.raises(
        UserError, match=r"got the class 'fish' in .*test; allowed: classes of the training part: cat, dog"
    ):
        read_folder(tmp_path)

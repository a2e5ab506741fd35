import numpy as np
import pytest
from image_samples import cifar_arrays, random_images, write_cifar_batches, write_idx_folder, write_image_folder

from archsmith.core.errors import UserError
from archsmith.tasks import Augment, open_task


def test_every_form_of_cifar10_is_the_same_task(tmp_path):
    arrays = cifar_arrays()
    np.savez_compressed(tmp_path / "cifar10.npz", **arrays)
    np.savez(tmp_path / "other.npz", **arrays)
    (tmp_path / "npy").mkdir()
    for key, value in arrays.items():
        last = np.moveaxis(value, 1, 3) if value.ndim == 4 else value[:, None]
        np.save(tmp_path / "npy" / f"{key}.npy", last)
    write_cifar_batches(tmp_path / "p" / "cifar-10-batches-py")
    sources = [
        tmp_path / "cifar10.npz",
        str(tmp_path),
        tmp_path / "npy",
        tmp_path / "p",
        tmp_path / "p" / "cifar-10-batches-py",
    ]
    tasks = [open_task("cifar10", data=source) for source in sources]
    assert len({task.digest for task in tasks}) == 1
    assert tasks[0].class_names[3] == "cat"
    assert tasks[0].augment == Augment(crop=4, flip=True)
    assert [tasks[0].size(split) for split in tasks[0].splits] == [90, 10, 20]


def test_idx_and_npz_of_mnist_are_the_same_task(tmp_path):
    folder = write_idx_folder(tmp_path / "idx")
    from archsmith.tasks.idx import read_idx_folder

    parts = read_idx_folder(folder).parts
    np.savez(
        tmp_path / "fashion_mnist.npz",
        **{f"{k}_{p}": v for p, xy in parts.items() for k, v in zip("xy", xy, strict=True)},
    )
    one, two = open_task("fashion-mnist", data=folder), open_task("fashion-mnist", data=tmp_path / "fashion_mnist.npz")
    assert one.digest == two.digest and one.augment == Augment(crop=2, flip=True)
    digits = open_task("mnist", data=folder, resolution=14, limit=4)
    assert digits.input_shape == (1, 14, 14) and digits.augment == Augment(crop=1)
    assert digits.size("train") == 30 and digits.size("test") == 30
    assert one.class_names[-1] == "ankle boot" and digits.class_names[-1] == "9"


def test_images_split_themselves(tmp_path):
    task = open_task("images", data=write_image_folder(tmp_path), test_fraction=0.3, valid_fraction=0.25)
    assert [task.size(split) for split in task.splits] == [10, 4, 6]
    assert task.class_names == ("cat", "dog") and task.augment == Augment(crop=1, flip=True)


def test_arrays_have_no_default_augmentation(tmp_path):
    x, y = random_images(60, (8, 8))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, class_names=np.array(["p", "q", "r"]))
    task = open_task("arrays", data=tmp_path / "a.npz")
    assert task.augment == Augment() and task.class_names == ("p", "q", "r")


def test_missing_data():
    with pytest.raises(
        UserError, match=r"data: got None; allowed: the path of the mnist data.*write data=PATH.*never downloads"
    ):
        open_task("mnist")
    with pytest.raises(UserError, match=r"data: got None.*one sub-folder of images per class"):
        open_task("images")
    with pytest.raises(UserError, match="data: got '/nowhere/at/all'; allowed: a path that exists"):
        open_task("cifar10", data="/nowhere/at/all")
    with pytest.raises(UserError, match="data: got ndarray; allowed: a path; for arrays in memory use"):
        open_task("arrays", data=np.zeros(3))


def test_unknown_forms(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"data: got '.*a.csv'; allowed: an .npz file with x_train"):
        open_task("cifar10", data=tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"with none of these; allowed: an .npz file"):
        open_task("cifar10", data=tmp_path)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", x=1)
    with pytest.raises(UserError, match=r"with a.npz, b.npz; allowed: an .npz file"):
        open_task("cifar10", data=tmp_path)
    with pytest.raises(UserError, match=r"a.csv'; allowed: a folder with one sub-folder of images per class"):
        open_task("images", data=tmp_path / "a.csv")


def test_images_of_another_set(tmp_path):
    np.savez(tmp_path / "a.npz", **cifar_arrays())
    with pytest.raises(UserError, match=r"x_train: got images of shape \(3, 32, 32\); allowed: \(1, 28, 28\)"):
        open_task("mnist", data=tmp_path / "a.npz")


def test_empty_class_of_a_known_set_is_named(tmp_path):
    arrays = cifar_arrays()
    keep = arrays["y_train"] != 3
    np.savez(tmp_path / "a.npz", **{**arrays, "x_train": arrays["x_train"][keep], "y_train": arrays["y_train"][keep]})
    with pytest.raises(UserError, match="y_train: got no training image of class 'cat'"):
        open_task("cifar10", data=tmp_path / "a.npz")

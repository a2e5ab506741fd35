import pickle
import zipfile

import numpy as np
import pytest
from image_samples import random_images

from archsmith.core.errors import UserError
from archsmith.tasks.npz import read_npy_folder, read_npz


@pytest.fixture
def arrays():
    x, y = random_images(12, (4, 4))
    return {"x_train": x, "y_train": y, "x_test": x[:3], "y_test": y[:3]}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, arrays, save):
    save(tmp_path / "a.npz", **arrays, class_names=np.array(["a", "b", "c"]))
    raw = read_npz(tmp_path / "a.npz")
    assert list(raw.parts) == ["train", "test"]
    assert np.array_equal(raw.parts["test"][0], arrays["x_test"])
    assert raw.class_names == ("a", "b", "c")


def test_npy_folder(tmp_path, arrays):
    for key, value in arrays.items():
        np.save(tmp_path / f"{key}.npy", value)
    raw = read_npy_folder(tmp_path)
    assert np.array_equal(raw.parts["train"][1], arrays["y_train"])
    assert raw.class_names is None


def test_missing_array_is_named(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **{k: v for k, v in arrays.items() if k != "y_test"})
    with pytest.raises(UserError, match="got no array 'y_test' among x_test, x_train, y_train"):
        read_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=arrays["x_train"])
    with pytest.raises(
        UserError, match=r"data .*b.npz: got no array 'x_train' among images; allowed: x_train and y_train"
    ):
        read_npz(tmp_path / "b.npz")


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_objects_are_refused_and_not_run(tmp_path, arrays):
    trap = np.empty(1, object)
    trap[0] = Exploit(tmp_path / "owned")
    np.savez(tmp_path / "a.npz", **{**arrays, "y_train": trap})
    with pytest.raises(
        UserError, match=r"a.npz: got Python objects .a pickle.; allowed: plain arrays .*never unpickles"
    ):
        read_npz(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Exploit(tmp_path / "owned")))
    with pytest.raises(UserError, match=r"b.npz: got Python objects"):
        read_npz(tmp_path / "b.npz")
    for key, value in {**arrays, "x_train": trap}.items():
        np.save(tmp_path / f"{key}.npy", value)
    with pytest.raises(UserError, match=r"x_train.npy: got Python objects"):
        read_npy_folder(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_npz(tmp_path, arrays, keep):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=r"data file .*a.npz: got .*; allowed: an undamaged numpy file"):
        read_npz(path)


def test_flipped_byte_in_npz(tmp_path, arrays):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays)
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[0].header_offset
    data = bytearray(path.read_bytes())
    data[start + 100] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"data file .*a.npz: got .*; allowed: an undamaged numpy file"):
        read_npz(path)


def test_truncated_npy(tmp_path, arrays):
    for key, value in arrays.items():
        np.save(tmp_path / f"{key}.npy", value)
    whole = (tmp_path / "x_train.npy").read_bytes()
    (tmp_path / "x_train.npy").write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"x_train.npy: got .*; allowed: an undamaged numpy file"):
        read_npy_folder(tmp_path)


def test_single_array_under_the_name_npz(tmp_path, arrays):
    with open(tmp_path / "a.npz", "wb") as stream:
        np.save(stream, arrays["x_train"])
    with pytest.raises(UserError, match=r"got a single array; allowed: an .npz archive of named arrays"):
        read_npz(tmp_path / "a.npz")

import os
import pickle

import numpy as np
import pytest
from image_samples import cifar_arrays, python2_pickle, write_cifar_batches, write_pickle

from archsmith.core.errors import UserError
from archsmith.tasks.cifar import batches_folder, read_batch, read_batches


def test_standard_batches(tmp_path):
    folder = write_cifar_batches(tmp_path / "cifar-10-batches-py")
    assert batches_folder(tmp_path) == batches_folder(folder) == folder
    raw, expected = read_batches(folder), cifar_arrays()
    for part in ("train", "test"):
        assert np.array_equal(raw.parts[part][0], expected[f"x_{part}"])
        assert np.array_equal(raw.parts[part][1], expected[f"y_{part}"])


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_written_by_python_3(tmp_path, protocol, order):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    (tmp_path / "b").write_bytes(
        pickle.dumps({"data": np.asarray(pixels, order=order), "labels": [3, 9]}, protocol=protocol)
    )
    images, labels = read_batch(tmp_path / "b")
    assert np.array_equal(images.reshape(2, -1), pixels) and labels.tolist() == [3, 9]


class CreateFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class OpenFile(CreateFile):
    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("trap", [CreateFile, OpenFile])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_malicious_pickle_is_refused_before_anything_runs(tmp_path, trap, protocol):
    owned = tmp_path / "owned"
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": trap(owned), "labels": []}, protocol=protocol))
    with pytest.raises(
        UserError, match=r"a pickle that asks for (posix\.system|io\.open|_io\.open|builtins\.open).*nothing of it"
    ):
        read_batch(path)
    assert not owned.exists()
    pickle.loads(path.read_bytes())  # noqa: S301  the trap is a real one
    assert owned.exists()


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval",
        b"numpy\nload",
        b"numpy.core.multiarray\nscalar",
        b"copyreg\n_reconstructor",
        b"numpy\nndarray.x",
    ],
)
def test_other_globals_are_refused(tmp_path, name):
    (tmp_path / "b").write_bytes(b"c" + name + b"\n.")
    with pytest.raises(UserError, match="a pickle that asks for " + name.decode().replace("\n", r"\.")):
        read_batch(tmp_path / "b")


@pytest.mark.parametrize("keep", [0, 10, 500, 3000])
def test_truncated_batch(tmp_path, keep):
    path = write_pickle(tmp_path / "b", {"data": np.zeros((1, 3072), np.uint8), "labels": [1]})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"data file .*b: got .*; allowed: an undamaged CIFAR-10 batch"):
        read_batch(path)


@pytest.mark.parametrize(
    "value",
    [
        {"data": np.zeros((2, 100), np.uint8), "labels": [0, 1]},
        {"labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8)},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, "1"]},
    ],
)
def test_pickle_without_cifar_images(tmp_path, value):
    (tmp_path / "b").write_bytes(python2_pickle(value))
    with pytest.raises(UserError, match="got a pickle without CIFAR-10 images; allowed: a dictionary with 'data'"):
        read_batch(tmp_path / "b")


def test_missing_batch_is_named(tmp_path):
    write_cifar_batches(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(UserError, match="without data_batch_3; allowed: the folder with all six"):
        read_batches(tmp_path)


def test_numpy_itself_never_sees_a_foreign_state(tmp_path):
    # A byte type with the flag of Python objects: numpy would take it, and free what was never allocated.
    good = python2_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [1]})
    bad = good.replace(b"J\xff\xff\xff\xffK\x00tb", b"J\xff\xff\xff\xffK\x3ftb")
    assert bad != good
    (tmp_path / "b").write_bytes(bad)
    images, _ = read_batch(tmp_path / "b")
    assert images.dtype == np.uint8 and not images.dtype.hasobject


@pytest.mark.parametrize("dtype", [np.float32, object, np.int8])
def test_arrays_of_other_kinds_are_refused(tmp_path, dtype):
    (tmp_path / "b").write_bytes(pickle.dumps({"data": np.zeros((1, 3072), dtype), "labels": [1]}, protocol=4))
    with pytest.raises(UserError, match=r"data file .*b: got ValueError: an array that is not of plain bytes"):
        read_batch(tmp_path / "b")

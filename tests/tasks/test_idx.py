import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_samples import random_images, write_idx, write_idx_folder

from archsmith.core.errors import UserError
from archsmith.tasks.idx import idx_files, read_idx, read_idx_folder


@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4), zipped=st.booleans())
@settings(max_examples=30, deadline=None)
def test_round_trip(tmp_path_factory, shape, zipped):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = write_idx(tmp_path_factory.mktemp("idx") / ("a.gz" if zipped else "a"), array)
    assert np.array_equal(read_idx(path), array)
    assert read_idx(path).shape == tuple(shape)


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_truncated_file_says_what_is_missing(tmp_path, name):
    path = write_idx(tmp_path / name, np.zeros((2, 5, 5)), promise=(3, 5, 5))
    with pytest.raises(
        UserError, match="got 50 of the 75 bytes that its header promises for 3 x 5 x 5; allowed: a complete"
    ):
        read_idx(path)


def test_huge_promise_costs_nothing(tmp_path):
    path = write_idx(tmp_path / "a.gz", np.zeros(4), promise=(2**31, 2**20))
    with pytest.raises(UserError, match="got 4 of the 2251799813685248 bytes"):
        read_idx(path)


def test_longer_than_promised(tmp_path):
    with pytest.raises(UserError, match="got more than the 4 bytes"):
        read_idx(write_idx(tmp_path / "a", np.zeros(9), promise=(4,)))


def test_short_header(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0\x08\x03\0\0\0\x05")
    with pytest.raises(UserError, match="a header that ends early"):
        read_idx(tmp_path / "a")


@pytest.mark.parametrize("data", [b"", b"hello, this is text", b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0"])
def test_not_an_idx_file_of_bytes(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError, match=r"data file .*a: got the first bytes .*allowed: an idx file of unsigned bytes"):
        read_idx(tmp_path / "a")


@pytest.mark.parametrize("damage", ["cut", "flip", "plain"])
def test_corrupt_gzip(tmp_path, damage):
    path = write_idx(tmp_path / "a.gz", np.random.default_rng(0).integers(0, 256, (50, 5, 5)))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-6] ^= 255  # the checksum at the end
    else:
        data = bytearray(gzip.decompress(data))
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"data file .*a\.gz: got .*allowed: a readable idx file"):
        read_idx(path)


@pytest.mark.parametrize(
    "names", [("train", "t10k"), ("train4k", "test1k"), ("emnist-letters-train", "emnist-letters-test")]
)
def test_parts_are_told_by_their_names(tmp_path, names):
    expected = {}
    for stem, part in zip(names, ("train", "test"), strict=True):
        expected[part] = random_images(6, (4, 4), seed=len(stem))
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", expected[part][0])
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", expected[part][1])
    (tmp_path / "README").write_text("x")
    raw = read_idx_folder(tmp_path)
    assert list(raw.parts) == ["train", "test"]
    for part, (x, y) in expected.items():
        assert np.array_equal(raw.parts[part][0], x) and np.array_equal(raw.parts[part][1], y)


def test_plain_file_wins_over_its_gzip(tmp_path):
    write_idx_folder(tmp_path, suffix="")
    write_idx_folder(tmp_path, suffix=".gz")
    assert all(path.suffix != ".gz" for path in idx_files(tmp_path).values())


def test_two_files_for_one_role(tmp_path):
    write_idx_folder(tmp_path)
    write_idx(tmp_path / "train4k-images-idx3-ubyte", np.zeros((1, 2, 2)))
    with pytest.raises(
        UserError, match=r"data: got train-images.* and train4k-images.*allowed: one file with the images of"
    ):
        read_idx_folder(tmp_path)


def test_missing_labels(tmp_path):
    write_idx_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="data: got no labels file of the test part"):
        read_idx_folder(tmp_path)

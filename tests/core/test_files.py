import errno
import os
from pathlib import Path

import pytest

from archsmith.core import files
from archsmith.core.errors import UserError


def test_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_atomic(path, "long old content")
    files.write_atomic(path, "né")
    assert path.read_bytes() == "né".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_keeps_the_old_file_and_removes_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'$"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_content_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def note_replace(old: Path, new: Path) -> None:
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    files.write_atomic(tmp_path / "a", b"x")
    assert calls == ["file", "rename", "folder"]


def test_a_missing_folder_is_reported_by_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomic(tmp_path / "missing" / "a", b"x")
    assert caught.value.filename == str(tmp_path / "missing" / "a")


def test_remove_parts_takes_only_what_killed_writers_left(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    part = tmp_path / "deep" / ".weights.123-4.part"
    for path in (part, tmp_path / "my.part", tmp_path / ".hidden"):
        path.write_text("x")
    assert files.remove_parts(tmp_path) == [part]
    assert sorted(os.listdir(tmp_path)) == [".hidden", "deep", "my.part"]
    assert os.listdir(tmp_path / "deep") == []


def test_json_round_trip_keeps_key_order_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None, "é"], "a": {"x": True}}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert list(files.read_json(path)) == ["b", "a"]
    with pytest.raises(ValueError, match="nan"):
        files.write_json(path, {"loss": float("nan")})
    assert files.read_json(path) == value


def test_sha256_of_a_file_equals_that_of_its_bytes(tmp_path: Path) -> None:
    assert files.sha256_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    data = bytes(range(256)) * 4100  # more than the one MiB read at a time
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == files.sha256_of(data)


def test_storage_errors_say_the_cause_the_place_and_what_to_do() -> None:
    with (
        pytest.raises(UserError, match=r"out: got /x/a \(the disk is full\).*Free some space.* Nothing is lost\.$"),
        files.storage_errors("out", "/x", hint="Nothing is lost."),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/x/a")
    with (
        pytest.raises(UserError, match=r"out: got /x \(Input/output error\).*Check the path and the disk"),
        files.storage_errors("out", "/x"),
    ):
        raise OSError(errno.EIO, "Input/output error")

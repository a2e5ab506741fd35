"""Reading tables: the catalogue, memory-mapped columns, and files that are missing, damaged or of another edition."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_tables import table_folder
from small_runs import ROOT

from archsmith.core.errors import MissingExtra, UserError
from archsmith.evaluate.tables import TableEvaluator, open_table, table_catalogue
from archsmith.evaluate.tables.columns import MANIFEST, checked_columns, read_columns
from archsmith.space import Trial

SMALL = {"code": np.arange(4, dtype=np.int8), "accuracy": np.linspace(0, 1, 4, dtype=np.float32)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    np.savez_compressed(tmp_path / "small.npz", **SMALL)
    return tmp_path / "small.npz"


def test_the_catalogue_is_literal_and_needs_neither_torch_nor_the_tables() -> None:
    rows = table_catalogue()
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    for row in rows:
        assert {"name", "title", "rows", "space", "datasets", "fidelities", "files", "module"} <= set(row)
        for digest in (*row["files"].values(), *row.get("beside", {}).values()):
            assert len(digest) == 64 and int(digest, 16) >= 0
    code = (
        "import sys; from archsmith.evaluate.tables import table_catalogue; table_catalogue(); "
        "print({'torch', 'scipy', 'sklearn', 'pyarrow', 'archsmith.evaluate.tables.nas_bench_201'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


def test_no_table_needs_torch() -> None:
    modules = [f"archsmith.evaluate.tables.{row['module']}" for row in table_catalogue()]
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'scipy', 'sklearn', 'pyarrow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_catalogue_knows_the_files() -> None:
    """The digests are those of the real files."""
    from archsmith.core.files import sha256_file

    folder = table_folder()
    for row in table_catalogue():
        for file, digest in (row["files"] | row.get("beside", {})).items():
            assert sha256_file(folder / file) == digest


def test_unknown_names_and_options() -> None:
    with pytest.raises(UserError, match=r"table name: got 'nas-bench-999'; allowed: .*nas-bench-201"):
        open_table("nas-bench-999", "x")
    with pytest.raises(
        UserError, match=r"options: got \['speed'\]; allowed: for nas-bench-201: \['beside', 'checksum'"
    ):
        open_table("nas-bench-201", "x", speed=1)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        open_table("nas-bench-201", tmp_path / "nas-bench-201.npz")
    text = str(raised.value)
    assert (
        "nas-bench-201.npz (no such file)" in text
        and "never downloads on its own" in text
        and "docs/guide/tables.md" in text
    )
    with pytest.raises(UserError, match="no table in this folder"):
        open_table("nas-bench-201", tmp_path)


def test_a_damaged_or_other_table_is_refused_by_its_checksum(tmp_path: Path) -> None:
    known = next(row for row in table_catalogue() if row["name"] == "nas-bench-201")["files"]["nas-bench-201.npz"]
    for content in (b"PK\x03\x04 half a file", b""):
        (tmp_path / "nas-bench-201.npz").write_bytes(content)
        with pytest.raises(UserError, match=rf"nas-bench-201.npz with sha256 {known}") as raised:
            open_table("nas-bench-201", tmp_path)
        assert "damaged or another edition" in str(raised.value)
        with pytest.raises(UserError, match="that is whole"):
            open_table("nas-bench-201", tmp_path, checksum=False)


def test_a_truncated_real_file(tmp_path: Path) -> None:
    for name in ("nas-bench-201.npz", "nas-bench-201.parquet"):
        data = (table_folder() / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match="damaged or another edition"):
            open_table("nas-bench-201", tmp_path / name)
        with pytest.raises(UserError, match=r"that is whole.*Reading: "):
            open_table("nas-bench-201", tmp_path / name, checksum=False)


def test_another_edition_with_the_wrong_columns(tmp_path: Path) -> None:
    with np.load(table_folder() / "nas-bench-201.npz") as archive:
        columns = {name: archive[name] for name in archive.files}

    def refused(changes: dict[str, Any], match: str) -> None:
        kept = {name: column for name, column in {**columns, **changes}.items() if column is not None}
        np.savez(tmp_path / "other.npz", **kept)
        with pytest.raises(UserError, match=match):
            open_table("nas-bench-201", tmp_path / "other.npz", checksum=False)

    refused({"val_acc_12ep_cifar10": None}, "a table with column 'val_acc_12ep_cifar10'")
    refused({"ops": columns["ops"] + 1}, r"table\.ops: .*each of the 15,625 cells once")
    refused({"ops": np.zeros_like(columns["ops"])}, r"table\.ops: .*each of the 15,625 cells once")
    refused({"params_cifar10": columns["params_cifar10"][:9]}, "columns of one length")
    refused({"params_cifar10": columns["params_cifar10"].astype(str)}, r"table\.params_cifar10: got '<U\d+'")


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="starts like neither of them"):
        read_columns("table", tmp_path / "table.csv", {}, checksum=False)


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"reading nas-bench-201.parquet needs .*'pyarrow'.*archsmith\[tables\]"):
        open_table("nas-bench-201", table_folder() / "nas-bench-201.parquet")


def test_columns_of_a_cache_are_mapped_and_equal(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for _ in range(2):
        columns = read_columns("table", small, {}, checksum=False, cache=folder)
        for name, column in SMALL.items():
            assert np.array_equal(columns[name], column) and columns[name].dtype == column.dtype
            assert type(columns[name]) is np.ndarray and isinstance(columns[name].base, np.memmap)
            assert not columns[name].flags.writeable
    assert checked_columns("table", columns, {"code": "iu", "accuracy": "f"}) == 4


def test_nothing_is_written_without_a_cache(small: Path) -> None:
    read_columns("table", small, {}, checksum=False)
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_a_cache_of_another_file_or_a_broken_one_is_made_anew(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    read_columns("table", small, {}, checksum=False, cache=folder)
    np.savez_compressed(small, code=np.arange(9))
    assert len(read_columns("table", small, {}, checksum=False, cache=folder)["code"]) == 9
    (folder / MANIFEST).write_text("{")
    assert len(read_columns("table", small, {}, checksum=False, cache=folder)["code"]) == 9
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": 99}))
    assert len(read_columns("table", small, {}, checksum=False, cache=folder)["code"]) == 9
    (folder / "code.npy").write_bytes(b"no")
    with pytest.raises(UserError, match="Delete this folder; it is made again"):
        read_columns("table", small, {}, checksum=False, cache=folder)
    shutil.rmtree(folder)
    folder.write_text("a file in the way")
    with pytest.raises(UserError, match="cache: got"):
        read_columns("table", small, {}, checksum=False, cache=folder)


def test_the_real_table_from_a_cache(tmp_path: Path) -> None:
    path = table_folder() / "nas-bench-201.npz"
    plain = TableEvaluator(open_table("nas-bench-201", path), fidelity=12)
    for _ in range(2):
        mapped = TableEvaluator(open_table("nas-bench-201", path, cache=tmp_path / "cache"), fidelity=12)
        for row in (0, 500, 15624):
            trial = Trial(id=1, architecture=plain.table.architecture(row))
            assert mapped.evaluate(trial) == plain.evaluate(trial)

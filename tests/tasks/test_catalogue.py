import subprocess
import sys

import pytest

from archsmith.core.errors import UserError
from archsmith.tasks import open_task, task_table


def test_table_lists_the_tasks():
    rows = [row for row in task_table() if row["title"] != "from another package"]
    assert [row["name"] for row in rows] == [
        "ag-news",
        "arrays",
        "cifar10",
        "digits",
        "fashion-mnist",
        "images",
        "mnist",
        "phrases",
        "spoken-digits",
        "sst2",
        "text",
    ]
    assert all(set(row) == {"name", "title", "data", "metric", "module"} and all(row.values()) for row in rows)


def test_table_of_another_folder_is_read_and_not_run(tmp_path):
    (tmp_path / "a.py").write_text(
        "raise SystemExit\nTASKS = ({'name': 'b', 'title': 't', 'data': 'file', 'metric': 'accuracy'},)\n"
    )
    (tmp_path / "c.py").write_text("x = 1\n")
    assert task_table(tmp_path) == [{"name": "b", "title": "t", "data": "file", "metric": "accuracy", "module": "a"}]


def test_listing_imports_no_torch():
    code = (
        "import sys, archsmith.tasks as t; t.task_table(); dir(t); "
        "assert not {'torch', 'numpy', 'scipy', 'sklearn', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rooms_below_load_no_optional_package():
    code = (
        "import sys\nfrom archsmith.tasks import open_task, LoaderTask, ImageClassification\n"
        "import archsmith.tasks.image_files, archsmith.tasks.digits\n"
        "assert not {'sklearn', 'PIL', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(
        UserError, match="task: got 'imagenet'; allowed: ag-news, arrays, cifar10, digits, fashion-mnist, images, mnist"
    ):
        open_task("imagenet")


@pytest.mark.parametrize("name", ["digits", "cifar10", "images"])
def test_unknown_option_lists_the_known_ones(name, tmp_path):
    with pytest.raises(
        UserError, match=f"option of task {name}: got 'size'; allowed: resolution, resample, limit, .*crop, flip"
    ):
        open_task(name, size=3)


def test_unknown_attribute():
    import archsmith.tasks

    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = archsmith.tasks.Nothing


def test_outside_package_joins_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text("def make(name, *, data, options):\n    return (name, data, options)\n")
    info = tmp_path / "my_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[archsmith.tasks]\nmine = my_tasks:make\ndigits = my_tasks:make\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {
        "name": "mine",
        "title": "from another package",
        "data": "",
        "metric": "",
        "module": "my_tasks:make",
    } in task_table()
    assert [row["module"] for row in task_table() if row["name"] == "digits"] == ["digits"]
    assert open_task("mine", data="x", a=1) == ("mine", "x", {"a": 1})

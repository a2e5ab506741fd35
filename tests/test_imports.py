"""What is imported when: help and tables at once, optional packages only where they are used."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import ROOT

from archsmith.methods import method_table

PACKAGE = ROOT / "archsmith"
OPTIONAL = {
    "botorch", "datasets", "lightgbm", "lightning", "lightning_fabric", "onnx", "onnxruntime", "onnxscript", "optuna",
    "optuna_dashboard", "plotly", "pyarrow", "pymoo", "ray", "sqlalchemy", "tensorboard", "torch_geometric", "torchao",
    "torchaudio", "torchvision", "transformers",
}  # fmt: skip
NO_TORCH = [
    "__init__.py",
    "cli.py",
    "config.py",
    "core",
    "space",
    "strategies",
    "predictors",
    "methods/__init__.py",
    "families/flexibert_graph.py",
    "families/flexibert_space.py",
    "families/__init__.py",
    "families/cell_spaces.py",
    "families/graph_cells.py",
    "families/module_spaces.py",
    "families/table_spaces.py",
    "evaluate/base.py",
    "evaluate/cache.py",
    "evaluate/tables",
]
TORCH_ROOMS = ["graph", "layers", "cost", "atoms", "supernet", "families", "tasks", "train"]

WATCH = """
import atexit, sys
loaded = lambda: {name.partition(".")[0] for name in sys.modules} & {heavy}
atexit.register(lambda: print("\\nHEAVY", *sorted(loaded()), file=sys.stderr))
"""


def heavy_modules(code: str) -> list[str]:
    watched = WATCH.replace("{heavy}", repr({"torch", "scipy", "sklearn", "onnx", "plotly", "numpy.random"})) + code
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().splitlines()[-1].split()[1:]


@pytest.mark.parametrize(
    "words", [None, ["--help"], ["search", "--help"], ["methods", "--json"], ["tasks"], ["families", "--json"]]
)
def test_help_and_tables_load_neither_torch_nor_scipy(words: list[str] | None) -> None:
    code = "import archsmith; dir(archsmith)" if words is None else f"from archsmith.cli import main; main({words!r})"
    assert heavy_modules(code) == []


def test_the_watch_sees_what_is_loaded() -> None:
    assert "torch" in heavy_modules("import archsmith; archsmith.search")


def test_importing_everything_writes_nothing(tmp_path: Path) -> None:
    code, home = "import archsmith.api, archsmith.cli, archsmith.methods.atomnas", {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **home}
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def module_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and name of every module that is imported when ``path`` is (``if TYPE_CHECKING`` is not)."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def files(*places: str) -> list[Path]:
    found = [PACKAGE / place for place in places if (PACKAGE / place).exists()]
    return sorted(file for place in found for file in ([place] if place.is_file() else place.rglob("*.py")))


def test_module_imports_are_found_where_they_hide(tmp_path: Path) -> None:
    hiding = tmp_path / "hiding.py"
    hiding.write_text(
        "try:\n    import a\nexcept ImportError:\n    from b import c\n"
        "if TYPE_CHECKING:\n    import d\nelse:\n    import e\n"
        "class X:\n    import f\ndef g():\n    import h\n"
    )
    assert sorted(name for _, name in module_imports(hiding)) == ["a", "b.c", "e", "f"]


def test_the_lowest_rooms_import_no_torch() -> None:
    light = {"numpy", "pydantic", "yaml", "typer", "rich", "archsmith"}
    for path in files(*NO_TORCH):
        for line, name in module_imports(path):
            root = name.partition(".")[0]
            assert root in light or root in sys.stdlib_module_names, f"{path}:{line} imports {name}"


def test_the_rooms_below_the_run_import_torch_numpy_and_safetensors_only() -> None:
    allowed = {"torch", "numpy", "safetensors", "archsmith"}
    checked = files(*TORCH_ROOMS)
    assert len(checked) > 30
    for path in checked:
        for line, name in module_imports(path):
            root = name.partition(".")[0]
            assert root in allowed or root in sys.stdlib_module_names, f"{path}:{line} imports {name}"
            assert not name.startswith("torch.utils.tensorboard"), f"{path}:{line} imports {name}"


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for path in files("."):
        for line, name in module_imports(path):
            assert name.partition(".")[0] not in OPTIONAL, f"{path}:{line} imports {name} at module level"
            assert not name.startswith("torch.utils.tensorboard"), f"{path}:{line} imports {name} at module level"


def test_layers_import_torch_and_layers_alone() -> None:
    for path in files("layers"):
        for line, name in module_imports(path):
            root = name.partition(".")[0]
            assert root == "torch" or name.startswith("archsmith.layers") or root in sys.stdlib_module_names, (
                f"{path}:{line} imports {name}"
            )


def test_nothing_is_unpickled() -> None:
    for path in files("."):
        text = path.read_text(encoding="utf-8")
        found = re.search(r"(?<![.\w])(torch|pickle|joblib|dill)\.loads?\(|allow_pickle=True", text)
        assert found is None, f"{path} has {found}"


@pytest.mark.parametrize("row", [r for r in method_table() if "/" in r["file"]], ids=lambda row: row["slug"])
def test_every_method_has_its_tests_its_page_and_a_literal_system(row: dict[str, object]) -> None:
    source = ROOT / str(row["file"])
    assert source.stem == str(row["slug"]).replace("-", "_")
    systems = [
        ast.literal_eval(node.value)
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SYSTEM"
    ]
    assert len(systems) == 1
    assert {"slug", "title", "year", "arxiv", "kind", "aliases"} <= set(systems[0])
    assert systems[0]["kind"] in ("search", "shrink", "train", "evaluate", "layer", "protocol")
    assert (ROOT / "tests" / "methods" / f"test_{source.name}").is_file()
    assert (ROOT / "docs" / "systems" / f"{row['slug']}.md").is_file()


def test_the_public_names_load() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import archsmith; print([getattr(archsmith, name) is not None for name in archsmith.__all__])",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "False" not in done.stdout, done.stderr


def test_an_unknown_public_name_is_refused() -> None:
    import archsmith

    with pytest.raises(AttributeError, match=r"has no attribute 'serach'; public names: .*search"):
        archsmith.serach  # noqa: B018

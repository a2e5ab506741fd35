import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.core.files import sha256_file
from archsmith.core.journal import Journal
from archsmith.core.protocols import Logger
from archsmith.run.directory import Run, config_differences

CONFIG: dict[str, Any] = {"method": "atomnas", "seed": 0, "train": {"epochs": 3, "rates": [0.1, 1e-5]}, "note": "é: #1"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def everything_below(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@contextmanager
def as_nobody() -> Iterator[None]:
    """Permissions mean nothing to root, so give it up for the block."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- creation and configuration ---


def test_a_new_run_holds_its_configuration_in_the_journal_and_in_a_file(path: Path) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        assert isinstance(run, Logger)
        assert run.status == "new"
        assert run.config == CONFIG
        assert run.result() is None
    assert sorted(os.listdir(path)) == ["config.yaml", "journal.jsonl", "lock"]
    assert yaml.safe_load((path / "config.yaml").read_text()) == {"format_version": 1, **CONFIG}
    (started,) = Journal(path / "journal.jsonl").read()
    assert (started["kind"], started["format_version"], started["config"]) == ("run_started", 1, CONFIG)


def test_the_stored_file_starts_the_same_run_and_is_never_rewritten(path: Path, tmp_path: Path) -> None:
    Run.create_or_open(path, CONFIG).close()
    file = path / "config.yaml"
    stored = yaml.safe_load(file.read_text())
    file.write_text("# a comment of mine\n" + file.read_text())
    before = file.stat()
    with Run.create_or_open(path, stored) as run:
        assert run.config == CONFIG
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    with Run.create_or_open(tmp_path / "copy", stored) as run:
        assert run.config == CONFIG
    with Run.open(path) as run:
        assert run.config == CONFIG


@given(st.dictionaries(st.text().filter(lambda key: key != "format_version"), json_values, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_json_configuration_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("run")
    Run.create_or_open(path, config).close()
    with Run.create_or_open(path, config) as run:
        assert run.config == config


def test_tuples_count_as_lists_and_other_types_are_refused_before_anything_is_made(path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        Run.create_or_open(path, {"out": Path("x")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        Run.create_or_open(path, {"rate": float("nan")})
    assert not path.parent.exists()
    Run.create_or_open(path, {"kernels": (3, 5)}).close()
    with Run.create_or_open(path, {"kernels": [3, 5]}) as run:
        assert run.config == {"kernels": [3, 5]}


def test_another_configuration_is_refused_with_the_differences(path: Path) -> None:
    Run.create_or_open(path, CONFIG).close()
    before = everything_below(path)
    other = {**CONFIG, "train": {"epochs": 5, "rates": [0.1, 1e-5]}, "budget": "macs<=0.5x"}
    with pytest.raises(UserError, match="another configuration") as caught:
        Run.create_or_open(path, other)
    assert str(caught.value).endswith(':\n  train.epochs: 3 -> 5\n  budget: (not set) -> "macs<=0.5x"')
    assert {**everything_below(path), "lock": b""} == {**before, "lock": b""}
    Run.create_or_open(path, CONFIG).close()  # the refused opening holds no lock


def test_an_edited_configuration_is_refused_by_both_ways_in(path: Path) -> None:
    Run.create_or_open(path, CONFIG).close()
    file = path / "config.yaml"
    original = file.read_text()
    file.write_text(original.replace("seed: 0", "seed: 1"))
    entrances: list[Callable[[], Run]] = [
        lambda: Run.open(path),
        lambda: Run.create_or_open(path, {**CONFIG, "seed": 1}),
    ]
    for enter in entrances:
        with pytest.raises(UserError, match=r"(?s)config: got .*config\.yaml, which was edited.*\n  seed: 0 -> 1$"):
            enter()
    file.write_text("seed: [")
    with pytest.raises(UserError, match=r"config\.yaml, which cannot be read .*Delete it to have it written again"):
        Run.open(path)
    file.unlink()
    Run.open(path).close()
    assert file.read_text() == original


def test_a_newer_format_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"format_version: got 2 in the configuration; allowed: 1 to 1\."):
        Run.create_or_open(path, {"format_version": 2})
    assert not path.exists()
    Run.create_or_open(path, CONFIG).close()
    config, journal = path / "config.yaml", path / "journal.jsonl"
    original = config.read_text()
    config.write_text(original.replace("format_version: 1", "format_version: 3"))
    with pytest.raises(UserError, match=r"format_version: got 3 in .*config\.yaml"):
        Run.open(path)
    config.write_text(original)
    journal.write_text(journal.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match=r"format_version: got 9 in the run in .*newer one"):
        Run.open(path)


def test_differences_are_listed_by_path() -> None:
    old = {"a": {"b": [1, 2], "gone": {}}, "same": None, "type": 1}
    new = {"a": {"b": [1, 3, 4], "c": []}, "same": None, "type": True}
    assert config_differences(old, new) == [
        "a.b[1]: 2 -> 3",
        "a.gone: {} -> (not set)",
        "type: 1 -> true",
        "a.b[2]: (not set) -> 4",
        "a.c: (not set) -> []",
    ]
    assert config_differences(old, old) == []


# --- places that are no runs ---


def test_a_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    before = everything_below(tmp_path)
    with pytest.raises(UserError, match=r"holds something else \(config\.yaml, photo\.png\).*nothing was changed"):
        Run.create_or_open(tmp_path, CONFIG)
    assert everything_below(tmp_path) == before


def test_opening_where_no_run_is(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="where no run is"):
            Run.open(place)
    assert everything_below(tmp_path) == {}


def test_a_path_below_or_at_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(UserError, match=r"out: got .*file.* \(a part of the path is a file, not a folder\)"):
            Run.create_or_open(place, CONFIG)
    assert everything_below(tmp_path) == {"file": b"mine"}


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o000)
    with as_nobody():
        for place in (locked, locked / "run", secret / "run"):
            with pytest.raises(
                UserError, match=r"out: got .*(locked|secret).*\(no permission\); allowed: a place that can"
            ):
                Run.create_or_open(place, CONFIG)
    assert everything_below(tmp_path) == {"locked": None, "secret": None}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(("limit", "file"), [(0, "run"), (200, "journal.jsonl"), (800, "config.yaml")])
def test_a_disk_that_fills_up_at_the_start_leaves_nothing(
    tmp_path: Path, existing: bool, limit: int, file: str
) -> None:
    path = tmp_path / "a" / "run"
    if existing:
        path.mkdir(parents=True)
    config = {"note": "é" * 250}  # twice as long in the YAML file as in the journal
    script = f"""
import resource
from archsmith.core.errors import UserError
from archsmith.run.directory import Run
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    Run.create_or_open({str(path)!r}, {config!r})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"{file} (the file size limit is reached)" in done.stdout
    assert everything_below(tmp_path) == ({"a": None, "a/run": None} if existing else {})


def test_a_process_killed_while_starting_leaves_a_folder_that_can_be_used(path: Path) -> None:
    Run.create_or_open(path, CONFIG).close()
    first = (path / "journal.jsonl").read_bytes()
    (path / "config.yaml").unlink()
    (path / ".config.yaml.7-7.part").write_text("format_ver")
    for torn in (first, first[:-20], b""):  # before the configuration, within the first event, before it
        (path / "journal.jsonl").write_bytes(torn)
        with Run.create_or_open(path, CONFIG) as run:
            assert run.status == "new"
        assert sorted(os.listdir(path)) == ["config.yaml", "journal.jsonl", "lock"]
        (path / "config.yaml").unlink()


# --- the journal of the run ---


def test_events_are_stamped_kept_and_found_by_kind(path: Path) -> None:
    time = datetime(2031, 5, 6, 7, 8, 9, 123, tzinfo=timezone(timedelta(hours=2)))
    with Run.create_or_open(path, CONFIG, now=lambda: time) as run:
        run.record("epoch", epoch=0, sizes=(1, 2))
        run.record_many([{"kind": "epoch", "epoch": 1}, {"kind": "cut", "atoms": {"a": 3}}])
        assert run.status == "unfinished"
        live = run.events()
    expected = {"kind": "epoch", "time": "2031-05-06T05:08:09Z", "epoch": 0, "sizes": [1, 2]}
    assert live[1] == expected
    with Run.open(path) as run:
        assert run.events() == live == Journal(path / "journal.jsonl").read()
        assert [event["epoch"] for event in run.events("epoch")] == [0, 1]
        assert run.status == "unfinished"


def test_times_are_those_of_the_system_by_default(path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    with Run.create_or_open(path, CONFIG) as run:
        run.record("x")
        assert before <= datetime.fromisoformat(run.events("x")[0]["time"]) <= datetime.now(UTC)


@pytest.mark.parametrize("bad", [{"no": 1}, {"kind": 3}, {"kind": "x", "time": 5}])
def test_events_need_a_kind_and_bring_no_time(path: Path, bad: dict[str, object]) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        with pytest.raises(ValueError, match="an event needs a text 'kind' and no 'time'"):
            run.record_many([{"kind": "fine"}, bad])
        assert run.status == "new"


def test_a_failed_record_is_neither_in_memory_nor_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        run.record("epoch", epoch=0)

        def full(handle: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(
                UserError, match=r"journal\.jsonl \(the disk is full\).*Everything recorded before is safe"
            ):
                run.record("epoch", epoch=1)
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.record("epoch", loss=float("inf"))
        assert [event["epoch"] for event in run.events("epoch")] == [0]
        assert run.events() == Journal(path / "journal.jsonl").read()


def test_in_the_history_the_last_attempt_wins(path: Path) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        for attempt, epochs in enumerate([(0, 1, 2, 3), (2,), (2, 3)]):
            for epoch in epochs:
                run.record("epoch", epoch=epoch, attempt=attempt)
                run.record("other", epoch=99)
        assert [(e["epoch"], e["attempt"]) for e in run.history()] == [(0, 0), (1, 0), (2, 2), (3, 2)]
        run.record("epoch", epoch=1, attempt=3)  # epochs 2 and 3 will be replayed from here
        assert [(e["epoch"], e["attempt"]) for e in run.history()] == [(0, 0), (1, 3)]
        run.record("round", round=4)
        assert [e["round"] for e in run.history("round", by="round")] == [4]


def test_reads_of_the_test_split_are_counted_over_the_life_of_the_run(path: Path) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        run.count_test_read("final evaluation")
    with Run.open(path) as run:
        run.count_test_read("verify")
        assert run.test_reads == 2
        assert [event["why"] for event in run.events("test_read")] == ["final evaluation", "verify"]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda text: text.replace("epoch", 'ep"och', 1), "line 2 is not JSON"),
        (lambda text: text[text.index("\n") + 1 :], "its first event is not a run's start"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "its first event is not a run's start"),
    ],
)
def test_a_damaged_journal_is_refused(path: Path, damage: Any, what: str) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        run.record("epoch")
        run.record("epoch")
    journal = path / "journal.jsonl"
    lines = journal.read_text().split("\n", 1)
    if "line 2" in what:
        journal.write_text(lines[0] + "\n" + damage(lines[1]))
    else:
        journal.write_text(damage(journal.read_text()))
    entrances: list[Callable[[], Run]] = [lambda: Run.open(path), lambda: Run.create_or_open(path, CONFIG)]
    for enter in entrances:
        with pytest.raises(UserError, match=rf"run: got .*journal\.jsonl, which is damaged .*{what}"):
            enter()


def test_opening_tidies_up_after_killed_writers(path: Path) -> None:
    Run.create_or_open(path, CONFIG).close()
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / ".epoch-1.safetensors.77-8.part").write_bytes(b"half")
    Run.open(path).close()
    assert everything_below(path / "checkpoints") == {}


# --- the end ---


def test_a_finished_run_stays_finished_and_knows_its_result(path: Path) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        run.count_test_read("final evaluation")
        run.stopped({"method": "atomnas", "status": "made up"})
        assert run.events("finished") == []
        assert run.result() == {"format_version": 1, "status": "stopped", "test_reads": 1, "method": "atomnas"}
        run.finish({"method": "atomnas", "outcomes": []})
        assert run.status == "finished"
    with Run.create_or_open(path, CONFIG) as run:
        assert run.status == "finished"
        expected = {"format_version": 1, "status": "finished", "test_reads": 1, "method": "atomnas", "outcomes": []}
        assert run.result() == expected == json.loads((path / "result.json").read_text())
        assert run.events("finished")[0]["sha256"] == sha256_file(path / "result.json")
        run.count_test_read("verify")
        assert run.status == "finished"
        with pytest.raises(RuntimeError, match="finished already"):
            run.stopped({})


def test_a_finished_result_that_was_changed_is_refused(path: Path) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        run.finish({"accuracy": 0.5})
        file = path / "result.json"
        file.write_text(file.read_text().replace("0.5", "0.9"))
        with pytest.raises(UserError, match=r"result\.json, which is not the file that the run finished with"):
            run.result()
        file.unlink()
        with pytest.raises(UserError, match=r"result\.json, which is not the file"):
            run.result()


def test_a_kill_between_the_result_and_its_event_leaves_a_run_to_resume(path: Path) -> None:
    with Run.create_or_open(path, CONFIG) as run:
        run.stopped({})
        run.finish({})
    journal = path / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    with Run.open(path) as run:
        assert run.status == "unfinished"
        assert run.result() is None
        run.finish({"again": True})
        assert run.result() == {"format_version": 1, "status": "finished", "test_reads": 0, "again": True}

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.run import checkpoints
from archsmith.run.checkpoints import CheckpointStore, check_disk_space
from archsmith.run.directory import Run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.create_or_open(tmp_path / "run", {}) as run:
        yield run


@pytest.fixture
def store(run: Run) -> CheckpointStore:
    return CheckpointStore(run.path / "checkpoints", run)


def names(store: CheckpointStore) -> list[str]:
    return sorted(name.split(".")[0] for name in os.listdir(store.folder))


def save_steps(store: CheckpointStore, *steps: int, best: int | None = None) -> list[Path]:
    return [store.save(f"s{n}", {"w": torch.full((3,), float(n))}, {"step": n}, best=n == best) for n in steps]


def loaded_step(store: CheckpointStore) -> tuple[int, list[str]]:
    loaded = store.load_latest()
    assert loaded is not None
    tensors, state, notes = loaded
    assert tensors["w"].tolist() == [float(state["step"])] * 3
    return state["step"], notes


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


AWKWARD: dict[str, Tensor] = {
    "z bfloat16": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a float64 nan": torch.tensor([float("nan"), -0.0, float("inf"), 5e-324], dtype=torch.float64),
    "int64": torch.tensor([2**63 - 1, -(2**63)]),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "empty too": torch.zeros(2, 0),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "half": torch.tensor([1e-7], dtype=torch.float16),
}


def test_every_kind_of_tensor_comes_back_bit_for_bit_in_order(store: CheckpointStore) -> None:
    state = {"epoch": 3, "rate": 0.1, "seed": 2**62 + 1, "betas": (0.9, 0.99), "deep": {"x": [None, "é"]}}
    store.save("epoch-0003", AWKWARD, state)
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.notes == []
    assert loaded.state == {**state, "betas": [0.9, 0.99]}
    assert list(loaded.tensors) == list(AWKWARD)
    for name, tensor in AWKWARD.items():
        back = loaded.tensors[name]
        assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor)), name


def test_tensors_that_share_memory_or_have_gaps_are_saved_apart(store: CheckpointStore) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tied = nn.Parameter(torch.ones(2))
    tensors = {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3],
        "column": base[:, 2],
        "expanded": torch.tensor(5.0).expand(3, 2),
        "channels last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "tied": tied,
        "tied again": tied,
    }
    path = store.save("s", tensors, {})
    loaded = store.load_latest()
    assert loaded is not None
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in tensors.items())
    loaded.tensors["base"].zero_()
    assert torch.equal(loaded.tensors["slice"], base[1:3])
    assert base[0, 1] == 1
    lonely = store.save("t", {"slice": base[1:3]}, {})
    assert path.stat().st_size > lonely.stat().st_size
    assert lonely.stat().st_size < 400  # twelve numbers and a header, not the storage behind them


def test_a_checkpoint_is_a_plain_safetensors_file(store: CheckpointStore) -> None:
    path = store.save("s", {"w": torch.ones(2)}, {"step": 4})
    with safe_open(path, framework="pt") as file:
        assert file.keys() == ["w"]
        content = json.loads(file.metadata()["archsmith.checkpoint"])
    assert content == {"format_version": 1, "names": ["w"], "state": {"step": 4}}


def test_equal_checkpoints_are_equal_files(store: CheckpointStore) -> None:
    paths = {store.save("s", AWKWARD, {"b": 1, "a": {"d": 2, "c": 3}}) for _ in range(8)}
    assert len(paths) == 1


def test_a_checkpoint_of_a_newer_version_is_not_misread(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_FORMAT_VERSION", 2)
        save_steps(store, 2)
    step, (note,) = loaded_step(store)
    assert step == 1
    assert "it has format version 2, the newest known is 1; s1." in note


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            {"optimizer": {"state": {0: 1}}},
            r"state\['optimizer'\]\['state'\] must have text keys, got 0; use str\(key\)",
        ),
        ({"groups": [{1: 2}]}, r"state\['groups'\]\[0\] must have text keys, got 1"),
        ({"best": float("-inf")}, "not JSON compliant"),
    ],
)
def test_state_that_would_not_come_back_the_same_is_refused(
    store: CheckpointStore, state: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        store.save("s", {}, state)
    assert store.load_latest() is None


@pytest.mark.parametrize("bad", ["", "../s", "a/b", ".hidden", "a b"])
def test_step_names_are_plain(store: CheckpointStore, bad: str) -> None:
    with pytest.raises(ValueError, match="step_name must be letters, digits"):
        store.save(bad, {}, {})
    assert not store.folder.exists()


# --- retention ---


def test_the_last_ones_and_the_best_are_kept(store: CheckpointStore) -> None:
    assert store.load_latest() is None
    assert store.load_best() is None
    save_steps(store, 1, 2, 3, 4, 5, best=2)
    assert names(store) == ["s2", "s4", "s5"]
    assert loaded_step(store) == (5, [])
    best = store.load_best()
    assert best is not None
    assert best.state == {"step": 2}
    save_steps(store, 6, best=6)
    assert names(store) == ["s5", "s6"]
    save_steps(store, 7, 8)
    assert names(store) == ["s6", "s7", "s8"]


@given(st.lists(st.booleans(), max_size=8), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_retention_holds_for_any_order_of_bests(
    tmp_path_factory: pytest.TempPathFactory, bests: list[bool], keep: int
) -> None:
    with Run.create_or_open(tmp_path_factory.mktemp("run"), {}) as run:
        store = CheckpointStore(run.path / "checkpoints", run, keep=keep)
        for step, best in enumerate(bests):
            store.save(f"s{step}", {"w": torch.ones(1)}, {"step": step}, best=best)
            best_so_far = [i for i in range(step + 1) if bests[i]][-1:]
            assert names(store) == sorted(f"s{i}" for i in {*range(max(0, step + 1 - keep), step + 1), *best_so_far})


def test_keeping_none_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="keep: got 0; allowed: 1 or more"):
        CheckpointStore(run.path, run, keep=0)


def test_a_replayed_step_replaces_its_entry_and_files_of_killed_saves_go(store: CheckpointStore) -> None:
    save_steps(store, 1, 2)
    (store.folder / "s3.0123456789ab.safetensors").write_bytes(b"complete, but the kill came before the journal")
    assert loaded_step(store) == (2, [])
    save_steps(store, 1)  # the same bits: the same file, now the newest
    assert loaded_step(store) == (1, [])
    assert names(store) == ["s1", "s2"]


# --- damage ---


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": truncate,
    "changed": flip_a_bit,
    "empty": empty,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_and_says_so(run: Run, store: CheckpointStore, damage: str) -> None:
    _, good, bad = save_steps(store, 1, 2, 3)
    DAMAGES[damage](bad)
    step, (note,) = loaded_step(store)
    assert step == 2
    reason = "it is missing" if damage == "missing" else "is not what was saved, the SHA-256 differs"
    assert note.startswith(f"checkpoint {bad} cannot be used: ")
    assert reason in note
    assert note.endswith(f"; {good.name} was used instead.")
    (rejected,) = run.events("checkpoint_rejected")
    assert rejected["file"] == bad.name
    # From here on the damaged one counts for nothing: said once, and never kept in place of a sound one.
    assert loaded_step(store) == (2, [])
    save_steps(store, 4)
    assert names(store) == ["s2", "s4"]


def test_a_damaged_file_is_noticed_by_a_later_process(run: Run, store: CheckpointStore) -> None:
    damaged = save_steps(store, 1, 2)[1]
    flip_a_bit(damaged)
    run.close()
    with Run.open(run.path) as later:
        step, (note,) = loaded_step(CheckpointStore(store.folder, later))
        assert (step, damaged.name in note) == (1, True)


def test_a_replay_after_a_fallback_makes_the_step_good_again(store: CheckpointStore) -> None:
    flip_a_bit(save_steps(store, 1, 2)[1])
    assert loaded_step(store)[0] == 1
    save_steps(store, 2)
    assert loaded_step(store) == (2, [])


def test_without_any_sound_checkpoint_all_problems_are_named(store: CheckpointStore) -> None:
    *_, first, second = save_steps(store, 8, 9, 1, 2)
    flip_a_bit(first)
    second.unlink()
    with pytest.raises(UserError, match="without a sound file") as caught:
        store.load_latest()
    text = str(caught.value)
    assert f"{second} cannot be used: it is missing; checkpoint {first} cannot be used: its content" in text
    assert text.count("cannot be used") == 2  # those removed by retention are no problem


def test_a_damaged_best_is_an_error(store: CheckpointStore) -> None:
    flip_a_bit(save_steps(store, 1, 2, 3, best=1)[0])
    with pytest.raises(UserError, match=r"s1\.[0-9a-f]{12}\.safetensors cannot be used"):
        store.load_best()


# --- room on the disk ---


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    script = f"""
import resource, torch
from archsmith.core.errors import UserError
from archsmith.run import checkpoints
from archsmith.run.checkpoints import CheckpointStore
from archsmith.run.directory import Run
with Run.create_or_open({str(tmp_path)!r}, {{}}) as run:
    store = CheckpointStore(run.path / "checkpoints", run, keep=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    for size in (9_000, 1_000, 9_000):
        try:
            print(store.save(f"size-{{size}}", {{"w": torch.ones(size)}}, {{}}).name)
        except UserError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    refused, good, kept = done.stdout.splitlines()
    place = tmp_path / "checkpoints" / "size-9000."
    assert refused.startswith(f"checkpoint: got {place}")
    assert "(the file size limit is reached)" in refused
    assert refused.endswith("There is no earlier checkpoint.")
    assert kept.startswith(f"checkpoint: got {place}")
    assert kept.endswith(f"The last good checkpoint, {good}, is kept.")
    assert os.listdir(tmp_path / "checkpoints") == [good]
    with Run.open(tmp_path) as run:
        loaded = CheckpointStore(tmp_path / "checkpoints", run).load_latest()
        assert loaded is not None
        assert (loaded.tensors["w"].numel(), loaded.notes) == (1_000, [])


def test_disk_space_is_checked_before_the_start(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(
        UserError, match=r"out: got .*/not/yet with [\d,]+ MiB free; allowed: .* 953,674,316,406 MiB free"
    ):
        check_disk_space(tmp_path / "not" / "yet", 10**18)
    assert list(tmp_path.iterdir()) == []


# --- kills ---


@pytest.mark.parametrize(
    "kills", [pytest.param(15, id="15 kills"), pytest.param(150, id="150 kills", marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_nothing_acknowledged_is_lost(tmp_path: Path, kills: int) -> None:
    """One parent that has imported torch forks writers and kills each with SIGKILL at a random moment."""
    worker = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path / "run"), str(kills)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(reports) == kills
    for acknowledged, found in reports:
        assert acknowledged <= found <= acknowledged + 1  # one more when the kill came between saving and saying so
    assert reports[-1][1] >= kills  # one and a half acknowledged saves a kill on average: the writers got somewhere
    leftovers = [p for p in (tmp_path / "run").rglob(".*") if p.suffix == ".part"]
    assert leftovers == []
    steps = [found for _, found in reports]
    assert all(earlier <= later for earlier, later in itertools.pairwise(steps))

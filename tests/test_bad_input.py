"""Wrong input: one clear paragraph, exit code 2, nothing half-written."""

from __future__ import annotations

import gzip
import pickle
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from image_samples import random_images, write_cifar_batches, write_idx_folder
from small_runs import (
    ENVIRONMENT,
    arguments,
    command,
    ending,
    events,
    run_cli,
    snapshot,
    start_cli,
    uninterrupted,
    wait_for,
)
from torch.utils.data import DataLoader, Dataset

import archsmith
from archsmith.cli import main
from archsmith.core.errors import ArchsmithError
from archsmith.tasks.loaders import LoaderTask


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line in this process and return its error, after checking that it is one paragraph, code 2."""

    def check(*words: str | Path, paragraph: bool = True) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        text = capsys.readouterr().err
        assert end.value.code == 2, text
        assert text.startswith("error: ") and "Traceback" not in text
        if paragraph:
            assert text.count("\n") == 1, text
            assert re.search(r"error: \S.*: got .*; allowed: .*\.\n$", text), text
        return text

    return check


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--method", "atomsnas"], r"method: got 'atomsnas'; allowed: .*atomnas"),
        (["--task", "digit"], r"task: got 'digit'; allowed: .*cifar10.*digits"),
        (["--family", "mobil"], r"family: got 'mobil'; allowed: .*mobile, mobile-chain, nas-bench-201"),
        (["--budget", ""], r"budget: got ''; allowed: limits"),
        (["--budget", "fast"], r"budget: got 'fast'; allowed: limits like"),
        (["--budget", "<=0.4x"], r"budget: got '<=0.4x'; allowed: a cost name .*'macs'.*Write macs<=0.4x"),
        (["--budget", "macs<=0x"], r"budget: got 'macs<=0x'; allowed: .*positive"),
        (["--budget", "macs<=-1M"], r"budget: got 'macs<=-1M'; allowed: .*positive"),
        (["--budget", "macs<=0.5q"], r"budget: got 'macs<=0.5q'; allowed: for macs the units"),
        (["--budget", "macs>=0.5x"], r"budget: got 'macs>=0.5x'; allowed: <= for macs"),
        (["--budget", "speed<=3"], r"budget: got 'speed<=3'; allowed: costs .*'macs'"),
        (["--budget", "energy<=1mJ"], r"budget: got 'energy<=1mJ'; allowed: limits on macs"),
        (
            ["--budget", "macs<=2x"],
            r"budget: got macs<=2x \(macs<=215360\); allowed: macs below 107680, .*above the supernet",
        ),
        (["--budget", "macs<=100"], r"budget: got macs<=100; allowed: macs at least .*below the smallest network"),
        (["--set", "lrr=1"], r"settings.lrr: got an unknown field; allowed: .*batch_size.*lr,"),
        (["--set", "epochs=0"], r"settings.epochs: got 0; allowed: .*greater than or equal to 1"),
        (["--set", "epochs=many"], r"settings.epochs: got 'many'; allowed: .*integer"),
        (["--set", "lr=.nan"], r"settings.lr: got nan; allowed: a finite number"),
        (["--set", "weight_decay=.inf"], r"settings.weight_decay: got inf; allowed: a finite number"),
        (["--set", "lr"], r"--set: got 'lr'; allowed: KEY=VALUE"),
        (["--set", "lr=[1"], r"--set: got 'lr=\[1'; allowed: KEY=VALUE"),
        (["--set", "free_epochs=9"], r"settings: got .*; allowed: warmup_epochs .* must not be below free_epochs"),
        (["--set", "batch_size=5000"], r"batch_size: got 5000; allowed: 1 to \d+, the size of the training part"),
        (["--threads", "0"], r"config.runtime.threads: got 0; allowed: .*greater than or equal to 1"),
        (["--seed", "-1"], r"config.seed: got -1; allowed: .*greater than or equal to 0"),
        (["--time", "soon"], r"time: got 'soon'; allowed"),
        (["--time", "0s"], r"time: got '0s'; allowed"),
        (["--time", ""], r"time: got ''; allowed"),
        (["--task-set", "colour=1"], r"option of task digits: got 'colour'; allowed: .*limit"),
        (["--task-set", "limit=0"], r"limit: got 0; allowed"),
        (["--task-set", "name=cifar10"], r"task option: got 'name'; allowed"),
        (["--task-set", "resolution=3"], r"resolution: got 3; allowed: .*4"),
        (["--family-set", "preset=huge"], r"family.preset: got 'huge'; allowed: auto, .*tiny"),
        (["--family-set", "depth=3"], r"family options: got \{.*'depth': 3.*Building it fails: .*depth"),
        (["--family-set", "rows=[[1, 8]]"], r"family options: got \{.*rows.*Building it fails"),
        (["--family-set", "dropout=.inf"], r"config.family.dropout: got inf; allowed: a finite number"),
        (["--family-set", "activation=cube"], r"cube"),
        (["--family-set", "squeeze_ratio=0.5"], r"family.squeeze_ratio: got 0.5; allowed: 0 while searching"),
        (["--data", "somewhere"], r"data: got 'somewhere'; allowed: nothing for the task digits"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    words: list[str], match: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "new" / "run"
    text = refused(*arguments(out, *words))
    assert re.search(match, text), text
    assert not (tmp_path / "new").exists()


def test_a_family_without_atoms_is_refused_by_a_method_that_cuts_them(tmp_path: Path) -> None:
    with pytest.raises(ArchsmithError, match=r"family: got 'nas-bench-201'; allowed: .*atoms.* has choices only"):
        archsmith.search("digits", out=tmp_path / "run", family="nas-bench-201", threads=1, quiet=True)
    assert not (tmp_path / "run").exists()


def arrays(path: Path, **changes: Any) -> Path:
    images, labels = random_images(90, (8, 8))
    np.savez(path, **{"x_train": images, "y_train": labels, "x_test": images[:30], "y_test": labels[:30], **changes})
    return path


def truncated(folder: Path) -> Path:
    file = write_idx_folder(folder) / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:2000])
    return folder


def corrupt(folder: Path) -> Path:
    file = write_idx_folder(folder) / "train-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(b"not an idx file at all"))
    return folder


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def pickled_batches(folder: Path) -> Path:
    (write_cifar_batches(folder) / "data_batch_3").write_bytes(pickle.dumps(Trap(folder / "trace"), protocol=2))
    return folder


def pickled_arrays(folder: Path) -> Path:
    folder.mkdir()
    return arrays(folder / "set.npz", x_train=np.array([Trap(folder / "trace")], dtype=object))


DATA = {
    "missing": ("mnist", lambda folder: folder / "nowhere", r"data: got .*nowhere"),
    "not given": ("mnist", None, r"data: got None"),
    "truncated": ("mnist", truncated, r"data file .*train-images-idx3-ubyte.gz: got Compressed file ended"),
    "corrupt": (
        "mnist",
        corrupt,
        r"data file .*train-labels-idx1-ubyte.gz: got the first bytes 6e 6f 74 20; allowed: an idx",
    ),
    "shape": (
        "arrays",
        lambda f: arrays(f.with_suffix(".npz"), x_train=np.zeros((90, 8), "u1")),
        r"x_train: got .*90, 8",
    ),
    "counts": ("arrays", lambda f: arrays(f.with_suffix(".npz"), y_train=np.zeros(7, "i8")), r"y_train: got "),
    "NaN": (
        "arrays",
        lambda f: arrays(f.with_suffix(".npz"), x_train=np.full((90, 8, 8), np.nan, "f4")),
        r"x_(train|test)",
    ),
    "too small": (
        "arrays",
        lambda f: arrays(f.with_suffix(".npz"), x_train=np.zeros((90, 3, 3), "u1"), x_test=np.zeros((30, 3, 3), "u1")),
        r"got .*3.*; allowed: .*4",
    ),
    "pickled batches": ("cifar10", pickled_batches, r"got a pickle that asks for .*; it was refused and nothing of it"),
    "pickled arrays": ("arrays", pickled_arrays, r"got Python objects \(a pickle\).*; allowed: plain arrays"),
}


@pytest.mark.parametrize("case", DATA)
def test_wrong_data_is_refused_before_anything_is_written(
    case: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    task, make, match = DATA[case]
    words = [] if make is None else ["--data", str(make(tmp_path / "data"))]
    text = refused("search", "--task", task, "--out", str(tmp_path / "run"), *words)
    assert re.search(match, text), text
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data" / "trace").exists(), "the pickle was executed"


def test_a_loss_that_is_nan_stops_with_batch_and_step(tmp_path: Path, refused: Callable[..., str]) -> None:
    run = tmp_path / "run"
    text = refused(*arguments(run, lr=1e20, lr_warmup_epochs=0), paragraph=False)
    assert re.search(
        r"the loss is nan at epoch 1, step 2 \(batch 1 of that epoch\); the step was not taken\. Lower the learning "
        r"rate \(--set lr=\.\.\.\).*No checkpoint had been saved yet\.\n$",
        text,
    ), text
    assert events(run, "diverged")[0]["step"] == 1
    assert not (run / "networks").exists() and not (run / "result.json").exists()
    assert refused("resume", run, "--quiet", paragraph=False).count("the loss is nan") == 1


class Spoiled(Dataset[tuple[torch.Tensor, int]]):
    """Images that turn into NaN from the third epoch on."""

    def __init__(self, epochs: int, count: int = 40) -> None:
        self.left = epochs * count
        self.images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.left -= 1
        return self.images[index] if self.left >= 0 else self.images[index] * float("nan"), index % 2


def test_a_nan_later_on_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    clean = DataLoader(Spoiled(10**9), batch_size=20)
    reads = 4  # of the training part: an epoch trains on it and recalibrates with it
    task = LoaderTask(DataLoader(Spoiled(reads), batch_size=20), clean, clean, num_classes=2)
    settings = {"epochs": 9, "batch_size": 20, "recalibration_batch_size": 20, "warmup_epochs": 0, "lr": 1e-3}
    options = {"rows": [[1, 8, 1, 1, [3]], [4, 8, 1, 1, [3]]], "stem_channels": 8, "last_channels": 8}
    with pytest.raises(ArchsmithError, match=r"nan at epoch \d, step 1 .*The last good checkpoint is epoch-0001-"):
        archsmith.search(task, out=tmp_path / "run", settings=settings, family_options=options, threads=1, quiet=True)
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) >= 1


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    text = refused(*arguments(tmp_path))
    assert re.search(r"out: got .* which holds something else \(thesis.txt\); allowed: a new or empty folder", text)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_another_configuration_is_refused_with_the_difference(finished: Path, refused: Callable[..., str]) -> None:
    before = snapshot(finished)
    text = refused(*arguments(finished, "--seed", "4", epochs=9), paragraph=False)
    assert re.search(r"out: got .*, which holds a run with another configuration; allowed: ", text)
    assert "\n  seed: 0 -> 4" in text and "\n  settings.epochs: 8 -> 9" in text
    assert text.count(" -> ") == 3  # these two, and the heading
    assert snapshot(finished) == before


def test_an_edited_configuration_is_refused_with_the_difference(copy: Path, refused: Callable[..., str]) -> None:
    lines = (copy / "journal.jsonl").read_text().splitlines(keepends=True)
    (copy / "journal.jsonl").write_text("".join(line for line in lines if '"finished"' not in line))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["settings"]["rho"] = 0.5
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    before = snapshot(copy)
    for words in (["resume", str(copy)], arguments(copy)):
        text = refused(*words, paragraph=False)
        assert re.search(r"config: got .*config.yaml, which was edited after the run started; allowed: ", text)
        assert "\n  settings.rho: 0.02 -> 0.5" in text and text.count(" -> ") == 2
    assert snapshot(copy) == before


def test_changed_data_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    data, run = arrays(tmp_path / "set.npz"), tmp_path / "run"
    small = ["--data", str(data), "--task", "arrays", "--time", "0.01s"]
    with pytest.raises(SystemExit) as end:
        main(arguments(run, *small, task_set=(), batch_size=20))
    assert end.value.code == 0
    images, labels = random_images(90, (8, 8), seed=7)
    arrays(data, x_train=images, y_train=labels)
    before = snapshot(run)
    text = refused("resume", run)
    assert re.search(
        r"task.data: got data with the digest \w+; allowed: the data of the configuration, digest \w+", text
    )
    assert "\n  task_digest: " in refused(*arguments(run, *small, task_set=(), batch_size=20), paragraph=False)
    assert snapshot(run) == before


@pytest.mark.parametrize("words", [["search", "--out"], ["resume"], ["verify"]])
def test_a_path_below_a_file_is_refused(words: list[str], tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "run"
    text = refused(*(arguments(below) if words[0] == "search" else [*words, str(below)]))
    assert str(tmp_path / "file") in text
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("verb", ["resume", "verify"])
def test_a_folder_without_a_run_is_refused(verb: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    text = refused(verb, tmp_path / "nowhere")
    assert re.search(r"run: got .*nowhere, where no run is; allowed: the folder of a run\.", text)
    assert list(tmp_path.iterdir()) == []


def test_the_result_of_a_finished_run_must_be_its_own(copy: Path, refused: Callable[..., str]) -> None:
    (copy / "result.json").write_text("{}")
    assert re.search(r"result: got .*not the file that the run finished with", refused("resume", copy))


def test_a_damaged_journal_is_refused(copy: Path, refused: Callable[..., str]) -> None:
    data = (copy / "journal.jsonl").read_bytes()
    (copy / "journal.jsonl").write_bytes(data[:2000] + b"\x00" * 30 + data[2030:])
    before = snapshot(copy)
    assert re.search(r"run: got .*journal.jsonl, which is damaged", refused("resume", copy))
    assert snapshot(copy) == before


def test_a_second_process_is_refused_while_the_first_lives(tmp_path: Path, refused: Callable[..., str]) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = start_cli(*arguments(run, epochs=100_000, budget=None), output=output)
    try:
        wait_for(lambda: events(run, "environment"), process)
        for words in (["resume", str(run)], arguments(run, epochs=100_000, budget=None)):
            text = refused(*words)
            assert re.search(rf"out: got .*, which is in use by process {process.pid} on ", text), text
        assert process.poll() is None, output.read_text()
    finally:
        process.kill()
        process.wait()


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path: Path, refused: Callable[..., str]) -> None:
    with files_limited_to(512):
        text = refused(*arguments(tmp_path / "new" / "run"))
    assert re.search(r"out: got .*\(the file size limit is reached\); allowed: a place that can be written", text)
    assert "No run was started." in text
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_full_disk_later_on_keeps_a_run_that_can_go_on(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    smallest = min(file.stat().st_size for file in (finished / "checkpoints").iterdir())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, smallest // 2))

    done = run_cli(*arguments(run), preexec_fn=limit)
    assert done.returncode == 2, done.stdout
    assert re.search(r"error: \S+: got .*\(the file size limit is reached\); allowed: ", done.stdout)
    assert "Traceback" not in done.stdout
    assert not (run / "networks").exists() and not (run / "result.json").exists()
    assert not list(run.rglob(".*")), "half-written files are left"
    with pytest.raises(SystemExit) as end:
        main(["resume", str(run), "--quiet"])
    assert end.value.code == 0
    assert ending(run) == ending(finished)


def verified(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["verify", str(run), *words])
    text = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().out).split())
    assert isinstance(end.value.code, int)
    return end.value.code, text


def test_an_edited_model_is_not_executed(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, trace = copy / "networks" / "final" / "model.py", tmp_path / "trace"
    source.write_text(f"import pathlib; pathlib.Path({str(trace)!r}).touch()\n" + source.read_text())
    code, text = verified(copy, capsys)
    assert code == 1
    assert not trace.exists(), "the edited file was executed"
    assert "nothing of it was executed" in text


def test_pickled_weights_are_not_unpickled(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, trace = copy / "networks" / "final" / "weights.safetensors", tmp_path / "trace"
    torch.save({"weights": Trap(trace)}, weights)
    code, text = verified(copy, capsys)
    assert code == 1
    assert not trace.exists(), "the pickle was executed"
    assert "nothing was unpickled" in text


def test_a_pickled_checkpoint_is_not_unpickled(copy: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    lines = (copy / "journal.jsonl").read_text().splitlines(keepends=True)
    (copy / "journal.jsonl").write_text("".join(line for line in lines if '"finished"' not in line))
    for file in (copy / "checkpoints").iterdir():
        file.write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    text = refused("resume", copy, "--quiet")
    assert re.search(r"checkpoint: got .* without a sound file", text)
    assert not (tmp_path / "trace").exists()


def test_profile_refuses_what_is_no_network(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert re.search(r"target: got 'torch.nn'", refused("profile", "torch.nn", "--shape", "1x3x8x8"))
    assert re.search(r"target: got .*no_such_module", refused("profile", "no_such_module:make", "--shape", "1x3x8x8"))
    missing = tmp_path / "missing.onnx"
    assert re.search(r"target: got .*missing.onnx", refused("profile", missing, "--shape", "1x3x8x8"))
    assert re.search(r"input: got '3-8'", refused("profile", "torch.nn:Identity", "--shape", "3-8"))


def test_an_unknown_option_is_refused() -> None:
    done = subprocess.run(command("search", "--bugdet", "macs<=0.4x"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--bugdet" in done.stderr and "--budget" in done.stderr

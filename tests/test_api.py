"""The Python functions: searches with names and with the user's own tasks, and going on by running again."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SETTINGS, ending, events, history, snapshot, uninterrupted
from torch.utils.data import DataLoader, Dataset

import archsmith
from archsmith.core.errors import UserError
from archsmith.tasks.base import Task
from archsmith.tasks.loaders import LoaderTask
from archsmith.tasks.vision import ImageClassification

FAMILY = {"rows": [[1, 8, 1, 1, [3]], [4, 8, 2, 2, [3, 5]]], "stem_channels": 8, "last_channels": 16}
SHORT = {"epochs": 4, "batch_size": 20, "recalibration_batch_size": 20, "warmup_epochs": 1, "rho": 0.02}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory)


def search(task: Task, out: Path, **changes: Any) -> archsmith.Outcome:
    options = {"budget": "macs<=0.7x", "settings": SHORT, "family_options": FAMILY, "threads": 1, "quiet": True}
    return archsmith.search(task, out=out, **{**options, **changes})


def test_names_mean_what_they_mean_on_the_command_line(finished: Path) -> None:
    before = snapshot(finished)
    outcome = archsmith.search(
        "digits",
        method="atomnas",
        budget="macs<=0.6x",
        out=finished,
        settings=SETTINGS,
        task_options={"limit": 20},
        family_options=FAMILY,
        threads=1,
    )
    assert outcome.status == "finished" and outcome.path == finished
    assert outcome.folder == finished / "networks" / "final"
    assert outcome.best["label"] == "final" and outcome.result["test_reads"] == 1
    assert outcome.best["costs"]["macs"] <= 0.6 * outcome.result["reference"]["macs"]
    assert archsmith.resume(finished) == outcome
    assert snapshot(finished) == before  # it was finished by the command line: nothing was trained again


def test_the_delivered_network_is_the_one_whose_accuracy_is_reported(finished: Path) -> None:
    from safetensors.torch import load_file

    outcome = archsmith.resume(finished)
    scope: dict[str, Any] = {"__name__": "delivered"}
    exec((outcome.folder / "model.py").read_text(), scope)
    network = scope["build"]()
    network.load_state_dict(load_file(outcome.folder / "weights.safetensors"))
    task = archsmith.open_task("digits", limit=20)
    for split in ("valid", "test"):
        assert task.evaluate(network.eval(), split)["accuracy"] == outcome.best["metrics"][f"{split}_accuracy"]


def arrays_task(seed: int = 0) -> ImageClassification:
    numbers = np.random.default_rng(seed)
    labels = np.arange(150) % 3
    images = numbers.integers(0, 90, (150, 8, 8), dtype=np.uint8)
    images[np.arange(150), labels * 2] += 120
    return ImageClassification.from_arrays(images, labels, name="stripes")


@pytest.mark.slow
def test_a_task_of_arrays_stops_and_goes_on_by_running_again(tmp_path: Path) -> None:
    straight = search(arrays_task(), tmp_path / "straight")
    run = tmp_path / "run"
    assert search(arrays_task(), run, time_limit=0.001).status == "stopped"
    with pytest.raises(UserError, match=r"task: got 'stripes'; allowed: .* run that script again with the same out="):
        archsmith.resume(run)
    with pytest.raises(UserError, match=r"task.data: got data with the digest .*; allowed: the data of the config"):
        archsmith.resume(run, task=arrays_task(seed=1))
    with pytest.raises(UserError, match=r"another configuration.*(?s:.)*task_digest: "):
        search(arrays_task(seed=1), run)
    outcome = search(arrays_task(), run)
    assert outcome.status == "finished"
    assert ending(run) == ending(tmp_path / "straight")
    assert outcome.best["metrics"] == straight.best["metrics"]
    assert archsmith.resume(run).result == outcome.result  # a finished run is only read, without its task
    report = archsmith.verify(run)
    assert report.ok
    assert {row.status for row in report.rows if row.name == "task data"} == {"not checked"}


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Random images; the one read as number ``stop_at`` is when the user presses Ctrl-C."""

    def __init__(self, stop_at: int = 0, count: int = 60) -> None:
        self.reads, self.stop_at = 0, stop_at
        self.images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        if self.reads == self.stop_at:
            signal.raise_signal(signal.SIGINT)
        return self.images[index] + 0.1 * torch.randn(1, 8, 8), index % 3  # an augmentation of the user's own


class Stateful(DataLoader[tuple[torch.Tensor, int]]):
    """A loader in an order of its own that can say where it is and go on from there."""

    def __init__(self, data: Images) -> None:
        super().__init__(data, batch_size=20)
        self.data, self.passes, self.at, self.restored = data, 0, 0, False

    def __len__(self) -> int:
        return len(self.data) // 20

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.at and not self.restored:
            self.passes, self.at = self.passes + 1, 0
        self.restored = False
        order = np.random.default_rng(self.passes).permutation(len(self.data))
        while self.at < len(self):
            rows = [self.data[int(i)] for i in order[self.at * 20 : (self.at + 1) * 20]]
            self.at += 1
            yield torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes, self.at, self.restored = state["passes"], state["at"], True


def loader_task(stop_at: int = 0) -> LoaderTask:
    train = DataLoader(Images(stop_at), batch_size=20, shuffle=True)
    valid = DataLoader(Images(count=30), batch_size=15)
    return LoaderTask(train, valid, DataLoader(Images(count=30), batch_size=15), num_classes=3)


def test_loaders_resume_exactly_in_the_middle_of_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    search(loader_task(), tmp_path / "straight")
    assert "epoch starts" not in capsys.readouterr().out
    stopped = search(loader_task(stop_at=150), run)  # an epoch reads 60 to train and 60 to recalibrate
    assert stopped.status == "stopped"
    assert events(run, "checkpoint")[-1]["step"] == "epoch-0001-step-00002"
    assert search(loader_task(), run).status == "finished"
    assert ending(run) == ending(tmp_path / "straight")


@pytest.mark.slow
def test_a_loader_with_a_state_gets_it_back(tmp_path: Path) -> None:
    def task(stop_at: int = 0) -> LoaderTask:
        valid = DataLoader(Images(count=30), batch_size=15)
        return LoaderTask(Stateful(Images(stop_at)), valid, num_classes=3)

    run = tmp_path / "run"
    assert search(task(stop_at=150), run).status == "stopped"
    position = events(run, "checkpoint")[-1]["step"]
    assert position == "epoch-0001-step-00002"
    assert search(task(), run).status == "finished"
    search(task(), tmp_path / "straight")
    assert history(run) == history(tmp_path / "straight")
    result = json.loads((run / "result.json").read_text())
    assert "test_accuracy" not in result["outcomes"][0]["metrics"] and result["test_reads"] == 0


def test_a_loader_that_cannot_repeat_itself_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class OwnOrder(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(np.random.permutation(60).tolist())

        def __len__(self) -> int:
            return 60

    train = DataLoader(Images(), batch_size=20, sampler=OwnOrder())
    task = LoaderTask(train, DataLoader(Images(count=30), batch_size=15), num_classes=3)
    search(task, tmp_path / "run", time_limit=0.001)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search("If this run is interrupted, the training loader resumes at epoch starts: its order", said)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "darts2"}, "method: got 'darts2'; allowed: "),
        ({"family": "mobil"}, "family: got 'mobil'; allowed: .*mobile, mobile-chain, nas-bench-201"),
        ({"budget": "macs<=9x"}, "above the supernet"),
        ({"settings": {"epochs": 0}}, "settings.epochs: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"memory_format": "nhwc"}, "memory_format: got 'nhwc'; allowed: .*'channels_last' or 'contiguous'"),
        ({"time_limit": 0.0}, "time_limit: got 0.0; allowed: seconds above 0, or None"),
        (
            {"data": "somewhere"},
            "task: got a task object together with .*somewhere.*; allowed: these for tasks given by",
        ),
        ({"task_options": {"limit": 9}}, "task: got a task object together with .*limit"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        search(arrays_task(), tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_task_must_be_a_name_or_a_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task: got 42; allowed: the name of a task, or an archsmith.Task"):
        archsmith.search(42, out=tmp_path / "run")  # type: ignore[arg-type]


def test_the_callers_threads_are_put_back(tmp_path: Path) -> None:
    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(3)
    try:
        search(arrays_task(), tmp_path / "run", time_limit=0.001, threads=1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert signal.getsignal(signal.SIGINT) is handler

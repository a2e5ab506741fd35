import sys
import warnings
from pathlib import Path

import pytest

from archsmith.run.scalars import Scalars

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    EventAccumulator = None

with_tensorboard = pytest.mark.skipif(EventAccumulator is None, reason="the extra 'tensorboard' is not installed")


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@with_tensorboard
def test_curves_are_in_the_files_after_a_flush(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path / "tensorboard")
    scalars.add(0, {"train/loss": 2.5, "macs": 10})
    scalars.add(1, {"train/loss": 1.5})
    scalars.flush()
    assert curve(tmp_path / "tensorboard", "train/loss") == [(0, 2.5), (1, 1.5)]
    assert curve(tmp_path / "tensorboard", "macs") == [(0, 10.0)]
    scalars.close()
    scalars.close()


@with_tensorboard
def test_a_resumed_run_replaces_the_steps_that_it_replays(tmp_path: Path) -> None:
    with Scalars(tmp_path) as scalars:
        for step in range(5):
            scalars.add(step, {"loss": 1.0})
    with Scalars(tmp_path, purge_step=3) as scalars:
        for step in range(3, 6):
            scalars.add(step, {"loss": 2.0})
    assert curve(tmp_path, "loss") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_without_tensorboard_it_says_so_once_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match=r"archsmith\[tensorboard\]'\. The run goes on without them\.") as caught:
        scalars = Scalars(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scalars.add(0, {"loss": 1.0})
        scalars.flush()
        scalars.close()
    assert list(tmp_path.iterdir()) == []

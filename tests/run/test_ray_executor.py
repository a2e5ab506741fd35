"""Ray takes half a minute to start: everything here is slow but the argument checks."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from study_samples import SPACE, Climber, Misbehaving, Quick, score

from archsmith.core.errors import UserError
from archsmith.core.journal import Journal
from archsmith.run.ray_executor import RayExecutor
from archsmith.run.study import JournalStore, recorded_trials, run_study
from archsmith.space import Result, Trial
from archsmith.strategies import RandomSearch

pytest.importorskip("ray")


@dataclass
class OnANode:
    """Writes trial and node when it begins, and takes its time."""

    log: str
    sleep: float

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        import ray

        with open(self.log, "a", encoding="utf-8") as stream:
            stream.write(f"{trial.id} {ray.get_runtime_context().get_node_id()}\n")
        time.sleep(self.sleep)
        return Result(metrics={"valid_accuracy": score(trial.architecture)}, seconds=1.0)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_node_is_killed_and_every_trial_ends_with_a_result(cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    killed: list[str] = []

    def kill() -> None:
        while not killed:
            nodes = [line.split()[1] for line in log.read_text().splitlines()] if log.exists() else []
            if node.node_id in nodes:
                killed.append(node.node_id)
                cluster.remove_node(node, allow_graceful=False)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = run_study(
        RandomSearch(SPACE), OnANode(str(log), sleep=1.5), budget=14, workers=4, executor=RayExecutor(num_cpus=1),
        store=JournalStore(tmp_path / "s"),
    )  # fmt: skip
    thread.join()
    assert killed
    trials = list(recorded_trials(tmp_path / "s"))
    assert [trial.id for trial, _ in trials] == list(range(1, 15))
    assert all(result is not None and result.status == "ok" for _, result in trials)
    assert outcome.pending == ()
    lost = [event for event in Journal(tmp_path / "s" / "journal.jsonl").read() if event["kind"] == "lost"]
    assert lost
    begun = [line.split() for line in log.read_text().splitlines()]
    assert {event["id"] for event in lost} <= {int(trial) for trial, _ in begun}
    assert len({name for _, name in begun}) == 2  # both nodes had worked
    plain = run_study(RandomSearch(SPACE), Quick(), budget=14)
    assert [t.architecture for t, _ in trials] == [t.architecture for t, _ in plain.history]


@pytest.mark.slow
def test_bad_candidates_and_resources(cluster: Any) -> None:
    executor = RayExecutor(num_cpus=0.5, resources={"chip": 1})
    cluster.add_node(num_cpus=1, resources={"chip": 2})
    cluster.wait_for_nodes()
    evaluator = Misbehaving({2: "raise", 3: "segfault", 4: "hang"})
    outcome = run_study(Climber(), evaluator, budget=5, workers=2, executor=executor, time_limit=2.0, attempts=2)
    assert [result.reason for _, result in outcome.history] == [
        None,
        "ArithmeticError: loss diverged",
        "the process of the evaluation was ended by SIGSEGV",
        "time limit: not finished after 2 s, killed",
        None,
    ]
    crashed = run_study(
        RandomSearch(SPACE), Misbehaving({2: "exit"}), budget=3, workers=1, executor=executor, attempts=2
    )
    reason = crashed.history[1][1].reason
    assert reason is not None
    assert reason.startswith("given up after 2 attempts: ")
    executor.shutdown()  # joined a cluster that was there: leaves it alone
    import ray

    assert ray.is_initialized()


def test_resources_are_not_negative() -> None:
    with pytest.raises(UserError, match="num_gpus: got -1; allowed: 0 or more"):
        RayExecutor(num_gpus=-1)

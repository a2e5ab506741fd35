import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_samples import FAMILY, MODULE, QUICK, evaluator_on

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.evaluate.base import Evaluator
from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.evaluate.weights import FolderWeightStore, MemoryWeightStore
from archsmith.families.cells import open_family as open_cells
from archsmith.families.modules import ModuleFamily, open_family
from archsmith.run.costs import exact_costs
from archsmith.run.study import JournalStore, recorded_trials, run_study
from archsmith.space import Result, Trial
from archsmith.space.modules import Affine, Concat, Tanh, UserHyperparams
from archsmith.strategies import RandomSearch, SuccessiveHalving
from archsmith.tasks.catalogue import open_task
from archsmith.train.patience import Patience
from archsmith.train.recipe import Training, TrainingRecipe, result_weights

TASK = open_task("digits", limit=40)
SMALL, LARGE = FAMILY.smallest(), FAMILY.largest()


def evaluator(**changes: Any) -> TrainedEvaluator:
    return evaluator_on(TASK, **changes)


def trial(number: int = 1, architecture: Any = LARGE, **changes: Any) -> Trial:
    return Trial(id=number, architecture=architecture, **{"seed": 5, **changes})


def told(result: Result) -> dict[str, Any]:
    return {**result.to_json(), "seconds": 0.0}


def test_digits_are_learned_and_the_trial_decides_all() -> None:
    assert isinstance(evaluator(), Evaluator)
    first = evaluator(epochs=8).evaluate(trial())
    assert first.status == "ok" and first.metrics["valid_accuracy"] > 0.6  # chance is 0.1
    assert set(first.metrics) == {"valid_accuracy", "valid_loss", "train_accuracy", "train_loss", "epochs"}
    assert first.metrics["epochs"] == 8 and first.seconds > 0
    torch.manual_seed(99)
    assert told(evaluator(epochs=8).evaluate(trial(number=7))) == told(first)
    assert told(pickle.loads(pickle.dumps(evaluator(epochs=8))).evaluate(trial())) == told(first)  # noqa: S301
    assert told(evaluator(epochs=8).evaluate(trial(seed=6))) != told(first)


def test_costs_are_those_of_the_network() -> None:
    network = FAMILY.build(LARGE)
    expected = exact_costs(network, FAMILY.image)
    assert evaluator(costs=("macs", "params", "memory"), epochs=1).evaluate(trial()).costs == expected
    assert evaluator(costs=("macs",)).exact_costs(LARGE) == {"macs": count(network, torch.zeros(1, 1, 8, 8)).macs}


def test_a_lower_fidelity_is_the_beginning_of_the_full_training() -> None:
    store = MemoryWeightStore()
    short = evaluator().evaluate(trial(fidelity=2), weights=store)
    again = evaluator().evaluate(trial(2, parent=1, seed=77, info={"weights": short.weights}), weights=store)
    whole = evaluator().evaluate(trial(), weights=store)
    assert short.metrics["epochs"] == 2 and again.metrics["epochs"] == 3
    assert told(again) == told(whole) != told(short)
    assert again.weights == whole.weights != short.weights


@pytest.mark.parametrize("optimizer", ["sgd_mom", "adam"])
def test_a_continued_training_with_patience_is_the_uninterrupted_one(optimizer: str) -> None:
    rule = Patience(rate_patience=1, rate_mult=0.1, stop_patience=3)
    settings = {"schedule": "constant", "optimizer": optimizer, "lr": 0.02, "epochs": 9, "patience": rule}
    store = MemoryWeightStore()
    key, parent = None, None
    for number, fidelity in enumerate((2, 3, 6, None), start=1):
        info = {} if key is None else {"weights": key}
        result = evaluator(**settings).evaluate(
            trial(number, fidelity=fidelity, parent=parent, info=info), weights=store
        )
        key, parent = result.weights, number
    whole = evaluator(**settings).evaluate(trial(), weights=store)
    assert told(result) == told(whole)
    network = FAMILY.build(LARGE)
    network.load_state_dict(result_weights(store.get(str(whole.weights))))
    assert TASK.evaluate(network.eval(), "valid")["accuracy"] == whole.metrics["valid_accuracy"]


def test_without_the_parents_weights_training_starts_anew() -> None:
    plain = evaluator().evaluate(trial())
    gone = trial(2, parent=1, info={"weights": "0" * 64})
    for given in (evaluator().evaluate(gone, weights=MemoryWeightStore()), evaluator().evaluate(gone)):
        assert given.metrics == plain.metrics
    store = MemoryWeightStore()
    other = evaluator().evaluate(trial(architecture=SMALL), weights=store)
    with pytest.raises(UserError, match=r"trial\.info\['weights'\]: got .*, the weights of another network"):
        evaluator().evaluate(trial(2, parent=1, info={"weights": other.weights}), weights=store)


def test_patience_keeps_the_best_epoch_and_stops() -> None:
    rule = Patience(rate_patience=1, rate_mult=0.5, stop_patience=2)
    recipe = TrainingRecipe(epochs=100, batch_size=32, schedule="constant", lr=0.02, patience=rule)
    training = Training(FAMILY.build(LARGE, seed=0), TASK, recipe, seed=0)
    scores: list[float] = []
    while not training.is_over:
        training.run(training.epochs + 1)
        scores.append(TASK.evaluate(training.network.eval(), "valid")["accuracy"])
    assert training.patience is not None
    assert len(scores) == training.epochs < 100
    assert training.patience.stopped == "no improvement in 2 epochs"
    assert training.patience.best_epoch == training.epochs - 3 == scores.index(max(scores))
    assert training.finish()["accuracy"] == max(scores)


def test_rates_follow_the_recipe() -> None:
    def rates(recipe: TrainingRecipe) -> list[float]:
        training, seen = Training(FAMILY.build(SMALL, seed=0), TASK, recipe, seed=0), []
        for _ in range(recipe.epochs):
            training.run(training.epochs + 1)
            seen.append(training.optimizer.param_groups[0]["lr"])  # of the last step of the epoch
        return seen

    common: dict[str, Any] = {"epochs": 3, "batch_size": 100, "lr": 0.3}
    steps = TASK.steps_per_epoch(100)
    assert rates(TrainingRecipe(schedule="constant", **common)) == [0.3] * 3
    linear = rates(TrainingRecipe(schedule="linear", **common))
    assert linear == pytest.approx([0.3 * (1 - (steps * (e + 1) - 1) / (3 * steps)) for e in range(3)])
    assert rates(TrainingRecipe(schedule="cosine", warmup_epochs=1, **common))[0] == pytest.approx(0.3)
    rule = Patience(rate_patience=1, rate_mult=0.5)
    stuck = TrainingRecipe(schedule="constant", patience=rule, **{**common, "lr": 1e-12})
    assert rates(stuck)[-1] == 1e-12  # below the floor: never raised


def test_published_values_override_the_recipe() -> None:
    module = Concat([UserHyperparams(lr=[0.1, 1e-9], optimizer=["adam", "sgd_mom"]), MODULE])
    family = ModuleFamily(image=(1, 8, 8), num_classes=10, module=module)
    tuned = TrainedEvaluator(family, TASK, **QUICK)
    found = {}
    for lr in (0.1, 1e-9):
        choice = {**family.largest(), "0-UserHyperparams/lr": lr, "0-UserHyperparams/optimizer": "sgd_mom"}
        found[lr] = tuned.evaluate(trial(architecture=family.space.validate(choice))).metrics
    assert found[0.1] == evaluator(optimizer="sgd_mom").evaluate(trial()).metrics
    assert found[1e-9]["valid_accuracy"] < 0.4 < found[0.1]["valid_accuracy"]
    recipe = TrainingRecipe(schedule="constant", patience=Patience())
    changed = recipe.with_published({"rate_mult": 0.25, "rate_patience": 4, "batch_size": 16})
    assert changed.patience == Patience(rate_mult=0.25, rate_patience=4) and changed.batch_size == 16
    with pytest.raises(UserError, match=r"recipe\.depth: got an unknown field; allowed: epochs, batch_size"):
        recipe.with_published({"depth": 3})
    with pytest.raises(UserError, match=r"\['rate_mult'\]; allowed: values of a recipe that has a patience"):
        TrainingRecipe().with_published({"rate_mult": 0.5})
    with pytest.raises(UserError, match=r"recipe\.lr: got -1"):
        recipe.with_published({"lr": -1})


def test_what_goes_wrong_is_a_failed_result() -> None:
    diverged = evaluator(lr=1e30, epochs=5).evaluate(trial())
    assert diverged.status == "failed" and "diverged: the loss is" in str(diverged.reason)

    broken = TrainedEvaluator(Broken(image=(1, 8, 8), num_classes=10, module=MODULE, label="tiny"), TASK, **QUICK)
    assert broken.evaluate(trial()).reason == "RuntimeError: too wide"


class Broken(ModuleFamily):
    def build(self, architecture: Any, *, seed: int | None = None) -> Any:
        raise RuntimeError("too wide")


@pytest.mark.parametrize("fidelity", [0, 1.5, 4])
def test_fidelities_are_epochs(fidelity: float) -> None:
    with pytest.raises(
        UserError, match=rf"trial\.fidelity: got {fidelity}; allowed: a whole number of epochs from 1 to 3"
    ):
        evaluator().evaluate(trial(fidelity=fidelity))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": 0}, r"recipe\.epochs: got 0"),
        ({"rate": 1}, r"recipe\.rate: got an unknown field"),
        ({"batch_size": 10_000}, "batch_size: got 10000; allowed: 1 to"),
        ({"patience": Patience()}, r"recipe\.schedule: got 'cosine'; allowed: 'constant' with patience"),
        ({"momentum": 0.0}, r"recipe\.momentum: got 0\.0"),
        ({"costs": ("latency",)}, r"costs: got \['latency'\]"),
        ({"threads": 0}, "threads: got 0"),
        ({"device": "tpu"}, "device: got 'tpu'"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        evaluator(**changes)


def test_family_and_task_have_to_fit() -> None:
    family = open_family("deeparchitect", image=(3, 8, 8), num_classes=10, divisor=8)
    with pytest.raises(
        UserError, match=r"images \(3, 8, 8\) of 10 classes; allowed: images \(1, 8, 8\) and 10 classes"
    ):
        TrainedEvaluator(family, TASK)
    with pytest.raises(UserError, match="architecture"):
        evaluator().evaluate(trial(architecture=family.smallest()))


def test_other_families_do_as_well() -> None:
    cells = open_cells("nas-bench-201", image=(1, 8, 8), num_classes=10, channels=4, cells=1)
    result = TrainedEvaluator(cells, TASK, **QUICK).evaluate(trial(architecture=cells.largest()))
    assert result.status == "ok" and result.metrics["valid_accuracy"] > 0.3


def test_promoted_trials_go_on_from_the_weights_that_were_kept(tmp_path: Path) -> None:
    halving = SuccessiveHalving(FAMILY.space, fidelities=[1, 2, 4], width=4, eta=2, brackets=1, seed=0)
    store = FolderWeightStore(tmp_path / "weights")
    outcome = run_study(halving, evaluator(epochs=4), budget=7, weights=store)
    by_id = {each.id: (each, result) for each, result in outcome.history}
    promoted = [(each, result) for each, result in outcome.history if each.parent is not None]
    assert len(promoted) == 3
    for each, result in promoted:
        parent, before = by_id[each.parent or 0]
        assert each.info["weights"] == before.weights
        first = parent if parent.parent is None else by_id[parent.parent][0]
        alone = evaluator(epochs=4).evaluate(
            Trial(id=1, architecture=each.architecture, fidelity=each.fidelity, seed=first.seed)
        )
        assert alone.metrics == result.metrics


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from trained_samples import FAMILY, evaluator_on
from archsmith.evaluate.weights import FolderWeightStore
from archsmith.run.study import JournalStore, run_study
from archsmith.strategies import RandomSearch
from archsmith.tasks.catalogue import open_task

if __name__ == "__main__":
    folder, task = Path(sys.argv[2]), open_task("digits", limit=40)
    outcome = run_study(
        RandomSearch(FAMILY.space, seed=1), evaluator_on(task, epochs=2), budget=6, workers=2, isolate=True,
        store=JournalStore(folder), weights=FolderWeightStore(folder / "weights"),
    )
    print(outcome.status, outcome.told, outcome.failed)
"""


@pytest.mark.slow
def test_a_killed_study_with_two_workers_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    script, folder = tmp_path / "study.py", tmp_path / "run"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(Path(__file__).parent), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        journal = folder / "journal.jsonl"
        if journal.exists() and '"kind": "result"' in journal.read_text():
            break
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 1 <= sum(result is not None for _, result in recorded_trials(folder)) < 6
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "finished 6 0", done.stderr
    plain = run_study(RandomSearch(FAMILY.space, seed=1), evaluator(epochs=2), budget=6, weights=MemoryWeightStore())
    stored = [told(result) for _, result in recorded_trials(folder) if result is not None]
    assert json.dumps(stored) == json.dumps([told(result) for _, result in plain.history])


def test_tanh_networks_without_normalisation_train_too(tmp_path: Path) -> None:
    family = ModuleFamily(image=(1, 8, 8), num_classes=10, module=Concat([Affine([8, 16]), Tanh(), Affine([10])]))
    outcome = run_study(
        RandomSearch(family.space, unique=True),
        TrainedEvaluator(family, TASK, **QUICK),
        budget=5,
        store=JournalStore(tmp_path),
    )
    assert (outcome.told, outcome.failed) == (2, 0)

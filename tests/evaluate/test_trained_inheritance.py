"""Trials that grow from the weights of another trial's network."""

from typing import Any

import pytest
import torch
from trained_samples import FAMILY as MODULES

from archsmith.core.errors import UserError
from archsmith.evaluate.trained import GrowingFamily, TrainedEvaluator
from archsmith.evaluate.weights import MemoryWeightStore
from archsmith.families.densenet import open_family as open_dense
from archsmith.families.plain import PlainFamily
from archsmith.families.plain import open_family as open_plain
from archsmith.space import Architecture, Trial
from archsmith.tasks.catalogue import open_task
from archsmith.train.recipe import result_weights

TASK = open_task("digits", limit=20)
QUICK: dict[str, Any] = {"epochs": 2, "costs": (), "batch_size": 20, "lr": 0.05}
EXACT = {"widen_noise": 0.0, "deepen_noise": 0.0}
PLAIN = open_plain("plain", image=(1, 8, 8), num_classes=10, blocks=2, **EXACT)
DENSE = open_dense("densenet", image=(1, 8, 8), num_classes=10, blocks=2, depth=4, **EXACT)
CHILDREN = {
    "plain": (PLAIN, PLAIN.space.from_tokens(["conv-8-3", "conv-8-3", "pool", "conv-4-3", "pool", "fc-16"])),
    "dense": (DENSE, DENSE.space.of_growths([[6, 6], [4]])),
}


def grown_trial(child: Architecture, parent: Architecture, weights: str | None, **info: Any) -> Trial:
    data = {"parent_architecture": parent.to_json(), "weights": weights, **info}
    return Trial(id=2, architecture=child, parent=1, seed=9, info=data)


@pytest.mark.parametrize("kind", ["plain", "dense"])
def test_a_child_begins_where_its_parent_ended(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, child = CHILDREN[kind]
    start, store = family.space.start(), MemoryWeightStore()
    trainer = TrainedEvaluator(family, TASK, **QUICK)
    first = trainer.evaluate(Trial(id=1, architecture=start, seed=4), weights=store)
    seen: dict[str, float] = {}

    def untrained(self: Any, epochs: int) -> None:
        seen.update(TASK.evaluate(self.network.eval(), "valid"))

    with monkeypatch.context() as patch:
        patch.setattr("archsmith.train.recipe.Training.run", untrained)
        patch.setattr("archsmith.train.recipe.Training.train", {"accuracy": 0.0, "loss": 0.0}, raising=False)
        trainer.evaluate(grown_trial(child, start, first.weights), weights=store)
    assert seen["accuracy"] == pytest.approx(first.metrics["valid_accuracy"])
    assert seen["loss"] == pytest.approx(first.metrics["valid_loss"], abs=1e-4)
    later = trainer.evaluate(grown_trial(child, start, first.weights), weights=store)
    assert later.metrics["epochs"] == QUICK["epochs"]  # a training of its own, not the rest of the parent's
    assert later.metrics["inherited"] == 1.0 and "inherited" not in first.metrics
    assert later.metrics["train_loss"] < first.metrics["train_loss"]
    again = trainer.evaluate(grown_trial(child, start, first.weights), weights=store)
    assert again.metrics == later.metrics and again.weights == later.weights


def test_edits_decide_where_more_than_one_way_leads_to_the_child() -> None:
    start, store = PLAIN.space.start(), MemoryWeightStore()
    trainer = TrainedEvaluator(PLAIN, TASK, **QUICK)
    key = trainer.evaluate(Trial(id=1, architecture=start, seed=4), weights=store).weights
    child = PLAIN.space.grown(start, [("widen", 0, 0, 8), ("deepen", 0, 0, 3)])
    late = [["widen", 0, 0, 8], ["deepen", 0, 0, 3]]
    early = [["deepen", 0, 0, 3], ["widen", 0, 0, 8], ["widen", 0, 1, 8]]
    ends = {}
    for name, edits in (("matched", None), ("late", late), ("early", early)):
        info = {} if edits is None else {"edits": edits}
        result = trainer.evaluate(grown_trial(child, start, key, **info), weights=store)
        ends[name] = result_weights(store.get(str(result.weights)))["blocks.0.1.linear.weight"]
    assert torch.equal(ends["matched"], ends["late"])
    assert not torch.equal(ends["early"], ends["late"])


def test_an_unchanged_network_is_trained_anew_from_its_weights() -> None:
    start, store = PLAIN.space.start(), MemoryWeightStore()
    trainer = TrainedEvaluator(PLAIN, TASK, **QUICK)
    first = trainer.evaluate(Trial(id=1, architecture=start, seed=4), weights=store)
    again = trainer.evaluate(grown_trial(start, start, first.weights), weights=store)
    assert again.metrics["train_loss"] < first.metrics["train_loss"]
    resumed = Trial(id=3, architecture=start, parent=1, seed=9, info={"weights": first.weights})
    assert trainer.evaluate(resumed, weights=store).metrics == first.metrics


def test_without_weights_the_child_is_initialised() -> None:
    family, child = CHILDREN["plain"]
    trainer = TrainedEvaluator(family, TASK, **QUICK)
    start = family.space.start()
    fresh = {**trainer.evaluate(Trial(id=2, architecture=child, seed=9)).metrics, "inherited": 0.0}  # it is said
    assert trainer.evaluate(grown_trial(child, start, None), weights=MemoryWeightStore()).metrics == fresh
    assert trainer.evaluate(grown_trial(child, start, "0" * 64), weights=MemoryWeightStore()).metrics == fresh
    assert trainer.evaluate(grown_trial(child, start, "0" * 64)).metrics == fresh


def test_weights_that_do_not_fit_are_refused() -> None:
    family, child = CHILDREN["plain"]
    start, store = family.space.start(), MemoryWeightStore()
    trainer = TrainedEvaluator(family, TASK, **QUICK)
    key = trainer.evaluate(Trial(id=1, architecture=child), weights=store).weights
    with pytest.raises(UserError, match="the weights of another network"):
        trainer.evaluate(grown_trial(child, start, key), weights=store)
    with pytest.raises(UserError, match="inherited weights: got those of conv-8-3 conv-8-3"):
        trainer.evaluate(grown_trial(start, child, key), weights=store)
    assert isinstance(PLAIN, GrowingFamily) and isinstance(DENSE, GrowingFamily) and isinstance(family, PlainFamily)
    assert not isinstance(MODULES, GrowingFamily)
    other = TrainedEvaluator(MODULES, TASK, **QUICK)
    with pytest.raises(UserError, match="families with a method inherit"):
        other.evaluate(grown_trial(MODULES.smallest(), MODULES.smallest(), key), weights=store)

import json

import numpy as np
import pytest
import torch

from archsmith import api
from archsmith.core.errors import UserError
from archsmith.evaluate.trained import GrowingFamily
from archsmith.families.flexibert import FlexiBertFamily, open_family
from archsmith.methods import load_method
from archsmith.methods.flexibert import (
    SYSTEM,
    Searcher,
    Settings,
    embedded_library,
    family_for,
    refined_library,
    search,
    strategy,
)
from archsmith.run.directory import Run
from archsmith.run.study import JournalStore, recorded_trials
from archsmith.space import Architecture, Result
from archsmith.tasks.catalogue import open_task

SMALL = {"hidden": (8, 16), "sizes": (8, 12), "counts": (1, 2), "library": 25, "initial": 3}


def test_it_is_listed_under_both_names():
    for name in ("flexibert", "boshnas"):
        row, module = load_method(name)
        assert row["slug"] == SYSTEM["slug"] and module.SYSTEM is SYSTEM


def test_the_library_is_the_level_of_the_hierarchy():
    family = FlexiBertFamily(image=(6,), num_classes=2, vocabulary=9)
    pool = embedded_library(family.settings.level(1), 30)
    assert len(pool) == 30 and pool.features_MD.shape == (30, 16)
    again = embedded_library(family.settings.level(1), 30)
    np.testing.assert_array_equal(pool.features_MD, again.features_MD)


def test_weights_pass_to_a_neighbour_as_far_as_layers_agree():
    small = {"hidden": (8, 12), "sizes": (6,), "embedding": 8, "vocabulary": 20, "depths": (4,), "dropout": 0.0}
    family = open_family("flexibert", image=(6,), num_classes=3, **small)
    assert isinstance(family, GrowingFamily)
    parent = family.largest()
    child = family.space.validate({**parent, "stacks/3/operator": "l-dct"})
    weights = {name: torch.rand_like(each) for name, each in family.build(parent, seed=1).state_dict().items()}
    found = family.inherit(weights, parent, child, generator=torch.Generator().manual_seed(0))
    assert family.overlap(child, parent) == 0.75
    same = {name for name in found if name in weights and torch.equal(found[name], weights[name])}
    family.build(child).load_state_dict(found)
    expected = ("encoder.embeddings.", "pooler.", "classifier.", *(f"encoder.layers.{i}." for i in range(3)))
    assert {name for name in found if name.startswith((*expected, "encoder.projections."))} == same
    own = family.inherit(weights, parent, parent)
    assert all(torch.equal(own[name], weights[name]) for name in own)
    with pytest.raises(UserError, match="the state_dict of the parent's network"):
        family.inherit({}, parent, child)


def test_a_search_on_phrases(tmp_path):
    task = open_task("phrases", limit=40)
    settings = Settings(models=4, **SMALL)
    outcome = search(task, settings, seed=1, store=JournalStore(tmp_path))
    assert (outcome.told, outcome.failed, outcome.status) == (4, 0, "finished")
    family = family_for(task, settings)
    for trial, result in recorded_trials(tmp_path):
        assert result is not None and result.metrics["valid_accuracy"] > 0
        assert result.costs["params"] == family.exact_costs(trial.architecture)["params"]


def test_a_trial_with_a_near_neighbour_says_whose_weights_it_takes():
    task = open_task("phrases", limit=60)
    settings = Settings(**SMALL, threshold=0.0)
    search_ = strategy(family_for(task, settings), settings, seed=0)
    inherited = 0
    for _ in range(8):
        (trial,) = search_.ask()
        if trial.parent is not None:
            assert trial.info["weights"] == f"key {trial.parent}"
            assert Architecture.from_json(trial.info["parent_architecture"])
            inherited += 1
        value = len(trial.architecture) + trial.id / 100
        search_.tell(trial.id, Result(metrics={"valid_accuracy": value}, weights=f"key {trial.id}"))
    assert inherited > 0


def test_other_tasks_are_refused():
    with pytest.raises(UserError, match="a text task whose padding is token 0"):
        family_for(open_task("digits", limit=20), Settings())


RUN = {"hidden": [8, 16], "sizes": [8, 12], "counts": [1, 2], "library": 12, "initial": 2, "models": 4, "epochs": 1}


class _Unbothered:
    def step(self, total, **figures):
        pass

    def should_stop(self):
        return False


def test_a_run_trains_within_the_budget_delivers_the_best_and_is_verified(tmp_path):
    options = {"task_options": {"limit": 60}, "settings": RUN, "quiet": True}
    outcome = api.search("phrases", method="flexibert", budget="params<=0.5x", out=tmp_path / "run", **options)
    assert outcome.status == "finished"
    events = Run.open(tmp_path / "run").history()
    accuracies = [event["valid_accuracy"] for event in events]
    assert len(accuracies) == 4 and accuracies == sorted(accuracies)
    result = outcome.result
    (network,) = result["outcomes"]
    assert network["costs"]["params"] <= 0.5 * result["reference"]["params"]
    assert network["metrics"]["valid_accuracy"] == pytest.approx(accuracies[-1], abs=1e-9)
    assert "archsmith" not in (outcome.folder / "model.py").read_text().split("import torch")[1].split("class")[0]
    report = api.verify(tmp_path / "run")
    assert report.ok, [row for row in report.rows if row.status != "ok"]
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_killed_run_goes_on_without_training_anything_again():
    task = open_task("phrases", limit=60)
    settings = Settings(**{**RUN, "threshold": 0.0})
    family = family_for(task, settings)

    def fresh():
        return Searcher(family=family, task=task, settings=settings, seed=3)

    whole, half = fresh(), fresh()
    while not whole.done:
        whole.advance(_Unbothered())
    for _ in range(2):
        half.advance(_Unbothered())
    tensors, state = half.state()
    resumed = fresh()
    resumed.load({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(state)))
    evaluations = []
    evaluate = resumed.evaluator.evaluate
    resumed.evaluator.evaluate = lambda trial, **more: (evaluations.append(trial.id), evaluate(trial, **more))[1]
    while not resumed.done:
        resumed.advance(_Unbothered())
    assert evaluations == [3, 4]

    def seen(searcher):
        return [(trial.architecture, trial.parent, result.metrics) for trial, result in searcher.trained]

    assert seen(resumed) == seen(whole)
    ends = [searcher.deliver().network.state_dict() for searcher in (resumed, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_what_breaks_the_budget_is_not_in_the_library():
    space = FlexiBertFamily(image=(6,), num_classes=2, vocabulary=9).settings.level(1)
    pool = embedded_library(space, 10, fits=lambda each: len(space.layers(each)) == 2)
    assert {len(space.layers(each)) for each in pool.architectures} == {2}
    with pytest.raises(UserError, match="one that two keep at least"):
        embedded_library(space, 3, fits=lambda each: False)


def test_the_next_level_lies_between_the_best_and_their_neighbours():
    space = FlexiBertFamily(image=(6,), num_classes=2, vocabulary=9).settings
    first, second = space.level(1), space.level(2)
    pool = embedded_library(first, 40)
    best = pool.architectures[:2]
    refined = refined_library(first, pool, best, second, 30, neighbours=2)
    assert [second.layers(each) for each in refined.architectures[:2]] == [first.layers(each) for each in best]
    mixed = [layers for each in refined.architectures if (layers := second.layers(each))[0] != layers[1]]
    assert mixed, "single layers are free where stacks were not"
    near = {layers[0].operator for each in pool.architectures if (layers := first.layers(each))}
    alone = refined_library(first, pool, best, second, 30, neighbours=0)
    ends = {first.layers(each)[0].operator for each in best}
    assert {second.layers(each)[0].operator for each in alone.architectures} <= ends < near


class _DctCounts:
    """The share of layers that are cosine transforms of the larger width."""

    def evaluate(self, trial, *, weights=None):
        a = trial.architecture
        stacks = [name.removesuffix("/operator") for name in a if name.endswith("/operator")]
        good = [a[f"{at}/operator"] == "l-dct" and a[f"{at}/hidden"] == 16 for at in stacks]
        return Result(metrics={"valid_accuracy": sum(good) / len(good)})


@pytest.mark.slow
def test_levels_refine_and_the_best_of_all_is_kept(tmp_path):
    task = open_task("phrases", limit=40)
    settings = Settings(models=12, **{**SMALL, "library": 40})
    one = search(task, settings, evaluator=_DctCounts(), levels=(1,))
    two = search(task, settings, evaluator=_DctCounts(), levels=(1, 2), folder=tmp_path)
    assert two.best[1].metrics["valid_accuracy"] >= one.best[1].metrics["valid_accuracy"]
    means = [
        np.mean([result.metrics["valid_accuracy"] for _, result in recorded_trials(tmp_path / f"level-{level}")])
        for level in (1, 2)
    ]
    assert means[1] > means[0], "what lies between the best is better than what is drawn"
    again = search(task, settings, evaluator=_DctCounts(), levels=(1, 2), folder=tmp_path)
    assert again.best[1].metrics == two.best[1].metrics
    with pytest.raises(UserError, match="ascending levels"):
        search(task, settings, evaluator=_DctCounts(), levels=(2, 1))
    with pytest.raises(UserError, match="folder=FOLDER"):
        search(task, settings, evaluator=_DctCounts(), levels=(1, 2), store=JournalStore(tmp_path / "x"))


def test_a_limit_on_latency_is_refused(tmp_path):
    options = {"task_options": {"limit": 60}, "settings": RUN, "quiet": True}
    with pytest.raises(UserError, match="limits on macs, params, memory"):
        api.search("phrases", method="flexibert", budget="latency<=0.9x", out=tmp_path / "run", **options)

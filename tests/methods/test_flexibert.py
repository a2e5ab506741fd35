import numpy as np
import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.evaluate.trained import GrowingFamily
from archsmith.families.flexibert import FlexiBertFamily, open_family
from archsmith.methods import load_method
from archsmith.methods.flexibert import SYSTEM, Settings, embedded_library, family_for, search, strategy
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

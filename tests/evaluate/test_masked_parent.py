"""Untrained scores of masked parents: the published case, and what must not change them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from node_samples import CASES, blobs, chain, closed_form, small_cnn
from torch.nn.functional import cross_entropy

from archsmith.atoms.chains import chain_groups
from archsmith.core.errors import UserError
from archsmith.evaluate.masked_parent import MaskedEvaluator, scoring_batch
from archsmith.families.subnetworks import SubnetworkFamily
from archsmith.run.study import run_study
from archsmith.space import Objective, Trial
from archsmith.space.node_subsets import NodeSubsetSpace
from archsmith.strategies import RandomSearch, RegularizedEvolution
from archsmith.tasks.base import Batch


def small(seed: int = 0, **options: int) -> MaskedEvaluator:
    parent = chain(192, 40, 30, 3, seed=seed)
    family = SubnetworkFamily(parent, chain_groups(parent), sparsity=0.7, image=(3, 8, 8), num_classes=3)
    return MaskedEvaluator(family, scoring_batch(blobs(), 100, seed=1), **options)


def test_the_closed_form_case() -> None:
    case = CASES["closed_form_search"]
    parent, batch = closed_form()
    losses = []
    for masks in case["input"]["masks"]:
        family = SubnetworkFamily(parent, chain_groups(parent), sparsity=0.0, image=(6, 1, 1), num_classes=3)
        by_layer = {name: np.array(mask, dtype=bool) for name, mask in zip("13", masks, strict=True)}
        family.space = NodeSubsetSpace({"1": 8, "3": 8}, {name: int(mask.sum()) for name, mask in by_layer.items()})
        point = family.space.of_masks(by_layer)
        losses.append(MaskedEvaluator(family, batch, lanes=3).evaluate_many([point])[0].metrics["loss"])
    assert losses == pytest.approx(case["expected"]["losses"], abs=case["tolerance"])
    assert int(np.argmin(losses)) == case["expected"]["best_index"]


def test_a_score_is_that_of_the_cut_network() -> None:
    parent = small_cnn()
    family = SubnetworkFamily(parent, chain_groups(parent), sparsity=0.5, image=(3, 8, 8), num_classes=3)
    batch = scoring_batch(blobs(), 50, seed=0)
    evaluator = MaskedEvaluator(family, batch, chunk=17)
    parent.train()
    for seed in range(5):
        point = family.space.sample(np.random.default_rng(seed))
        result = evaluator.evaluate(Trial(id=seed, architecture=point))
        with torch.no_grad():
            logits = family.build(point).eval()(batch.inputs)
        assert result.metrics["loss"] == pytest.approx(float(cross_entropy(logits, batch.targets)), abs=1e-6)
        assert result.metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == batch.targets).float().mean()))
    assert all(module.training for module in parent.modules())
    assert all(parameter.grad is None for parameter in parent.parameters())


def test_company_order_and_workers_change_no_bit() -> None:
    evaluator = small()
    space = evaluator.family.space
    points = [space.sample(np.random.default_rng(seed)) for seed in range(13)]
    together = [result.metrics for result in evaluator.evaluate_many(points)]
    backwards = [result.metrics for result in evaluator.evaluate_many(points[::-1])][::-1]
    alone = [
        evaluator.evaluate(Trial(id=1, architecture=point, seed=seed)).metrics for seed, point in enumerate(points)
    ]
    assert together == backwards == alone
    trials = [Trial(id=i, architecture=points[i % 13]) for i in range(65)]
    with ThreadPoolExecutor(4) as executor:
        assert [result.metrics for result in executor.map(evaluator.evaluate, trials)] == alone * 5
    objective = (Objective("loss", "minimize"),)
    serial = run_study(RandomSearch(space, objectives=objective, seed=3), evaluator, budget=20)
    with ThreadPoolExecutor(3) as executor:
        parallel = run_study(
            RandomSearch(space, objectives=objective, seed=3), evaluator, budget=20, executor=executor, workers=3
        )
    assert serial.best is not None and parallel.best is not None
    assert serial.best[0] == parallel.best[0]
    assert serial.best[1].metrics == parallel.best[1].metrics


def test_scoring_touches_no_random_stream() -> None:
    evaluator = small()
    before = torch.get_rng_state()
    evaluator.evaluate(Trial(id=1, architecture=evaluator.family.space.sample(np.random.default_rng(0))))
    assert torch.equal(before, torch.get_rng_state())


def test_any_strategy_searches_and_evolution_finds_lower_losses_than_luck() -> None:
    gains = []
    for seed in range(3):
        evaluator = small(seed, lanes=2)
        objective = (Objective("loss", "minimize"),)
        found = {}
        for kind, options in ((RandomSearch, {}), (RegularizedEvolution, {"population": 10, "tournament": 5})):
            strategy = kind(evaluator.family.space, objectives=objective, seed=seed, **options)
            losses = []
            for _ in range(100):
                (trial,) = strategy.ask()
                strategy.tell(trial.id, result := evaluator.evaluate(trial))
                losses.append(result.metrics["loss"])
            found[kind] = min(losses)
        gains.append(found[RandomSearch] - found[RegularizedEvolution])
    assert min(gains) > 0


def test_scoring_examples_are_fixed_and_of_the_training_part() -> None:
    task = blobs()
    first, again, other = (scoring_batch(task, 30, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, other.inputs)
    training = torch.cat([batch.inputs for batch in task.batches("train", batch_size=120)])
    assert all(bool((training == image).flatten(1).all(1).any()) for image in first.inputs)
    with pytest.raises(UserError, match="batch_size"):
        scoring_batch(task, 121, seed=0)


def test_bad_input_is_refused() -> None:
    evaluator = small()
    point = evaluator.family.space.sample(np.random.default_rng(0))
    with pytest.raises(UserError, match="an untrained score has no fidelity"):
        evaluator.evaluate(Trial(id=1, architecture=point, fidelity=1.0))
    with pytest.raises(UserError, match="architecture"):
        evaluator.evaluate_many([{"1": (0,), "3": (0,)}])
    with pytest.raises(UserError, match="at least one candidate"):
        MaskedEvaluator(evaluator.family, evaluator.batch, lanes=0)
    with pytest.raises(UserError, match="at least one example"):
        MaskedEvaluator(evaluator.family, Batch(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)))

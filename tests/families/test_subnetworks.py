"""Sub-networks of a parent: sizes, kept weights, fresh ones, and the scores that see them as any other network."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from node_samples import CASES, blobs, chain, small_cnn
from torch import nn

from archsmith.atoms.chains import chain_groups
from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.evaluate.trained import TrainedEvaluator
from archsmith.evaluate.zero_cost import SCORES, Batch, ZeroCostEvaluator
from archsmith.families.subnetworks import SubnetworkFamily
from archsmith.space import Trial


def family_of(parent: nn.Sequential, sparsity: float, **changes: object) -> SubnetworkFamily:
    options = {"image": (3, 8, 8), "num_classes": 3, **changes}
    return SubnetworkFamily(parent, chain_groups(parent), sparsity=sparsity, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mlp_784_512_512_10_s90", "mlp_192_256_256_10_s50", "mlp_784_1000_s99"])
def test_sizes_and_costs(name: str) -> None:
    case = CASES[name]
    widths, expected = case["input"]["widths"], case["expected"]
    parent = chain(*widths)
    family = family_of(parent, 1 - case["input"]["node_keep_fraction"][0], image=(widths[0], 1, 1), num_classes=10)
    network = family.build(family.space.sample(np.random.default_rng(0)))
    example = torch.zeros(1, widths[0])
    for part, module in (("dense", parent), ("sparse", network)):
        costs = count(module, example)
        assert (costs.params, costs.macs) == (expected[f"params_{part}"], expected[f"macs_{part}"])
    assert [n.out_features for n in network if isinstance(n, nn.Linear)][:-1] == expected["kept_nodes"]
    assert family.space.log10_size == pytest.approx(expected["log10_configurations"], abs=case["tolerance"])


def test_the_parents_weights_stay_where_they_were() -> None:
    parent = chain(192, 10, 8, 3)
    family = family_of(parent, 0.5)
    point = family.space.sample(np.random.default_rng(0))
    network, masks = family.build(point), family.masks(point)
    assert torch.equal(network[3].weight, parent[3].weight[masks["3"]][:, masks["1"]])
    assert torch.equal(network[5].bias, parent[5].bias)
    assert parent[1].weight.shape == (10, 192)


def test_nothing_removed_is_the_parent() -> None:
    parent = small_cnn()
    family = family_of(parent, 0.0)
    assert family.space.size == 1
    network = family.build(family.space.sample(np.random.default_rng(0)))
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in parent.state_dict().items())


def test_every_layer_keeps_a_node_at_the_highest_sparsity() -> None:
    for over in ("layer", "network"):
        family = family_of(small_cnn(), 0.999, over=over)
        point = family.space.sample(np.random.default_rng(0))
        assert [len(point[name]) for name in family.space.nodes] == [1, 1, 1]
        assert family.build(point)(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


def test_one_share_for_the_whole_network() -> None:
    family = family_of(small_cnn(), 0.5, over="network")
    sizes = {tuple(map(len, family.space.sample(np.random.default_rng(i)).values())) for i in range(30)}
    assert {sum(each) for each in sizes} == {12}
    assert len(sizes) > 5


def test_fresh_weights_have_the_shape_and_nothing_else() -> None:
    family = family_of(chain(192, 10, 3), 0.5)
    point = family.space.sample(np.random.default_rng(0))
    cut, fresh, again, other = (family.build(point), *(family.fresh(point, seed=seed) for seed in (1, 1, 2)))
    for a, b, c, d in zip(*(each.parameters() for each in (cut, fresh, again, other)), strict=True):
        assert a.shape == b.shape
        assert torch.equal(b, c)
        assert not torch.equal(b, d) and not torch.equal(a, b)


def test_minimum_and_frozen_groups_are_kept() -> None:
    parent = small_cnn()
    first, second, third = chain_groups(parent)
    groups = [dataclasses.replace(first, frozen="by hand"), dataclasses.replace(second, minimum=4), third]
    family = SubnetworkFamily(parent, groups, sparsity=0.9, image=(3, 8, 8), num_classes=3)
    assert family.space.kept == {"2.0": 4, "4": 1}
    with pytest.raises(UserError, match="no divisor, no balance"):
        SubnetworkFamily(parent, [dataclasses.replace(first, divisor=4)], sparsity=0.5, image=(3, 8, 8), num_classes=3)
    with pytest.raises(UserError, match="at least one that is not frozen"):
        SubnetworkFamily(parent, groups[:1], sparsity=0.5, image=(3, 8, 8), num_classes=3)


def test_zero_cost_scores_and_training_take_it_as_a_family() -> None:
    family, task = family_of(small_cnn(), 0.5), blobs()
    trial = Trial(id=1, architecture=family.space.sample(np.random.default_rng(0)), seed=5)
    batch = next(task.batches("train", batch_size=16))
    scored = ZeroCostEvaluator(family, Batch(batch.inputs, batch.targets), scores=["naswot", "synflow", "params"])
    result = scored.evaluate(trial)
    assert result.status == "ok" and result.metrics["naswot"] == SCORES["naswot"].function(
        family.build(trial.architecture), Batch(batch.inputs, batch.targets), torch.Generator()
    )
    trained = TrainedEvaluator(family, task, epochs=2, batch_size=20, costs=("params",))
    result = trained.evaluate(trial)
    assert result.reason is None, result.reason
    assert result.costs["params"] == scored.evaluate(trial).costs["params"]

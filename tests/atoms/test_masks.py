"""Masks: a masked network computes what activations times a mask compute, and what the cut network computes."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from node_samples import CASES, chain, closed_form, small_cnn
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy

from archsmith.atoms.chains import chain_groups
from archsmith.atoms.masks import UnitMasks
from archsmith.atoms.units import Place, UnitGroup
from archsmith.core.errors import UserError
from archsmith.families.subnetworks import SubnetworkFamily


def literal(network: nn.Sequential, inputs: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Multiply the activation behind every hidden layer by its mask: the definition."""
    x = inputs
    hidden = ""
    for name, module in network.named_children():
        x = module(x)
        if isinstance(module, nn.Linear):
            hidden = name
        elif hidden in masks:
            x = x * masks[hidden]
    return x


def test_the_masked_parent_is_the_definition() -> None:
    network, batch = closed_form()
    masked = UnitMasks(network, chain_groups(network))
    for masks in CASES["closed_form_search"]["input"]["masks"]:
        by_layer = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in zip("13", masks, strict=True)}
        difference = masked(batch.inputs, by_layer) - literal(network, batch.inputs, by_layer)
        assert float(difference.detach().abs().max()) < 1e-12


def subnetwork(network: nn.Sequential, sparsity: float, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    family = SubnetworkFamily(network, chain_groups(network), sparsity=sparsity, image=(3, 8, 8), num_classes=3)
    point = family.space.sample(np.random.default_rng(seed))
    return family.build(point), family.masks(point)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [lambda seed: chain(192, 32, 24, 3, seed=seed), small_cnn])
def test_masked_and_cut_agree_in_outputs_and_gradients(make, training: bool) -> None:  # type: ignore[no-untyped-def]
    for seed in range(5):
        parent = make(seed)
        cut, masks = subnetwork(parent, 0.6, seed)
        parent.train(training), cut.train(training)
        inputs, targets = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        cross_entropy(masked_output := UnitMasks(parent, chain_groups(parent))(inputs, masks), targets).backward()
        cross_entropy(cut_output := cut(inputs), targets).backward()
        assert float((masked_output - cut_output).detach().abs().max()) < 1e-6
        for (name, whole), part in zip(parent.named_parameters(), cut.parameters(), strict=True):
            assert whole.grad is not None and part.grad is not None
            kept = whole.grad
            for group in chain_groups(parent):
                for place in group.places:
                    if place.tensor == name:
                        rows = torch.from_numpy(place.index)[masks[group.name]].flatten()
                        kept = kept.index_select(place.axes[0], rows)
            assert torch.allclose(kept, part.grad, rtol=1e-4, atol=1e-6)
            assert whole.grad.count_nonzero() <= kept.numel()


def test_twenty_steps_of_training_agree() -> None:
    parent = chain(192, 32, 24, 3)
    cut, masks = subnetwork(parent, 0.8, 0)
    masked = UnitMasks(parent, chain_groups(parent))
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9) for network in (parent, cut)]
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(50, 3, 8, 8, generator=generator), torch.arange(50) % 3
        losses = []
        for forward, optimizer in zip((lambda x: masked(x, masks), cut), optimizers, strict=True):
            optimizer.zero_grad()
            loss = cross_entropy(forward(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_many_masks_at_once_are_each_of_them() -> None:
    network = small_cnn().eval()
    masked = UnitMasks(network, chain_groups(network))
    inputs = torch.randn(4, 3, 8, 8)
    masks = {name: torch.rand(5, n) < 0.5 for name, n in (("0.0", 8), ("2.0", 6), ("4", 10))}
    before = copy.deepcopy(network.state_dict())
    together = vmap(lambda each: masked(inputs, each))(masks)
    for lane in range(5):
        alone = masked(inputs, {name: mask[lane] for name, mask in masks.items()})
        assert torch.allclose(together[lane], alone, atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_units_may_own_elements_of_two_axes_together() -> None:
    layer = nn.Linear(2, 3)
    group = UnitGroup("pairs", 3, (Place("weight", (0, 1), np.arange(6).reshape(3, 2)),))
    mask = torch.tensor([1, 0, 1])
    found = UnitMasks(layer, [group]).tensors({"pairs": mask})["weight"]
    assert torch.equal(found, layer.weight * mask[:, None])
    turned = UnitGroup("pairs", 2, (Place("weight", (1, 0), np.arange(6).reshape(2, 3)),))
    found = UnitMasks(layer, [turned]).tensors({"pairs": torch.tensor([0, 1])})["weight"]
    assert torch.equal(found, layer.weight * torch.tensor([0, 1]))


def test_groups_that_a_mask_cannot_express_are_refused() -> None:
    network = chain(6, 5, 3)
    (group,) = chain_groups(network)
    with pytest.raises(UserError, match="removal changes layer_norm"):
        UnitMasks(network, [dataclasses.replace(group, changes=("layer_norm n",))])
    with pytest.raises(UserError, match="names of the model's parameters"):
        UnitMasks(network, [UnitGroup("x", 5, (Place("7.weight", (0,), np.arange(5)[:, None]),))])
    with pytest.raises(UserError, match="rows for 6 units"):
        UnitMasks(network, [dataclasses.replace(group, size=6)])

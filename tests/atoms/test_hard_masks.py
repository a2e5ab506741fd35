"""Masks that hold under any optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from archsmith.atoms.hard_masks import HardMasks
from archsmith.atoms.weight_masks import Kernels, Unstructured
from archsmith.core.errors import UserError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removed_weights_stay_zero(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    optimizer = OPTIMIZERS[name](conv.parameters())
    mask = Kernels(50).choose(conv.weight.detach().square())
    hard = HardMasks({"conv": conv.weight}, {"conv": mask})

    def step() -> None:
        optimizer.zero_grad()
        conv(torch.randn(2, 4, 5, 5)).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()  # momentum is there before the masks
    assert hard.violations() == {"conv": int((~mask).sum())}
    for _ in range(3):
        hard.apply_(optimizer)
        assert not hard.violations() and hard.nonzeros() == {"conv": int(mask.sum())}
        for value in optimizer.state[conv.weight].values():
            if value.shape == mask.shape:
                assert (value[~mask] == 0).all()
        step()
    assert hard.violations()  # gradients alone would not hold them
    hard.apply_()
    assert not hard.violations()


def test_nan_is_removed_too() -> None:
    weight = nn.Parameter(torch.full((2, 2), float("nan")))
    HardMasks({"w": weight}, {"w": torch.tensor([[True, False], [False, False]])}).apply_()
    assert weight.detach().isnan().tolist() == [[True, False], [False, False]]


def test_masks_must_fit() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(UserError, match=r"masks: got a mask of shape \(3,\) for w; allowed: shape \(2, 2\)"):
        HardMasks({"w": weight}, {"w": torch.ones(3)})
    with pytest.raises(UserError, match=r"masks: got .* for v; allowed: one of w"):
        HardMasks({"w": weight}, {"v": Unstructured(0).choose(torch.ones(2, 2))})

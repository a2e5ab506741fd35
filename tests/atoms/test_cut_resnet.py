"""ResNet-50 at uniform widths: parameter counts that another tool published."""

import numpy as np
import pytest
import torch
from atoms_nets import ResNet

from archsmith.atoms.finding import find
from archsmith.atoms.plan import plan_cut
from archsmith.atoms.transaction import apply_


@pytest.mark.parametrize(("ratio", "millions"), [(0.75, 14.39), (0.5, 6.41)])
def test_uniform_widths_give_the_published_counts(ratio, millions):
    """Widths of 0.75 and 0.5, the classifier's outputs cut too (a sum over them leaves them free)."""
    model, x = ResNet((3, 4, 6, 3), 64, 1000).eval(), torch.randn(1, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    atoms = find(model, x, forward=lambda network, images: network(images).sum(-1))
    removed = {g.name: np.arange(round(g.size * ratio), g.size) for g in atoms.groups}
    outcome = apply_(model, plan_cut(atoms.groups, removed, model))
    assert round(outcome.params[1] / 1e6, 2) == millions
    assert model(x).shape == (1, 1000 * ratio)

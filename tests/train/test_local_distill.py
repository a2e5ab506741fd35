"""Losses of local and global distillation: published values, identities, masks."""

import json
import math
from pathlib import Path

import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.train.local_distill import cosine_distance, gkd_loss, lm_loss, normalised_mse, pooled, token_kl

CASES = json.loads((Path(__file__).parents[1] / "golden" / "puzzle.json").read_text())["cases"]


def filled(k, scale, *shape):
    """The golden file's F(k, s)."""
    values = [scale * math.sin(0.7 * i + 0.013 * i * i + k) for i in range(math.prod(shape))]
    return torch.tensor(values, dtype=torch.float64).view(*shape)


def logits():
    return filled(1, 2, 2, 3, 5), filled(1.4, 2, 2, 3, 5)


def test_the_normalised_mse_has_its_published_value_and_is_about_1_for_a_child_that_gives_zeros():
    child, parent = filled(1, 1, 2, 3, 4), filled(2, 1, 2, 3, 4)
    assert float(normalised_mse(child, parent)) == pytest.approx(CASES["normalised_mse"]["expected"], abs=1e-9)
    assert float(normalised_mse(torch.zeros_like(parent), parent)) == pytest.approx(1, abs=1e-5)
    assert float(normalised_mse(parent, parent)) == 0


def test_divergence_and_language_model_loss_have_their_published_values():
    parent, child = logits()
    wanted = CASES["kl_and_lm"]["expected"]
    assert float(token_kl(parent, child)) == pytest.approx(wanted["kl_parent_child"], abs=1e-9)
    assert float(token_kl(child, parent)) == pytest.approx(wanted["kl_child_parent_for_contrast"], abs=1e-9)
    targets = torch.tensor(CASES["kl_and_lm"]["input"]["targets"])
    assert float(lm_loss(child, targets)) == pytest.approx(wanted["child_lm_loss"], abs=1e-9)
    assert float(token_kl(parent, parent)) == 0


def test_the_global_loss_is_cosines_over_layers_plus_the_divergence():
    own, wanted = list(filled(1, 1, 2, 2, 3, 4)), list(filled(1.3, 1, 2, 2, 3, 4))
    parent, child = logits()
    published = CASES["gkd_loss"]["expected"]
    assert float(gkd_loss(own, wanted)) == pytest.approx(published["cosine"], abs=1e-9)
    assert float(gkd_loss(own, wanted, child, parent)) == pytest.approx(published["total"], abs=1e-9)


def test_tokens_outside_of_the_mask_change_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(2, 5, 6, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    spoilt = torch.where(mask.bool().unsqueeze(-1), a, noise)
    for distance in (normalised_mse, token_kl, cosine_distance):
        assert torch.equal(distance(a, b, mask=mask), distance(spoilt, b, mask=mask))
        assert not torch.equal(distance(a, b), distance(spoilt, b))
    assert torch.equal(pooled(a, mask), pooled(spoilt, mask))
    short = pooled(a, mask)[0]
    assert torch.allclose(short, a[0, :3].mean(0))
    full = torch.ones(2, 5)
    assert torch.allclose(token_kl(a, b, mask=full), token_kl(a, b))


def test_shapes_that_differ_are_refused():
    with pytest.raises(UserError, match="the parent's shape"):
        normalised_mse(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="as many layers as the parent, 1"):
        gkd_loss([], [torch.zeros(1, 2, 3)])
    with pytest.raises(UserError, match="one number for each token"):
        token_kl(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), mask=torch.ones(2))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hand_units import along, attention, awaken, batch, branches

from archsmith.atoms.unit_scores import (
    TaylorScores,
    normalised,
    random_scores,
    scale_scores,
    weight_scores,
)
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import UserError


def test_scales_are_read_unit_by_unit():
    atoms = branches()
    model = awaken(atoms.model)
    scores = scale_scores(model, atoms.groups)
    both = torch.stack([model.n1.weight, model.n2.weight]).detach().double()
    np.testing.assert_allclose(scores["c1"], both.mean(0))
    np.testing.assert_allclose(scores["c2"], model.n3.weight.detach().double())
    np.testing.assert_allclose(scale_scores(model, atoms.groups, reduction="max")["c1"], both.max(0).values)


def test_groups_without_a_scale_are_refused():
    atoms = attention()
    with pytest.raises(UserError, match=r"heads has none: use 'l2' or 'taylor'"):
        scale_scores(atoms.model, atoms.groups)


@pytest.mark.parametrize("p", [1, 2])
def test_weight_norms_equal_those_of_the_slices(p):
    atoms = branches()
    model = atoms.model
    scores = weight_scores(model, atoms.groups, p=p)
    unit = 3
    parts = [model.c1.weight[unit], model.dw.weight[unit], model.c2.weight[:, unit], model.c3.weight[:, unit]]
    joined = torch.cat([part.detach().double().flatten() for part in parts])
    assert scores["c1"][unit] == pytest.approx(float(joined.norm(p)))
    columns = torch.cat([model.c3.weight[2].flatten(), model.head.weight[:, 48 + 8 : 48 + 12].flatten()])
    assert scores["c3"][2] == pytest.approx(float(columns.detach().double().norm(p)))


def test_jointly_owned_weights_are_summed_over_their_positions():
    from archsmith.atoms.units import Place

    convolution = torch.nn.Conv2d(8, 6, 3, groups=2)
    index = np.array([[(3 * (i // 4) + o) * 4 + i % 4 for o in range(3)] for i in range(8)])
    scores = weight_scores(convolution, [UnitGroup("in", 8, (Place("weight", (0, 1), index),))], p=1)
    assert scores["in"][5] == pytest.approx(float(convolution.weight[3:, 1].detach().double().abs().sum()))


def test_taylor_is_the_product_with_the_gradient_and_averages_steps():
    atoms = branches()
    model, taylor = atoms.model, TaylorScores()
    sums = np.zeros(12)
    for seed in (0, 1):
        model.zero_grad()
        x, y = batch(seed)
        F.cross_entropy(model(x), y).backward()
        taylor.observe(model, atoms.groups)
        for name in ("c2.weight", "c2.bias", "n3.weight", "n3.bias"):
            p = model.get_parameter(name)
            sums += (p * p.grad).detach().double().reshape(12, -1).sum(1).abs().numpy()
        head = (model.head.weight * model.head.weight.grad).detach().double()[:, :48]
        sums += head.reshape(10, 12, 4).sum((0, 2)).abs().numpy()
    np.testing.assert_allclose(taylor.scores(atoms.groups)["c2"], sums / 2, rtol=1e-5)


def test_taylor_of_an_accumulated_gradient_is_that_of_the_whole_batch():
    atoms = branches()
    model = atoms.model.eval()  # the same statistics in both parts
    x, y = batch(0)
    whole, parts = TaylorScores(), TaylorScores()
    F.cross_entropy(model(x), y).backward()
    whole.observe(model, atoms.groups)
    model.zero_grad()
    for half in (slice(0, 8), slice(8, 16)):
        (0.5 * F.cross_entropy(model(x[half]), y[half])).backward()
    parts.observe(model, atoms.groups)
    for group in atoms.groups:
        a, b = whole.scores(atoms.groups)[group.name], parts.scores(atoms.groups)[group.name]
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


def test_taylor_without_gradients_says_so():
    with pytest.raises(UserError, match="after at least one optimiser step with gradients"):
        TaylorScores().scores(branches().groups)


def test_random_scores_come_from_their_own_generator():
    groups = branches().groups
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = random_scores(groups, np.random.default_rng(5))
    again = random_scores(groups, np.random.default_rng(5))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


def test_normalisations():
    scores = {"a": np.array([1.0, 3.0]), "b": np.array([10.0, 20.0, 60.0]), "zero": np.zeros(2)}
    assert normalised(scores, "mean")["b"].tolist() == pytest.approx([1 / 3, 2 / 3, 2])
    assert normalised(scores, "max")["a"].tolist() == pytest.approx([1 / 3, 1])
    assert normalised(scores, "rank")["b"].tolist() == [0, 0.5, 1]
    assert normalised(scores, "none")["a"].tolist() == [1, 3]
    assert normalised(scores, "mean")["zero"].tolist() == [0, 0]
    with pytest.raises(UserError, match="none, mean, max, rank"):
        normalised(scores, "sum")


def test_groups_of_vectors_only_are_scored_by_them():
    layer = torch.nn.LayerNorm(4)
    group = UnitGroup("w", 4, (along("weight", 0, 4),))
    assert weight_scores(layer, [group])["w"].tolist() == [1, 1, 1, 1]

import pytest
import torch
from darts_runs import copied, small_family, small_task, stop_after, to_the_end
from torch import nn

from archsmith.core.errors import UserError
from archsmith.methods.darts import Searcher, Settings
from archsmith.run.relaxed_search import RelaxedSearcher
from archsmith.supernet.mixed import MixedOp
from archsmith.supernet.relaxed import RelaxedSupernet
from archsmith.train.bilevel import Bilevel
from archsmith.train.smoothed import Ball, Smoothed, onto_simplex

SMALL = {"search_epochs": 2, "search_batch_size": 8, "search_channels": 4, "search_cells": 3, "epochs": 1}
REST = {"order": "first", "batch_size": 16, "auxiliary_weight": 0.0, "drop_path": 0.0, "logit_lr": 0.1}


def searcher(**changes):
    settings = Settings(**{**SMALL, **REST, **changes})
    return Searcher(family=small_family(), task=small_task(), seed=1, settings=settings)


class Scales(nn.Module):
    """Two edges that multiply their input by constants, the second by two of three."""

    def __init__(self):
        super().__init__()
        self.edges = nn.ModuleList(
            MixedOp({str(k): nn.Linear(1, 1, bias=False) for k in range(count)}) for count in (3, 2)
        )

    def forward(self, x, mixing):
        return sum(edge(x, weights) for edge, weights in zip(self.edges, mixing["cell"], strict=True))


def small_supernet():
    torch.manual_seed(0)
    return RelaxedSupernet(Scales(), {"cell": [("0", "1", "2"), ("0", "1")]})


def ball(epsilon, supernet=None, seed=0):
    supernet = supernet or small_supernet()
    return Ball(supernet, supernet.mixing(), epsilon, torch.Generator().manual_seed(seed))


def test_rows_are_cut_and_divided_by_their_sums():
    moved = torch.tensor([[0.6, -0.1, 0.2], [-0.2, -0.1, -0.3], [1.2, 0.3, 0.5]])
    around = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [1.0, 0.0, 0.0]])
    found = onto_simplex(moved, around)
    expected = torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0], [1 / 1.8, 0.3 / 1.8, 0.5 / 1.8]])
    assert torch.allclose(found, expected)


def test_random_points_are_weights_near_the_centre_without_padding():
    supernet = small_supernet()
    centre = supernet.mixing()["cell"].detach()
    for epsilon in (0.03, 0.3):
        points = torch.stack([ball(epsilon, supernet, seed).random()["cell"] for seed in range(20)])
        assert torch.allclose(points.sum(2), torch.ones(20, 2)) and bool((points >= 0).all())
        assert not points[:, 1, 2].any()
        # Cut weights are at most epsilon away; their sum then moves them by a factor within [1 - 3 eps, 1 + 3 eps].
        assert float((points - centre).abs().max()) <= epsilon + 3 * epsilon
        assert float((points - centre).abs().max()) > epsilon / 2
    assert torch.equal(ball(0.3, supernet, 5).random()["cell"], ball(0.3, supernet, 5).random()["cell"])
    assert torch.allclose(ball(0.0, supernet).random()["cell"], centre)


def test_decided_edges_stay_decided():
    supernet = small_supernet()
    supernet.fix_("cell", 0, "1")
    point = ball(0.3, supernet).random()["cell"]
    assert point[0].tolist() == [0.0, 1.0, 0.0] and point[1].tolist() != supernet.mixing()["cell"][1].tolist()


def test_the_adversary_finds_a_larger_loss_or_stays():
    supernet = small_supernet()
    centre = supernet.mixing()["cell"].detach()

    def rising(mixing):
        return (mixing["cell"] * torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])).sum()

    worst = ball(0.2, supernet).worst(rising)["cell"]
    assert float(rising({"cell": worst})) > float(rising({"cell": centre})) + 0.1
    assert float(worst[0, 1]) == float(worst[0].max()) and float(worst[1, 0]) == float(worst[1].max())
    calls = []

    def at_its_top(mixing):
        calls.append(mixing)
        return -(mixing["cell"] - centre).square().sum()

    stays = ball(0.2, supernet).worst(at_its_top)["cell"]
    assert torch.equal(stays, centre) and len(calls) == 7 + 2


def test_epsilon_rises_over_the_search_and_ends_with_it():
    smoothed = Smoothed(epochs=50)
    assert smoothed.epsilon(0) == 0.03 and smoothed.epsilon(25) == pytest.approx(0.165)
    assert smoothed.epsilon(49) == pytest.approx(0.2946) and smoothed.epsilon(50) == 0.0
    with pytest.raises(UserError, match="kind: got 'worst'"):
        Smoothed(kind="worst", epochs=1)
    with pytest.raises(UserError, match="epsilon"):
        Smoothed(epochs=1, start=-0.1)


@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_weights_learn_under_perturbed_mixing_weights_and_logits_do_not(kind):
    plain, smooth = searcher(), searcher(smoothing=kind)
    seen = []
    functional = smooth.supernet.functional

    def spied(x, weights, logits=None, *, mixing=None, generator=None):
        seen.append(None if mixing is None else mixing["normal"].detach().clone())
        return functional(x, weights, logits, mixing=mixing, generator=generator)

    smooth.supernet.functional = spied
    for search in (plain, smooth):
        stop_after(search, 1)
    assert seen[0] is None and len(seen) == (2 if kind == "random" else 1 + 7 + 2 + 1)
    after = smooth.supernet.mixing()["normal"].detach()
    assert 0 < float((seen[-1] - after).abs().max()) <= 0.03 * 1.2
    for name, logits in smooth.supernet.logits.items():
        assert torch.equal(logits, plain.supernet.logits[name])
    weights = plain.supernet.weights()
    assert any(not torch.equal(weight, weights[name]) for name, weight in smooth.supernet.weights().items())


def test_radius_zero_is_darts():
    smooth, plain = searcher(smoothing="random", smoothing_start=0.0, smoothing_end=0.0), searcher()
    for search in (plain, smooth):
        stop_after(search, 2)
    weights = plain.supernet.weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in smooth.supernet.weights().items())


@pytest.mark.slow
def test_a_stopped_search_goes_on_bit_for_bit_and_fine_tuning_is_not_perturbed():
    settings = {"smoothing": "random", "search_epochs": 1, "selection": "perturbation", "selection_interval": 1}
    whole, halted, again = (searcher(**settings) for _ in range(3))
    stop_after(halted, 1)
    again.load(*copied(halted.state()))
    assert isinstance(again.updater, Smoothed) and again.updater.epsilon(1) == 0.0
    assert to_the_end(whole) == to_the_end(again) and whole.chosen == again.chosen


def test_methods_with_a_step_of_their_own_refuse_it():
    class Own(RelaxedSearcher):
        def make_updater(self):
            return Bilevel()

    plan = searcher(smoothing="random").plan
    with pytest.raises(UserError, match="smoothing: got 'random'; allowed: 'none'"):
        Own(family=small_family(), task=small_task(), seed=0, plan=plan)

"""Architecture steps of ProxylessNAS; facts from ``tests/golden/proxylessnas.json``."""

import json
import math
from pathlib import Path

import pytest
import torch
from darts_runs import small_task

from archsmith.core.errors import UserError
from archsmith.families.mobile_chain import chain_family
from archsmith.supernet import StraightThrough
from archsmith.supernet.gates import BinaryGates, involved
from archsmith.supernet.relaxed import batch_statistics
from archsmith.train.bilevel import BilevelStep, bilevel_epoch, halves, random_batch
from archsmith.train.gated import CostTerm, GatedAlternation, Reinforced, reward, surprise
from archsmith.train.loop import Position
from archsmith.train.optim import RowAdam
from archsmith.train.sampled import named_stream, sampled_loss

CASES = json.loads((Path(__file__).parent.parent / "golden" / "proxylessnas.json").read_text())["cases"]


def cases(prefix):
    return [case for case in CASES if case["name"].startswith(prefix)]


def family():
    small = {"widths": (8, 12), "cells": (2, 2), "strides": (1, 2), "last_channels": 24}
    return chain_family("tiny", image=(3, 8, 8), num_classes=3, kernels=(3, 5), **small)


def epoch(updater, mode="full_v2", *, logits=None, steps=None, relaxation=None, seed=1):
    """Run an epoch of 4 steps with the logits learning; return the supernet."""
    first, second = halves(small_task(), 3)
    supernet = family().supernet(seed=0, relaxation=relaxation or BinaryGates(mode))
    if logits is not None:
        with torch.no_grad():
            supernet.logits["blocks"].copy_(logits)
    step = BilevelStep(weight_task=first, logit_task=second, batch_size=4, seed=seed, clip_norm=0.0)
    weights = torch.optim.SGD(supernet.weights().values(), 0.05, 0.9, nesterov=True)
    moving = RowAdam(supernet.logits.parameters(), 0.05, betas=(0.0, 0.999))
    left = [steps or 4]

    def stop():
        left[0] -= 1
        return left[0] == 0

    bilevel_epoch(supernet, weights, moving, step, Position(), rate=0.05, updater=updater, should_stop=stop)
    return supernet


@pytest.mark.parametrize("case", cases("latency_loss/"), ids=lambda case: case["name"])
def test_cost_terms_are_the_published_ones(case):
    given, expected = case["input"], case["expected"]
    for form, name in (("multiplicative", "mul_log"), ("additive", "add_linear")):
        term = CostTerm(reference=given["ref"], form=form)
        value = term(torch.tensor(given["ce"]), torch.tensor(given["expected"]))
        assert float(value) == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("case", cases("reward/"), ids=lambda case: case["name"])
def test_rewards_are_the_published_ones(case):
    given = case["input"]
    value = reward(given["acc_percent"] / 100, given["latency_ms"], given["ref"], given["exponent"])
    assert value == pytest.approx(case["expected"], abs=1e-9)
    assert reward(0.7, None, 80, 0.1) == 0.7


def test_the_multiplicative_form_needs_a_logarithm():
    with pytest.raises(UserError, match=r"reference: got 0.5; allowed: a cost above 1 in the multiplicative form"):
        CostTerm(reference=0.5)
    with pytest.raises(UserError, match=r"cost: got 0.75; allowed: above 1"):
        CostTerm(reference=80.0)(torch.tensor(1.0), torch.tensor(0.75))
    with pytest.raises(UserError, match=r"reference: got -1.0; allowed: a cost above 0"):
        CostTerm(reference=-1.0, form="additive")
    assert CostTerm(reference=0.5, form="additive")(torch.tensor(1.0), torch.tensor(0.5)) == 1.0


class Watched(GatedAlternation):
    """Keeps what every step on the logits was made of."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = []

    def logit_gradients(self, context, gradients, mixing):
        result = super().logit_gradients(context, gradients, mixing)
        self.steps.append(
            {"raw": gradients["blocks"], "gradient": result["blocks"], "gates": mixing["blocks"].detach()}
        )
        return result

    def moved_(self, context, before, mixing):
        super().moved_(context, before, mixing)
        self.steps[-1].update(before=before["blocks"], after=context.supernet.logits["blocks"].detach().clone())


@pytest.mark.parametrize("mode", ["full", "full_v2", "two"])
def test_a_place_that_sampled_no_block_rests(mode):
    logits = torch.zeros(4, 5)
    logits[1, 4] = 4.0  # "zero", which this place has
    updater = Watched(logits_every=1)
    epoch(updater, mode, logits=logits)
    rested = 0
    for step in updater.steps:
        idle = step["gates"][:, 4] == 1
        rested += int(idle.sum())
        assert torch.equal(step["after"][idle], step["before"][idle])
        assert bool((step["gradient"][~idle] != 0).any(dim=-1).all())
        assert torch.equal(step["gradient"][~idle], step["raw"][~idle])
    assert rested > 0


def test_pairs_keep_their_mass_and_all_others_their_logits():
    updater = Watched(logits_every=1, cost=family().expected_macs(), term=CostTerm(reference=1e5))
    epoch(updater, "two")
    for step in updater.steps:
        inside = involved(step["gates"])
        assert torch.equal(step["after"][~inside], step["before"][~inside])
        mass = [(step[name].double().exp() * inside).sum(-1) for name in ("before", "after")]
        torch.testing.assert_close(*mass, rtol=1e-6, atol=0)
        moved = step["after"] != step["before"]
        assert bool((moved.sum(-1) <= 2).all()) and bool(moved.any())


def test_the_expected_cost_of_a_pair_is_that_of_the_pair():
    """Without any loss on images the gradient is that of the cost, by the probabilities of the two alone."""
    cost = family().expected_macs()

    class CostAlone(Watched):
        def logit_loss(self, context, loss, logits, mixing):
            return super().logit_loss(context, loss * 0.0, logits, mixing)

    for mode in ("two", "full_v2"):
        updater = CostAlone(logits_every=1, cost=cost, term=CostTerm(reference=1e5, form="additive", weight=1.0))
        epoch(updater, mode)
        for step in updater.steps:
            leaf = step["before"].clone().double().requires_grad_()
            inside = involved(step["gates"]) & (cost.of_candidates["blocks"] + 1 > 0)
            absent = torch.zeros_like(inside)
            absent[2, 4] = True  # the place that changes the shape has no "zero"
            p = leaf.masked_fill(~inside | absent, -torch.inf).softmax(-1)
            (expected,) = torch.autograd.grad(cost({"blocks": p}) / 1e5, [leaf])
            torch.testing.assert_close(step["raw"].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_cost_alone_leads_to_the_cheapest_network():
    chain = family()

    class CostAlone(GatedAlternation):
        def logit_loss(self, context, loss, logits, mixing):
            return super().logit_loss(context, loss * 0.0, logits, mixing)

    updater = CostAlone(logits_every=1, cost=chain.expected_macs(), term=CostTerm(reference=1e4, form="additive"))
    start = torch.zeros(4, 5)
    expected = []
    for _ in range(3):
        supernet = epoch(updater, logits=start)
        start = supernet.logits["blocks"].detach()
        expected.append(float(chain.expected_macs()(supernet.probabilities()).detach()))
    assert expected == sorted(expected, reverse=True)


def test_reinforce_follows_its_rule():
    """The gradient is the mean of ``(reward - baseline) * grad(-log p)``, the baseline already moved."""
    seen = {"costs": [], "gradients": []}

    def cost_of(supernet, mixing):
        seen["costs"].append(mixing["blocks"].argmax(-1))
        return float(1 + mixing["blocks"].argmax(-1)[0])

    updater = Reinforced(cost_of=cost_of, reference=2.0, samples=3, logits_every=1)
    start = torch.linspace(-0.5, 0.5, 20).reshape(4, 5)

    def keep(context, gradients, old=None):
        seen["gradients"].append(gradients["blocks"])

    supernet = family().supernet(seed=0, relaxation=StraightThrough())
    first, second = halves(small_task(), 3)
    step = BilevelStep(weight_task=first, logit_task=second, batch_size=4, seed=1)

    class Context:
        where = (0, 0)
        move_logits = staticmethod(lambda gradients: keep(None, gradients))
        fixed_logits = staticmethod(lambda: {"blocks": start})

    with torch.no_grad():
        supernet.logits["blocks"].copy_(start)
    context = Context()
    context.supernet, context.step = supernet, step
    updater.move_logits(context)
    (gradient,), leaf = seen["gradients"], start.clone().requires_grad_()
    accuracies = list(_accuracies(updater, context))
    rewards = [reward(a, float(1 + c[0]), 2.0, 0.1) for a, c in zip(accuracies, seen["costs"][:3], strict=True)]
    baseline = sum(rewards) / 3
    masked = leaf.masked_fill(supernet.absent_blocks, -torch.inf)
    logs = [masked.log_softmax(-1)[range(4), chosen].sum() for chosen in seen["costs"][:3]]
    loss = sum(-(own - baseline) * log for own, log in zip(rewards, logs, strict=True)) / 3
    (expected,) = torch.autograd.grad(loss, [leaf])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert updater.baseline == pytest.approx(baseline)


def _accuracies(updater, context):
    """Return the accuracies of the sampled networks, read again."""
    batch = random_batch(context.step, *context.where)
    for number in range(updater.samples):
        mixing = context.supernet.mixing(context.fixed_logits(), named_stream(context, "network", number))
        with torch.no_grad(), batch_statistics(context.supernet):
            _, metrics = sampled_loss(context, context.step.logit_task, batch, mixing, "logits", constant=True)
        yield float(metrics["accuracy"])


@pytest.mark.parametrize(("kind", "expected"), [("published", 0.99), ("average", 0.01)])
def test_the_baseline_moves_as_published_or_as_an_average(kind, expected):
    updater = Reinforced(baseline=kind)
    assert updater.share == pytest.approx(expected)
    updater.load({}, {"baseline": 0.25})
    assert updater.state() == ({}, {"baseline": 0.25})


def test_reinforce_leads_to_what_is_rewarded():
    """Costs far above the reference but for one candidate of the first place: its probability rises."""

    def cost_of(supernet, mixing):
        return 1.0 if int(mixing["blocks"][0].argmax()) == 2 else 100.0

    logits = torch.zeros(4, 5)
    for _ in range(4):
        updater = Reinforced(cost_of=cost_of, reference=1.0, exponent=1.0, logits_every=1)
        logits = epoch(updater, logits=logits, relaxation=StraightThrough()).logits["blocks"].detach()
    assert int(logits[0].argmax()) == 2


def test_the_surprise_of_a_sample_is_its_negative_log_probability():
    p = {"a": torch.tensor([[0.25, 0.75], [0.5, 0.5]]), "b": torch.tensor([[1.0, 0.0]])}
    mixing = {"a": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([[1.0, 0.0]])}
    assert float(surprise(p, mixing, p)) == pytest.approx(-math.log(0.125))
    with pytest.raises(UserError, match="samples: got 0"):
        Reinforced(samples=0)

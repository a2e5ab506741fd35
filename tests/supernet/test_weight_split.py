import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archsmith.core.errors import UserError
from archsmith.supernet.split import Moves, Relaxed, relaxed_step
from archsmith.supernet.updaters import InnerStep, first_order, unrolled

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "rarts.json").read_text())["cases"]
}


def scalar(value):
    return torch.tensor(float(value), dtype=torch.float64)


def toy_train(weights, logits):
    return (weights["w"] - logits["a"]) ** 2


def toy_valid(weights, logits):
    return logits["a"] * weights["w"] - 2 * logits["a"] + 1


def descents(w, y, logits, rates):
    """Return moves of plain gradient descent in place, one rate for each block."""

    def move(tensors, rate):
        def moved(gradient, pull=None):
            for name, tensor in tensors.items():
                tensor -= rate * (gradient[name] + (0 if pull is None else pull[name]))

        return moved

    return Moves(w=move(w, rates[0]), y=move(y, rates[1]), logits=move(logits, rates[2]))


class Toy:
    """The solvable model, walked by plain descent."""

    def __init__(self, relaxed, rates, start=(-2.0, -2.0, 2.0), passes="gauss-seidel"):
        self.relaxed, self.passes = relaxed, passes
        self.w, self.y, self.logits = ({name: scalar(value)} for name, value in zip("wwa", start, strict=True))
        self.moves = descents(self.w, self.y, self.logits, rates)

    def walk(self, steps):
        for _ in range(steps):
            relaxed_step(
                self.relaxed, toy_train, toy_valid, self.w, self.y, self.logits, self.moves, passes=self.passes
            )
        return self

    @property
    def at(self):
        return [self.w["w"].item(), self.y["w"].item(), self.logits["a"].item()]

    @property
    def value(self):
        return self.relaxed.value(toy_train, toy_valid, self.w, self.y, self.logits).item()


def critical_point(lam, beta):
    alpha = 4 * beta * lam / (4 * beta * lam - 2 * lam - beta)
    return [alpha * (1 - 1 / (2 * lam)), 2 - alpha, alpha]


def gradient_at(relaxed, point):
    w, y, a = (scalar(value).requires_grad_() for value in point)
    value = relaxed.value(toy_train, toy_valid, {"w": w}, {"w": y}, {"a": a})
    return value, [w, y, a]


@pytest.mark.parametrize("name", [name for name in CASES if "critical_point" in name])
def test_critical_points_of_the_solvable_model(name):
    inputs, expected = CASES[name]["input"], CASES[name]["expected"]
    lam, beta = inputs["lambda"], inputs["beta"]
    relaxed = Relaxed(train_weight=lam, coupling=beta)
    point = [expected["w"], expected["y"], expected["alpha"]]
    assert critical_point(lam, beta) == pytest.approx(point, rel=0, abs=1e-9)
    value, leaves = gradient_at(relaxed, critical_point(lam, beta))
    assert [g.item() for g in torch.autograd.grad(value, leaves)] == pytest.approx([0, 0, 0], abs=1e-12)
    hessian = torch.autograd.functional.hessian(
        lambda w, y, a: relaxed.value(toy_train, toy_valid, {"w": w}, {"w": y}, {"a": a}),
        tuple(scalar(value) for value in point),
    )
    matrix = np.array([[entry.item() for entry in row] for row in hessian])
    assert np.linalg.det(matrix) == pytest.approx(expected["det"], rel=1e-9)
    assert np.linalg.eigvalsh(matrix).tolist() == pytest.approx(expected["hessian_eigs"], rel=0, abs=1e-8)
    toy = Toy(relaxed, [1 / (2 * lam + beta), 1 / beta, 1 / (2 * lam)]).walk(4000 if lam > 50 else 1500)
    assert toy.at == pytest.approx(point, rel=0, abs=1e-8)


@pytest.mark.parametrize("name", [name for name in CASES if "iterates" in name])
def test_iterates_of_the_solvable_model(name):
    inputs, expected = CASES[name]["input"], CASES[name]["expected"]
    relaxed = Relaxed(train_weight=inputs["lambda"], coupling=inputs["beta"])
    close = {"rel": 0, "abs": 1e-9}
    toy = Toy(relaxed, [inputs["eta_all"]] * 3)
    values = [toy.value]
    for after in range(1, 11):
        toy.walk(1)
        values.append(toy.value)
        if f"after{after}" in expected:
            assert toy.at == pytest.approx(expected[f"after{after}"], **close)
    assert values[:4] == pytest.approx(expected["L_first4"], rel=0, abs=1e-8)
    assert toy.walk(1500 if inputs["beta"] > 5 else 500).at == pytest.approx(expected["limit"], rel=0, abs=1e-8)
    value, leaves = gradient_at(relaxed, (-2.0, -2.0, 2.0))  # all blocks at once, for contrast
    at_once = [
        leaf.item() - inputs["eta_all"] * gradient.item()
        for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True)
    ]
    assert at_once == pytest.approx(expected["jacobi_after1"], **close)


def test_fused_passes_take_the_logits_gradient_before_the_weights_move():
    toy = Toy(Relaxed(train_weight=10.0, coupling=10.0), [0.02] * 3, passes="fused").walk(1)
    # w, y as in turn; the logits by -2 lambda (w - a) + y - 2 at (w, y, a) = (-2, -2, 2)
    assert toy.at == pytest.approx([-0.4, -1.72, 2 - 0.02 * (10 * 8 - 4)], rel=0, abs=1e-12)
    assert toy.walk(2000).at == pytest.approx(critical_point(10, 10), abs=1e-8)


def test_descent_bounds():
    expected = CASES["solvable_model:descent_bounds"]["expected"]
    assert expected["block_lipschitz"] == {"w": "2*lambda+beta", "y": "beta", "alpha": "2*lambda"}
    example = expected["example"]
    toy = Toy(
        Relaxed(train_weight=example["lam"], coupling=example["beta"]),
        [example["eta_w"], example["eta_y"], example["eta_alpha"]],
    )
    values = [toy.value, *(toy.walk(1).value for _ in range(60))]
    assert all(after <= before + 1e-12 for before, after in pairwise(values))


weights_of = st.floats(0.5, 50)
starts = st.floats(-3, 3)
shares = st.floats(0.01, 0.999)


@settings(max_examples=40, deadline=None)
@given(weights_of, weights_of, st.tuples(starts, starts, starts), st.tuples(shares, shares, shares))
def test_within_the_bounds_it_never_rises(lam, beta, start, share):
    bounds = (2 / (2 * lam + beta), 2 / beta, 1 / lam)
    rates = [part * bound for part, bound in zip(share, bounds, strict=True)]
    toy = Toy(Relaxed(train_weight=lam, coupling=beta), rates, start=start)
    before = toy.value
    for _ in range(8):
        after = toy.walk(1).value
        assert after <= before + 1e-12 * max(1.0, abs(before))
        if abs(after) > 1e6:  # no minimum exists for small weights
            return
        before = after


@pytest.mark.parametrize("block", [0, 1, 2])
def test_above_a_bound_it_rises(block):
    lam, beta = 10.0, 10.0
    rates = [1e-9] * 3
    rates[block] = 1.05 * (2 / (2 * lam + beta), 2 / beta, 1 / lam)[block]
    toy = Toy(Relaxed(train_weight=lam, coupling=beta), rates)
    assert toy.value < toy.walk(1).value


def test_better_than_first_order_exactly_where_stated():
    assert CASES["solvable_model:better_than_first_order"]["expected"]["condition"].startswith("|alpha-1|<1 iff")
    for lam in (0.6, 1.0, 2.0, 10.0):
        for beta in (1.5, 2.0, 3.0, 10.0):
            if 4 * beta * lam - 2 * lam - beta <= 0:
                continue
            alpha = critical_point(lam, beta)[2]
            if 4 * beta * lam == 4 * lam + 2 * beta:
                assert alpha == pytest.approx(2.0, abs=1e-12)
            else:
                assert (abs(alpha - 1) < 1) == (4 * beta * lam > 4 * lam + 2 * beta)
    assert critical_point(1, 1)[2] == 4.0 and critical_point(1, 2)[2] == 2.0


def test_stiff_weights_approach_the_optimum_as_the_law_says():
    for k in (2, 3, 4):
        lam = beta = 10.0**k
        law = 1 / (2 * beta) + 1 / (4 * lam)
        assert critical_point(lam, beta)[2] - 1 == pytest.approx(law, rel=2 * 10.0**-k)


def test_without_spring_and_training_loss_it_is_darts():
    """beta = 0, lambda = 0 in the logits' step and y := w give the first order; its fixed point is (2, 2)."""
    w, logits = {"w": scalar(-2.0)}, {"a": scalar(2.0)}
    plain_w, plain_a = {"w": scalar(-2.0)}, {"a": scalar(2.0)}
    for _ in range(5):
        w["w"] -= 0.05 * 2 * (w["w"] - logits["a"])  # w learns from the training loss alone
        y = {"w": w["w"].clone()}
        frozen = Moves(w=lambda *given: None, y=lambda *given: None, logits=descents(w, y, logits, (0, 0, 0.05)).logits)
        relaxed = Relaxed(train_weight=0.0, coupling=0.0)
        relaxed_step(relaxed, toy_train, toy_valid, w, y, logits, frozen, "gauss-seidel")
        plain_w["w"] = plain_w["w"] - 0.05 * 2 * (plain_w["w"] - plain_a["a"])
        plain_a["a"] = plain_a["a"] - 0.05 * first_order(toy_valid, plain_w, plain_a)["a"]
        assert torch.equal(w["w"], plain_w["w"]) and torch.equal(logits["a"], plain_a["a"])


class Counted:
    """A loss that counts its forward passes; each is followed by one backward pass."""

    def __init__(self, loss):
        self.loss, self.passes = loss, 0

    def __call__(self, weights, logits):
        self.passes += 1
        return self.loss(weights, logits)


def test_passes_of_a_step():
    expected = CASES["pass_count_per_iteration"]["expected"]
    for passes, name in (("gauss-seidel", "rarts_gauss_seidel"), ("fused", "rarts_fused")):
        toy, losses = Toy(Relaxed(), [0.01] * 3), [Counted(toy_train), Counted(toy_valid)]
        relaxed_step(toy.relaxed, *losses, toy.w, toy.y, toy.logits, toy.moves, passes=passes)
        assert sum(loss.passes for loss in losses) == expected[name]
    weights, logits = {"w": scalar(1.0)}, {"a": scalar(3.0)}
    train, valid = Counted(toy_train), Counted(toy_valid)
    first_order(valid, weights, logits)
    assert train.passes + valid.passes + 1 == expected["darts_first_order"]  # and the step on the weights
    train, valid = Counted(toy_train), Counted(toy_valid)
    unrolled(train, valid, weights, logits, InnerStep(rate=0.1))
    assert train.passes + valid.passes + 1 == expected["darts_second_order"]


def test_the_equilibrium_of_a_ridge_regression():
    """Features scaled by the shared logits; both halves ridged, so that the problem is coercive."""
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(40, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    truth = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)

    def loss(data):
        def of(weights, logits):
            residual = data @ (weights["w"] * logits["a"]) - data @ truth
            return residual.square().mean() + 0.1 * weights["w"].square().sum() + 0.1 * logits["a"].square().sum()

        return of

    train, valid, relaxed = loss(x), loss(z), Relaxed(train_weight=2.0, coupling=0.5)
    w, y = ({"w": torch.ones(4, dtype=torch.float64)} for _ in range(2))
    logits = {"a": torch.ones(4, dtype=torch.float64)}
    values = [relaxed.value(train, valid, w, y, logits).item()]
    for _ in range(1200):
        relaxed_step(relaxed, train, valid, w, y, logits, descents(w, y, logits, [0.05] * 3), "gauss-seidel")
        values.append(relaxed.value(train, valid, w, y, logits).item())
    assert all(after <= before + 1e-12 for before, after in pairwise(values))
    leaves = [{name: t.clone().requires_grad_() for name, t in group.items()} for group in (w, y, logits)]
    of_w, on_train = torch.autograd.grad(train(leaves[0], leaves[2]), [leaves[0]["w"], leaves[2]["a"]])
    of_y, on_valid = torch.autograd.grad(valid(leaves[1], leaves[2]), [leaves[1]["w"], leaves[2]["a"]])
    spring = 0.5 * (w["w"] - y["w"])
    for residual in (2 * of_w + spring, of_y - spring, 2 * on_train + on_valid, 2 * of_w + of_y):
        assert residual.abs().max() < 1e-6


def test_what_makes_no_sense_is_refused():
    toy = Toy(Relaxed(), [0.01] * 3)
    with pytest.raises(UserError, match="passes: got 'jacobi'; allowed: 'gauss-seidel' or 'fused'"):
        relaxed_step(toy.relaxed, toy_train, toy_valid, toy.w, toy.y, toy.logits, toy.moves, passes="jacobi")
    with pytest.raises(UserError, match="coupling: got -1; allowed: a number from 0"):
        Relaxed(coupling=-1)
    with pytest.raises(UserError, match="train_weight: got nan"):
        Relaxed(train_weight=float("nan"))

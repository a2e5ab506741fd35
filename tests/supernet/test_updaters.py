import pytest
import torch
from darts_recipe import alpha, cases, image, weighted_
from torch import nn
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.families.darts import DartsFamily
from archsmith.supernet.updaters import InnerStep, first_order, unrolled

CLOSE = {"rel": 0, "abs": 1e-9}


def bilinear_train(weights, logits):
    w, a = weights["w"], logits["a"]
    return (w * w - 2 * a * w + a * a).sum()


def bilinear_valid(weights, logits):
    w, a = weights["w"], logits["a"]
    return (a * w - 2 * a + 1).sum()


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("case", cases("unrolled_grad:bilinear"), ids=lambda case: case["name"])
@pytest.mark.parametrize("how", ["difference", "exact"])
def test_bilinear(case, how):
    given, expected = case["input"], case["expected"]
    weights, logits = {"w": scalar(given["w"])}, {"a": scalar(given["alpha"])}
    before = weights["w"].clone()
    step = InnerStep(rate=given["xi"])
    found = unrolled(bilinear_train, bilinear_valid, weights, logits, step, how=how)
    assert found["a"].item() == pytest.approx(expected["second_order"], **CLOSE)
    assert first_order(bilinear_valid, weights, logits)["a"].item() == pytest.approx(expected["first_order"], **CLOSE)
    assert torch.equal(weights["w"], before)
    gradient = {"w": 2 * weights["w"] - 2 * logits["a"]}
    assert step.taken(weights, gradient)["w"].item() == pytest.approx(expected["w_prime"], **CLOSE)


@pytest.mark.parametrize("case", cases("unrolled_grad:cubic"), ids=lambda case: case["name"])
def test_the_difference_is_off_by_exactly_what_its_step_says(case):
    given, expected = case["input"], case["expected"]

    def train(weights, logits):
        w = weights["w"]
        return (logits["a"] * w**3 + w * w / 2).sum()

    def valid(weights, logits):
        return ((weights["w"] - 1) ** 2 / 2).sum() + (logits["a"] ** 2).sum()

    weights, logits = {"w": torch.tensor(given["w"], dtype=torch.float64)}, {"a": scalar(given["alpha"])}
    for how, name in (("difference", "fd"), ("exact", "exact")):
        found = unrolled(train, valid, weights, logits, InnerStep(rate=given["xi"]), how=how, radius=given["r"])
        # the fd values are printed with ten digits, the formula gives all of them
        assert found["a"].item() == pytest.approx(expected[name], rel=0, abs=1e-10)
    gradient = 3 * given["alpha"] * weights["w"] ** 2 + weights["w"]
    moved = weights["w"] - given["xi"] * gradient
    v = moved - 1
    epsilon = given["r"] / v.norm()
    assert epsilon.item() == pytest.approx(expected["eps"], rel=1e-10)
    formula = 2 * given["alpha"] - given["xi"] * (3 * weights["w"] ** 2 * v + epsilon**2 * v**3).sum()
    found = unrolled(train, valid, weights, logits, InnerStep(rate=given["xi"]), radius=given["r"])
    assert found["a"].item() == pytest.approx(formula.item(), rel=0, abs=1e-12)


def test_the_toy_ends_where_its_inner_rate_says():
    (case,) = cases("toy_bilevel:fixed_points")
    for rate, expected in case["expected"].items():
        weights, logits = {"w": scalar(-2.0)}, {"a": scalar(2.0)}
        for _ in range(600):
            found = unrolled(bilinear_train, bilinear_valid, weights, logits, InnerStep(rate=float(rate)))
            logits["a"] = logits["a"] - 0.05 * found["a"]
            weights["w"] = weights["w"] - 0.05 * (2 * weights["w"] - 2 * logits["a"])
        assert logits["a"].item() == pytest.approx(expected["alpha"], abs=1e-4)
        assert weights["w"].item() == pytest.approx(expected["w"], abs=1e-4)
        there = {"w": scalar(2 / (1 + 2 * float(rate)))}
        assert there["w"].item() == pytest.approx(expected["w"], rel=0, abs=1e-8)
        still = unrolled(bilinear_train, bilinear_valid, there, {"a": there["w"]}, InnerStep(rate=float(rate)))
        assert still["a"].item() == pytest.approx(0, abs=1e-10)


def test_the_toy_walks_the_published_steps():
    (case,) = cases("toy_bilevel:first_10")
    weights, logits, after = {"w": scalar(-2.0)}, {"a": scalar(2.0)}, []
    for _ in range(10):
        logits["a"] = logits["a"] - 0.05 * first_order(bilinear_valid, weights, logits)["a"]
        weights["w"] = weights["w"] - 0.05 * (2 * weights["w"] - 2 * logits["a"])
        after.append([logits["a"].item(), weights["w"].item()])
    assert after[0] == pytest.approx(case["expected"]["after_1"], **CLOSE)
    assert after[9] == pytest.approx(case["expected"]["after_10"], **CLOSE)


def test_momentum_and_decay_move_the_weights_and_stay_out_of_the_difference():
    """On the bilinear toy the mixed derivative is -2 whatever the step; only w' depends on buffer and decay."""
    weights, logits = {"w": scalar(0.7)}, {"a": scalar(1.1)}
    step = InnerStep(rate=0.1, momentum=0.9, buffers={"w": scalar(0.3)}, weight_decay=0.2)
    moved = 0.7 - 0.1 * (0.9 * 0.3 + (2 * 0.7 - 2 * 1.1) + 0.2 * 0.7)
    found = unrolled(bilinear_train, bilinear_valid, weights, logits, step)["a"].item()
    assert found == pytest.approx((moved - 2) - 0.1 * (-2) * 1.1, **CLOSE)


def test_an_inner_rate_of_zero_is_first_order():
    weights, logits = {"w": scalar(0.7)}, {"a": scalar(1.1)}
    for how in ("difference", "exact"):
        found = unrolled(bilinear_train, bilinear_valid, weights, logits, InnerStep(rate=0.0), how=how)
        assert torch.equal(found["a"], first_order(bilinear_valid, weights, logits)["a"])


def test_an_unknown_way_is_refused():
    with pytest.raises(UserError, match="how: got 'fd'; allowed: 'difference' or 'exact'"):
        unrolled(bilinear_train, bilinear_valid, {}, {}, InnerStep(rate=0.1), how="fd")


def smooth_twin(network):
    """Replace every ReLU by the exact GELU and every maximum by an average, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, child.stride, 1, count_include_pad=False))
    return network


@pytest.mark.parametrize("case", cases("unrolled_grad:smooth_supernet"), ids=lambda case: case["name"])
def test_a_smooth_search_network(case):
    expected, given = case["expected"], case["input"]
    supernet = DartsFamily(image=(3, 16, 16), num_classes=10, channels=4, cells=4).supernet(seed=0)
    smooth_twin(weighted_(supernet.double()))
    logits = {"normal": alpha(scale=0.5), "reduce": alpha(scale=-0.7)}
    x = image(3, 3, 16, 16)
    batches = {"train": (x, given["train_t"]), "valid": (0.8 * x.flip(-1), given["val_t"])}

    def loss(name):
        inputs, targets = batches[name]
        return lambda weights, logits: functional.cross_entropy(
            supernet.functional(inputs, weights, logits), torch.tensor(targets)
        )

    weights = {name: weight.detach() for name, weight in supernet.weights().items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    decay = float(given["key"].split("wd")[1])
    rate = float(given["key"].removeprefix("xi").split(":")[0])
    step = InnerStep(rate=rate, weight_decay=decay)
    found = {
        "first_order": first_order(loss("valid"), weights, logits),
        "unrolled_fd": unrolled(loss("train"), loss("valid"), weights, logits, step),
        "exact": unrolled(loss("train"), loss("valid"), weights, logits, step, how="exact"),
    }
    for name, gradient in found.items():
        sums = [gradient[cell].abs().sum().item() for cell in ("normal", "reduce")]
        assert sums == pytest.approx(expected[f"{name}_sum_abs"], rel=0, abs=1e-3)
        assert gradient["normal"][0].tolist() == pytest.approx(expected[f"{name}_normal_row0"], rel=0, abs=1e-5)
    assert found["unrolled_fd"]["reduce"][13].tolist() == pytest.approx(expected["reduce_row13_fd"], rel=0, abs=1e-5)
    gaps = [(found["unrolled_fd"][cell] - found["exact"][cell]).abs().max().item() for cell in ("normal", "reduce")]
    assert gaps == pytest.approx(expected["max_abs_fd_minus_exact"], rel=0, abs=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    small = unrolled(loss("train"), loss("valid"), weights, logits, step, radius=0.001)
    for cell, gap in zip(("normal", "reduce"), gaps, strict=True):
        assert (small[cell] - found["exact"][cell]).abs().max().item() < gap / 50  # it falls as the square

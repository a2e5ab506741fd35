import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from mobile_samples import fact
from sharp_recipe import cases

from archsmith.core.errors import UserError
from archsmith.train.schedules import (
    annealed,
    cosine_power,
    cosine_power_at,
    dropped,
    penalty_ramp,
    staircase,
    staircase_to_floor,
)


@pytest.mark.parametrize("case", ["rho_schedule_A", "rho_schedule_epochwise"])
def test_the_published_penalty_ramps(case):
    given, expected = fact(case)
    config = given["cfg"]
    steps = range(16) if given["steps"] == "0..15" else given["steps"]
    rho = [
        penalty_ramp(
            step,
            strength=config["rho"],
            steps_per_epoch=given["steps_per_epoch"],
            free_epochs=config["epoch_free"],
            warmup_epochs=config["epoch_warmup"],
            stepwise=config["stepwise"],
        )
        for step in steps
    ]
    assert rho == pytest.approx(expected, abs=1e-15)


def test_the_published_learning_rates():
    given, expected = fact("lr_schedule_2048")
    rates = [
        staircase(
            step,
            base=given["base_lr"],
            batch_size=given["batch"],
            steps_per_epoch=given["steps_per_epoch"],
            warmup_epochs=given["warmup_epochs"],
            decay=given["decay"],
            every_epochs=given["every_epochs"],
        )
        for step in given["steps"]
    ]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_the_published_recipe_is_the_default():
    given, expected = fact("lr_schedule_2048")
    settings = {"base": 0.016, "batch_size": 2048, "steps_per_epoch": 626}
    assert [staircase(step, **settings) for step in given["steps"]] == pytest.approx(expected, abs=1e-12)


def test_a_staircase_without_warm_up_starts_at_the_peak():
    rates = [
        staircase(s, base=0.1, batch_size=512, steps_per_epoch=10, warmup_epochs=0, decay=0.5, every_epochs=1.0)
        for s in (0, 9, 10, 20)
    ]
    assert rates == pytest.approx([0.2, 0.2, 0.1, 0.05])


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_annealing_rises_and_falls(shape, middle):
    rates = [annealed(step, peak=2.0, total=24, warmup=4, shape=shape) for step in range(25)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[14] == pytest.approx(2.0 * middle)
    assert rates[24] == pytest.approx(0.0, abs=1e-15)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert annealed(99, peak=2.0, total=24, warmup=4, shape=shape) == pytest.approx(0.0, abs=1e-15)


def test_linear_and_cosine_differ():
    linear, cosine = (annealed(6, peak=1.0, total=24, shape=shape) for shape in ("linear", "cosine"))
    assert linear == pytest.approx(0.75)
    assert cosine == pytest.approx(0.5 * (1 + 0.5**0.5))
    with pytest.raises(ValueError, match="shape: got 'step'; allowed: 'linear', 'cosine'"):
        annealed(10, peak=1.0, total=24, shape="step")


def test_a_ramp_without_length_is_a_step():
    ramp = [penalty_ramp(s, strength=3.0, steps_per_epoch=2, free_epochs=1.0, warmup_epochs=1.0) for s in range(4)]
    assert ramp == [0.0, 0.0, 3.0, 3.0]


def test_the_rate_drops_with_the_first_step_of_an_epoch():
    rates = [dropped(step, base=0.1, drops=(2, 3), steps_per_epoch=2) for step in range(8)]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert dropped(9, base=1.0, drops=(), steps_per_epoch=2) == 1.0
    assert dropped(9, base=1.0, drops=(1,), steps_per_epoch=2, factor=0.5) == 0.5


@pytest.mark.parametrize("case", cases("cosine_power_annealing:"), ids=lambda case: case["name"])
def test_cosine_power_annealing_is_the_published_one(case):
    given, expected = case["input"], case["expected"]
    rates = cosine_power(
        given["epochs"],
        peak=given["max_lr"],
        floor=given["min_lr"],
        power=given["exponent_order"],
        warmup=given.get("warmup_epochs", 0),
        start=given.get("start_epoch", 1),
        restart=given.get("restart_lr", False),
    )
    if isinstance(expected, dict):
        assert {epoch: rates[int(epoch) - 1] for epoch in expected} == pytest.approx(expected, rel=1e-9)
    else:
        assert list(rates) == pytest.approx(expected, rel=1e-9)


def test_cosine_power_annealing_gives_the_rates_that_a_published_run_logged():
    rates = cosine_power(120, peak=0.025, floor=1e-4, power=2, warmup=5)
    logged = {47: 1.580315e-2, 116: 1.515235e-4, 117: 1.289815e-4, 119: 1.032201e-4}
    for epoch, rate in logged.items():
        assert float(f"{rates[epoch - 1]:.6e}") == rate
    assert rates[5] == 0.025 and rates[-1] == 1e-4  # the peak one epoch behind the warm-up


@pytest.mark.parametrize("warmup", [0, 4])
def test_power_one_is_a_cosine_and_larger_powers_lie_below(warmup):
    curves = [cosine_power(30, peak=1.0, floor=0.1, power=power, warmup=warmup) for power in (1, 1.0001, 2, 10, 1e6)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    for curve in curves:
        assert all(later < earlier for earlier, later in pairwise(curve[warmup:]))
    for smaller, larger in pairwise(curves):
        assert all(b < a for a, b in zip(smaller[warmup + 1 : -1], larger[warmup + 1 : -1], strict=True))
    turned = [0.5 * (1 + math.cos(math.pi * e / 30)) for e in range(1, 31)]
    if warmup == 0:
        assert curves[0] == pytest.approx([0.1 + 0.9 * c / turned[0] for c in turned])


def test_cosine_power_annealing_goes_on_or_starts_anew():
    whole = cosine_power(10, peak=0.1, floor=1e-4, power=10)
    assert cosine_power(10, peak=0.1, floor=1e-4, power=10, start=4) == whole[3:]
    anew = cosine_power(10, peak=0.1, floor=1e-4, power=10, start=4, restart=True)
    assert anew == cosine_power(7, peak=0.1, floor=1e-4, power=10)
    assert anew[0] == 0.1
    assert cosine_power(1, peak=0.1, power=2) == (0.1,)
    assert cosine_power(3, peak=0.1, power=1e300)[1:] == pytest.approx((0.0, 0.0))  # no overflow


def test_the_continuous_form():
    assert [cosine_power_at(done, power=7) for done in (0, 1)] == [1.0, 0.0]
    assert cosine_power_at(0.25, power=1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine_power_at(0.25, power=1 + 1e-9) == pytest.approx(cosine_power_at(0.25, power=1))
    # Fine sequences tend to it, whatever the power.
    rates = cosine_power(4000, peak=1.0, power=10)
    assert rates[1499] == pytest.approx(cosine_power_at(1500 / 4000, power=10), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": 0}, "cosine_power.epochs: got 0; allowed: an integer from 1"),
        ({"power": 0.5}, "cosine_power.power: got 0.5; allowed: a number from 1"),
        ({"power": math.nan}, "cosine_power.power: got nan"),
        ({"floor": 0.2}, "cosine_power.floor: got 0.2; allowed: a rate from 0 to the peak, 0.1"),
        ({"warmup": 5}, "cosine_power.warmup: got 5; allowed: fewer than the 5 epochs"),
        ({"start": 6}, "cosine_power.start: got 6; allowed: an epoch from 1 to 5"),
        ({"start": 2, "warmup": 1}, "cosine_power.warmup: got 1; allowed: 0 where a training goes on"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(changes, text):
    with pytest.raises(UserError) as error:
        cosine_power(**{"epochs": 5, "peak": 0.1, "floor": 0.0, **changes})
    assert text in str(error.value)
    with pytest.raises(UserError, match=r"cosine_power\.power"):
        cosine_power_at(0.5, power=0.9)


def test_the_rate_of_bignas_decays_to_a_constant():
    cases = json.loads((Path(__file__).parents[1] / "golden" / "bignas.json").read_text())["cases"]
    case = next(case for case in cases if case["name"].startswith("lr-staircase"))
    for step, rate in case["expected"].items():
        assert staircase_to_floor(int(step), peak=0.256, steps_per_epoch=10) == pytest.approx(rate, abs=1e-9)
    reached = next(case["expected"] for case in cases if case["name"] == "lr-floor-reached")
    rates = [staircase_to_floor(step, peak=1.0, steps_per_epoch=10, warmup_epochs=0) for step in range(3000)]
    assert rates.index(0.05) == round(10 * reached["epochs_after_warmup"]) == round(24 * reached["n"])
    assert set(rates[rates.index(0.05) :]) == {0.05}

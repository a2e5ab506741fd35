from itertools import pairwise

import pytest
from mobile_samples import fact

from archsmith.train.schedules import annealed, dropped, penalty_ramp, staircase


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

"""Learning rates and penalty strengths as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from archsmith.core.errors import UserError


def staircase(
    step: int,
    *,
    base: float,
    batch_size: int,
    steps_per_epoch: int,
    warmup_epochs: float = 5.0,
    decay: float = 0.97,
    every_epochs: float = 2.4,
) -> float:
    """Return the learning rate of the mobile networks: linear warm-up, then ``decay`` every ``every_epochs``.

    Args:
        step: Number of steps done.
        base: Rate at batch size 256 and the start of the warm-up; the peak is ``base * batch_size / 256``.
        batch_size: Images per step over all workers.
        steps_per_epoch: Steps of one epoch.
        warmup_epochs: Length of the linear rise from ``base`` to the peak.
        decay: Factor of each stair.
        every_epochs: Width of a stair; stairs are counted from step 0, also during the warm-up.

    Source: AtomNAS (arXiv 1912.09640): 0.016, 5 epochs, 0.97 every 2.4 epochs.
    """
    peak = base * batch_size / 256
    warmup = warmup_epochs * steps_per_epoch
    if step <= warmup and warmup > 0:
        return base + (peak - base) * step / warmup
    return float(peak * decay ** (step // (every_epochs * steps_per_epoch)))


def staircase_to_floor(
    step: int,
    *,
    peak: float,
    steps_per_epoch: int,
    warmup_epochs: float = 5.0,
    decay: float = 0.97,
    every_epochs: float = 2.4,
    floor: float = 0.05,
    start: float = 0.001,
) -> float:
    """Return a rate that rises linearly, decays stair by stair, and stays constant once it has come down to a floor.

    Args:
        step: Number of steps done.
        peak: Largest rate.
        steps_per_epoch: Steps of one epoch.
        warmup_epochs: Length of the linear rise, from ``start * peak`` at step 0.
        decay: Factor of each stair.
        every_epochs: Width of a stair; stairs are counted from the end of the rise.
        floor: Smallest rate as a part of the peak; training goes on at it.
        start: See ``warmup_epochs``.

    Source: BigNAS (arXiv 2003.11142): 0.256, 5 epochs, 0.97 every 2.4 epochs, 5 % (reached after 99 stairs).
    """
    warmup = warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (start + (1.0 - start) * step / warmup)
    stairs = int((step - warmup) / (every_epochs * steps_per_epoch) + 1e-9)
    return max(floor * peak, float(peak * decay**stairs))


def dropped(step: int, *, base: float, drops: Sequence[int], steps_per_epoch: int, factor: float = 0.1) -> float:
    """Return the learning rate ``base * factor ** n`` where ``n`` of the epochs in ``drops`` have begun.

    Args:
        step: Number of steps done.
        base: Rate at the beginning.
        drops: Epochs, counted from 0, with whose first step the rate falls.
        steps_per_epoch: Steps of one epoch.
        factor: Of each fall.
    """
    return float(base * factor ** sum(step >= epoch * steps_per_epoch for epoch in drops))


def annealed(step: int, *, peak: float, total: int, warmup: int = 0, shape: str = "linear") -> float:
    """Return a rate that rises linearly to ``peak`` and falls to zero at ``total`` steps.

    Args:
        step: Number of steps done.
        peak: Largest rate.
        total: Steps of the whole run; the rate there is 0.
        warmup: Steps of the rise (the rate at step 0 is then ``peak / warmup``).
        shape: "linear" or "cosine", the form of the fall.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if shape == "linear":
        return peak * (1.0 - done)
    if shape == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"shape: got {shape!r}; allowed: 'linear', 'cosine'.")


def penalty_ramp(
    step: int,
    *,
    strength: float,
    steps_per_epoch: int,
    free_epochs: float,
    warmup_epochs: float,
    stepwise: bool = True,
) -> float:
    """Return rho: zero for ``free_epochs``, then a linear rise until ``warmup_epochs``, then constant.

    Args:
        step: Number of steps done.
        strength: Final rho.
        steps_per_epoch: Steps of one epoch.
        free_epochs: Epochs without penalty.
        warmup_epochs: Epoch at which the final strength is reached, counted from the start of the run.
        stepwise: Rise at every step; else only at the beginning of an epoch.

    Source: AtomNAS (arXiv 1912.09640): free 0, warm-up 25 of 350 epochs.
    """
    epoch = step / steps_per_epoch if stepwise else step // steps_per_epoch
    if warmup_epochs <= free_epochs:
        return strength if epoch >= warmup_epochs else 0.0
    return strength * min(1.0, max(0.0, (epoch - free_epochs) / (warmup_epochs - free_epochs)))


def cosine_by_epoch(epoch: int, *, epochs: int, peak: float, floor: float = 0.0) -> float:
    """Return ``floor + (peak - floor) * (1 + cos(pi * epoch / epochs)) / 2``: one rate for each epoch, counted from 0.

    Args:
        epoch: Epochs done.
        epochs: Epochs of the whole; ``floor`` would be reached behind the last one.
        peak: Rate of the first epoch.
        floor: See above.

    Source: DARTS, arXiv 1806.09055 (0.025, to 0.001 in the search and to 0 afterwards).
    """
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


@dataclass(frozen=True)
class PolynomialDecay:
    """``start / (1 + step) ** power``, steps counted from 0: ``start`` itself at step 0.

    Attributes:
        start: Value at step 0.
        power: How fast it falls; 0 is constant.

    Example:
        >>> PolynomialDecay(1.0, 0.5)(3)
        0.5
    """

    start: float
    power: float

    def __call__(self, step: int) -> float:
        """Return the value after ``step`` steps."""
        return float(self.start / (1 + step) ** self.power)


def cosine_power(
    epochs: int,
    *,
    peak: float,
    floor: float = 0.0,
    power: float = 2.0,
    warmup: int = 0,
    start: int = 1,
    restart: bool = False,
) -> tuple[float, ...]:
    """Return the rates of cosine power annealing, one for each epoch: a cosine bent towards exponential decay.

    With t = e - ``warmup``, T = ``epochs`` - ``warmup`` and c(e) = (1 + cos(pi * t / T)) / 2, the shape of epoch e = 1,
    2, ... is c for power 1, else ``power ** (c + 1)``; shapes are stretched over all epochs to run from 0 to 1, and the
    rate is ``floor + (peak - floor) * shape``. So the last epoch has exactly ``floor``. Without a warm-up the first has
    exactly ``peak``; with one, the first ``warmup + 1`` epochs rise linearly and epoch ``warmup + 1`` has the peak.

    Args:
        epochs: Epochs of the whole.
        peak: Largest rate.
        floor: Smallest rate, of the last epoch (a single epoch has the peak).
        power: From 1, which is a cosine; the larger, the earlier the rate falls.
        warmup: Epochs of the rise.
        start: First epoch to return, counted from 1; later ones continue an earlier training.
        restart: From ``start`` on, anneal anew from the peak over the epochs that are left, instead of going on where
            the whole curve is.

    Returns:
        ``epochs - start + 1`` rates.

    Raises:
        UserError: A value that is not allowed, or a later start together with a warm-up.

    Source: sharpDARTS, arXiv 1903.09900 (search: 120 epochs, 0.025 to 1e-4, power 2, warm-up 5).
    """
    for name, value, fits, allowed in (
        ("epochs", epochs, epochs >= 1, "an integer from 1"),
        ("power", power, power >= 1, "a number from 1"),
        ("floor", floor, 0 <= floor <= peak, f"a rate from 0 to the peak, {peak}"),
        ("warmup", warmup, 0 <= warmup < epochs, f"fewer than the {epochs} epochs"),
        ("start", start, 1 <= start <= epochs, f"an epoch from 1 to {epochs}"),
        ("warmup", warmup, warmup == 0 or start == 1, "0 where a training goes on: its warm-up is behind it"),
    ):
        if not fits:
            raise UserError(f"cosine_power.{name}", value, allowed=allowed)
    first = start if restart else 1
    length = epochs - first + 1
    cosines = [0.5 * (1 + math.cos(math.pi * (e - warmup) / (length - warmup))) for e in range(1, length + 1)]
    # The exponent less its largest value, which changes no ratio: large powers cannot overflow.
    shapes = cosines if power == 1 else [power ** (cosine - 1) for cosine in cosines]
    low, high = min(shapes), max(shapes)
    stretched = [(shape - low) / (high - low) if high > low else 1.0 for shape in shapes]
    if warmup:
        stretched[: warmup + 1] = [e / (warmup + 1) for e in range(1, warmup + 2)]
    rates = tuple(floor + (peak - floor) * shape for shape in stretched)
    return rates if restart else rates[start - 1 :]


def cosine_power_at(done: float, *, power: float = 2.0) -> float:
    """Return the continuous form of the shape of cosine power annealing, from 1 (nothing done) to 0 (all done).

    It is ``(power ** c - 1) / (power - 1)`` with c = (1 + cos(pi * done)) / 2, and c itself for power 1.

    Args:
        done: Part of the training that is behind, from 0 to 1.
        power: See ``cosine_power``.

    Raises:
        UserError: A power below 1.

    Source: sharpDARTS, arXiv 1903.09900.
    """
    if not power >= 1:
        raise UserError("cosine_power.power", power, allowed="a number from 1")
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return cosine if power == 1 else math.expm1(cosine * math.log(power)) / (power - 1)

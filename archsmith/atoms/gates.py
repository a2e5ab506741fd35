"""Stochastic gates: a unit is kept with a learned probability.

The gate of a unit is a Bernoulli variable with log odds ``a``, relaxed to a logistic-sigmoid (binary concrete) variable
so that the loss has a gradient in ``a``: with ``u`` uniform, ``l = ln u - ln(1 - u)`` is logistic noise,
``1[a + l > 0]`` is one with probability ``sigmoid(a)``, and ``sigmoid((a + l) / tau)`` is its soft form.

Source: FiGS (arXiv 2006.09581); the relaxation is that of Maddison et al. 2017 (arXiv 1611.00712).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError

LOG_ODDS = 2.5
"""Log odds at the start: a gate is open with probability 0.924."""

TAU = 0.001
"""Published temperature. Runs of minutes need 0.1 to 0.5, or the straight-through form: at 0.001 the derivative is zero
almost always and huge rarely."""


def logistic_noise(uniform: Tensor) -> Tensor:
    """Return standard logistic noise ``ln u - ln(1 - u)`` for ``uniform`` in (0, 1)."""
    return torch.log(uniform) - torch.log1p(-uniform)


def draw_noise(
    shape: Sequence[int], generator: torch.Generator | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return logistic noise of ``shape``; uniform numbers are kept off 0 and 1, where it is infinite."""
    return _noise_from(torch.rand(*shape, generator=generator, dtype=dtype or torch.float32))


def _noise_from(uniform: Tensor) -> Tensor:
    tiny = torch.finfo(uniform.dtype).eps
    return logistic_noise(uniform.clamp(tiny, 1.0 - tiny))


def sampled_gate(logits: Tensor, noise: Tensor, tau: float = TAU, *, straight_through: bool = False) -> Tensor:
    """Return the gate of a training step.

    Args:
        logits: Log odds, any shape.
        noise: Logistic noise of the same shape; one number for each channel and step, shared by batch and positions.
        tau: Temperature.
        straight_through: Forward ``1[a + l > 0]``, backward the derivative of the soft gate, ``m (1 - m) / tau``.
    """
    soft = torch.sigmoid((logits + noise) / tau)
    if not straight_through:
        return soft
    hard = (logits + noise > 0).to(soft.dtype)
    return hard + soft - soft.detach()


def inference_gate(logits: Tensor, *, hard: bool = False) -> Tensor:
    """Return the gate without noise: open where ``a > 0``, there ``sigmoid(a)`` (as dropout rescales), or 1."""
    is_open = (logits > 0).to(logits.dtype)
    return is_open if hard else is_open * torch.sigmoid(logits)


def first_alive(mask: Tensor) -> Tensor:
    """Return ``mask`` with its first entry at least 1, so that no tensor vanishes."""
    return torch.cat((mask[:1].clamp(min=1.0), mask[1:]))


def expected_soft_gate(logits: Tensor) -> Tensor:
    """Return the mean of the soft gate at ``tau = 1``: ``s / (s - 1) (1 - ln s / (s - 1))``, ``s = e^a``; 1/2 at 0."""
    s = torch.exp(logits)
    near_zero = logits.abs() < 1e-4
    safe = torch.where(near_zero, torch.full_like(s, 2.0), s)
    mean = safe / (safe - 1) * (1 - torch.log(safe) / (safe - 1))
    return torch.where(near_zero, 0.5 + logits / 6, mean)  # its series at 0


def annealed_tau(tau: float, rate: float | None, step: int) -> float:
    """Return ``tau * 0.1 ** (step / rate)``; ``tau`` itself without a rate."""
    return tau if rate is None else float(tau * 0.1 ** (step / rate))


def joined(regularisation: Sequence[Tensor]) -> Tensor:
    """Return the regularisation vector of channels with several gates: ``1 - prod(1 - r_j)``."""
    return 1 - torch.stack([1 - r for r in regularisation]).prod(dim=0)


def any_alive(alive: Sequence[Tensor]) -> Tensor:
    """Return which channels with several gates live: where any of them is open."""
    return torch.stack(list(alive)).any(dim=0)


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """How gates behave.

    Attributes:
        log_odds: Log odds at the start.
        tau: Temperature.
        annealing: Steps in which the temperature falls to a tenth, or None.
        straight_through: See ``sampled_gate``.
        soft_inference: Keep the factor ``sigmoid(a)`` outside of training.
        keep_first: See ``first_alive``.
    """

    log_odds: float = LOG_ODDS
    tau: float = TAU
    annealing: float | None = None
    straight_through: bool = False
    soft_inference: bool = True
    keep_first: bool = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise UserError("tau", self.tau, allowed="a number above 0")
        if self.annealing is not None and not self.annealing > 0:
            raise UserError("annealing", self.annealing, allowed="steps above 0, or None")

    def mask(self, logits: Tensor, noise: Tensor | None, step: int = 0) -> Tensor:
        """Return the gates of a step with ``noise``, or those of inference without."""
        if noise is None:
            gate = inference_gate(logits, hard=not self.soft_inference)
        else:
            tau = annealed_tau(self.tau, self.annealing, step)
            gate = sampled_gate(logits, noise, tau, straight_through=self.straight_through)
        return first_alive(gate) if self.keep_first else gate

    def alive(self, logits: Tensor) -> Tensor:
        """Return which channels are kept when the search ends: ``a > 0``, and the first one with ``keep_first``."""
        living = logits.detach() > 0
        if self.keep_first:
            living = living.clone()
            living[0] = True
        return living


class LogisticGate(nn.Module):
    """A gate as a layer of the user's own model, behind a normalisation or an activation.

    In training mode every forward pass draws one number for each channel, unless ``noise`` was set (for a whole step,
    by whoever trains the gates). In evaluation mode the gate is that of inference.

    Args:
        channels: Channels of the gated tensor.
        axis: Their axis.
        options: Behaviour.

    Attributes:
        logits: Log odds, (channels,). No weight decay belongs on them: it pulls towards probability 1/2.
        noise: Noise of this step, or None to draw at every forward pass.
    """

    def __init__(self, channels: int, *, axis: int = 1, options: GateOptions | None = None) -> None:
        super().__init__()
        if channels < 1:
            raise UserError("channels", channels, allowed="an integer from 1")
        self.options = options or GateOptions()
        self.axis = axis
        self.logits = nn.Parameter(torch.full((channels,), self.options.log_odds))
        self.noise: Tensor | None = None
        self.steps = 0

    def mask(self) -> Tensor:
        """Return the gates of this forward pass, (channels,)."""
        noise = self.noise
        if self.training and noise is None:
            # "As many as there are logits", not "six": a cut of the channels is seen to fit (``archsmith.atoms.find``).
            noise = _noise_from(torch.rand_like(self.logits))
        return self.options.mask(self.logits, noise if self.training else None, self.steps)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with every channel multiplied by its gate."""
        axis = self.axis % x.dim()
        return x * self.mask().to(x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{len(self.logits)}, axis={self.axis}"

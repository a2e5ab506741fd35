"""Gradient noise: Gaussian noise on every gradient entry before the optimiser's step, with a variance that decays.

``AnnealedNoise`` is the noise itself, a pure function of (seed, stream, step): without state, so a resumed run asks it
again, and every replica that asks with the same seed adds the same. ``GradientNoise`` puts it into an optimiser of a
loop of your own; the loops of this library take the former (``LoopHooks.noise``, ``TrainingRecipe.gradient_noise``).

Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015, arXiv 1511.06807.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import seed_of
from archsmith.train.schedules import PolynomialDecay

GAMMA = 0.55
"""Published exponent of the decay of the variance; published variances at step 0 are 0.01, 0.3 and 1."""


@dataclass(frozen=True, kw_only=True)
class AnnealedNoise:
    """Independent noise ``N(0, eta / (1 + t)^gamma)`` on every entry of a gradient at optimiser step t = 0, 1, 2, ...

    Attributes:
        seed: Seed of the run.
        eta: Variance at step 0; 0 adds nothing, and the training is bit for bit the plain one.
        gamma: How fast the variance decays.
        stream: Name of the stream, so that two optimisers of one run get noise that is independent.
        first: Optimiser step of the run with which t is 0: for a training that begins within a run.

    Raises:
        UserError: A value out of its range.
    """

    seed: int
    eta: float = 0.01
    gamma: float = GAMMA
    stream: str = "weights"
    first: int = 0

    def __post_init__(self) -> None:
        check_noise(self.eta, self.gamma)

    @property
    def variance(self) -> PolynomialDecay:
        """The variance as a function of the step."""
        return PolynomialDecay(self.eta, self.gamma)

    def sigma(self, step: int) -> float:
        """Return the standard deviation at a step, counted from 0."""
        return math.sqrt(self.variance(step))

    def add_(self, parameters: Iterable[Tensor], step: int, *, only: Iterable[Tensor] | None = None) -> None:
        """Add the noise of a step to the gradients; call it once for each optimiser step.

        What a parameter gets depends on the seed, the stream, the step and the parameter's place in ``parameters``
        alone: not on which others have a gradient. It is drawn on the gradient's device, so a CPU and a GPU draw
        different numbers, and two GPUs of one kind the same.

        Args:
            parameters: All parameters of an optimiser, in its order. One without a gradient is left alone.
            step: Optimiser steps done, ``first`` or more.
            only: The parameters that get noise; all if None.

        Raises:
            UserError: A sparse gradient: noise on all of its entries would not be sparse.
        """
        if self.eta == 0:
            return
        sigma = self.sigma(step - self.first)
        chosen = None if only is None else {id(parameter) for parameter in only}
        generators: dict[torch.device, torch.Generator] = {}
        for place, parameter in enumerate(parameters):
            gradient = parameter.grad
            if gradient is None or (chosen is not None and id(parameter) not in chosen):
                continue
            if gradient.layout != torch.strided:
                raise UserError("gradient", Shown("a sparse tensor"), allowed="dense gradients (sparse=False)")
            generator = generators.setdefault(gradient.device, torch.Generator(gradient.device))
            generator.manual_seed(seed_of(self.seed, "gradient-noise", self.stream, step, place))
            # Half precision has too few values to draw from; the sum is rounded to it once.
            wide = torch.float32 if gradient.dtype in (torch.float16, torch.bfloat16) else gradient.dtype
            noise = torch.randn(gradient.shape, generator=generator, dtype=wide, device=gradient.device)
            gradient.add_(noise.to(gradient.dtype), alpha=sigma)


def check_noise(eta: float, gamma: float, prefix: str = "") -> None:
    """Refuse a variance or an exponent that is no finite number from 0.

    Args:
        eta: Variance at step 0.
        gamma: Exponent.
        prefix: Of the fields' names in the message.

    Raises:
        UserError: Which of the two it is.
    """
    for name, value in (("eta", eta), ("gamma", gamma)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{prefix}{name}", value, allowed="a finite number from 0")


def noise_or_none(eta: float, gamma: float, seed: int, stream: str = "weights") -> AnnealedNoise | None:
    """Return the noise of a method's settings, None where its variance is 0."""
    return AnnealedNoise(seed=seed, eta=eta, gamma=gamma, stream=stream) if eta else None


class GradientNoise:
    """Noise in an optimiser of your own loop: made once, it acts whenever ``optimizer.step()`` is called.

    Learning-rate schedulers, gradient accumulation (noise comes once, in the step) and ``torch.amp.GradScaler`` (noise
    comes after its unscaling, and a step that it skips is not counted) work as without it. Under data parallelism every
    process adds the same noise when it has the same seed; parameters that are sharded over processes are not meant.

    Args:
        optimizer: Any of torch.
        noise: What is added.
        parameters: Those that get noise, of the optimiser's; all if None.
        clip_norm: Largest norm of the gradient of all the optimiser's parameters, 0 for no limit. Leave it 0 where the
            loop clips by itself before the step.
        noise_first: Clip what the noise was added to. The default clips the gradient of the loss, then adds, so that
            the noise keeps its scale; the other order removes most of it.

    Attributes:
        t: Steps done; the next step's noise is that of step ``t``.

    Raises:
        UserError: A parameter that the optimiser does not have, or ``noise_first`` without a limit.

    Example:
        >>> weight = nn.Parameter(torch.zeros(3))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> noise = GradientNoise(optimizer, AnnealedNoise(seed=0, eta=0.3))
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> noise.t, bool((weight != -1.0).all())
        (1, True)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        noise: AnnealedNoise,
        *,
        parameters: Iterable[Tensor] | None = None,
        clip_norm: float = 0.0,
        noise_first: bool = False,
    ) -> None:
        if not 0 <= clip_norm < math.inf:
            raise UserError("clip_norm", clip_norm, allowed="a finite number from 0")
        if noise_first and not clip_norm:
            raise UserError("noise_first", True, allowed="False where clip_norm is 0: nothing is clipped behind it")
        self.optimizer, self.noise = optimizer, noise
        self.clip_norm, self.noise_first = clip_norm, noise_first
        self.parameters = None if parameters is None else tuple(parameters)
        known = {id(parameter) for parameter in self._all()}
        if self.parameters is not None and any(id(parameter) not in known for parameter in self.parameters):
            raise UserError("parameters", Shown("one that the optimiser does not have"), allowed="parameters of it")
        self.t = 0
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Take the noise out of the optimiser."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to go on with the same noise: the step and what the noise is."""
        return {"t": self.t, **asdict(self.noise)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            UserError: It is the state of another noise.
        """
        own = asdict(self.noise)
        if {name: state.get(name) for name in own} != own:
            raise UserError("state", dict(state), allowed=f"that of this noise, {own}")
        self.t = int(state["t"])

    def _all(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add this step's noise, or let the closure do so where there is one: it makes the gradients."""
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UserError(
                "gradients",
                Shown("scaled ones: this optimiser unscales inside its step"),
                allowed="unscaled ones",
                hint="Call scaler.unscale_(optimizer) before scaler.step(optimizer).",
            )
        step = self.t
        self.t += 1
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser itself
        if closure is None:
            self._disturb_(step)
            return None

        def disturbed() -> Any:
            loss = closure()
            self._disturb_(step)
            return loss

        return (args[0], disturbed, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}

    @torch.no_grad()
    def _disturb_(self, step: int) -> None:
        everything = self._all()
        if self.clip_norm and not self.noise_first:
            nn.utils.clip_grad_norm_(everything, self.clip_norm)
        self.noise.add_(everything, step, only=self.parameters)
        if self.clip_norm and self.noise_first:
            nn.utils.clip_grad_norm_(everything, self.clip_norm)

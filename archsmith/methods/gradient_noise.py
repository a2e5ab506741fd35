"""Gradient noise: annealed Gaussian noise on the gradients, for networks that are very deep or badly initialised.

Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens, "Adding Gradient Noise Improves Learning for Very Deep
Networks", 2015, arXiv 1511.06807. Read: the abstract and three independent summaries; the full text was not found.

Between back-propagation and the optimiser's step every entry of the gradient gets independent noise of mean zero and
variance ``eta / (1 + t)^gamma``, t being the number of steps done. The optimiser stays what it is, and the noise costs
next to nothing. ``eta`` has to be tuned: the paper chooses from three values, and too much of it hurts.

Here it is a training option of every method (``gradient_noise`` in their settings, in a ``TrainingRecipe``, in the
phases of a differentiable search, there on weights, architecture logits or both), and ``attach`` puts it into an
optimiser of a loop of your own.

Own decisions: the gradient is clipped before the noise is added (``noise_first`` is the other order); the noise of a
step is a function of seed and step, so that it needs no generator state in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.train.noise import GAMMA, AnnealedNoise, GradientNoise

SYSTEM = {
    "slug": "gradient-noise",
    "title": "Adding Gradient Noise Improves Learning for Very Deep Networks",
    "year": 2015,
    "arxiv": "1511.06807",
    "kind": "train",
    "aliases": ["annealed-gradient-noise"],
}

ETAS = (0.01, 0.3, 1.0)
"""Variances at step 0 that the paper chooses from, by validation."""


class Settings(BaseModel):
    """What is added to the gradients.

    Attributes:
        eta: Variance at step 0; 0 for none.
        gamma: Exponent with which the variance decays.
        clip_norm: Largest norm of the gradient, 0 for no limit (or where the loop clips by itself).
        noise_first: Whether the noise comes before the clipping, which then removes most of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eta: float = Field(default=ETAS[0], ge=0, allow_inf_nan=False)
    gamma: float = Field(default=GAMMA, ge=0, allow_inf_nan=False)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    noise_first: bool = False

    @model_validator(mode="after")
    def _clipped(self) -> Settings:
        if self.noise_first and not self.clip_norm:
            raise UserError("noise_first", True, allowed="False where clip_norm is 0: nothing is clipped behind it")
        return self


def attach(
    optimizer: torch.optim.Optimizer,
    settings: Settings | None = None,
    *,
    seed: int,
    parameters: Iterable[Tensor] | None = None,
) -> GradientNoise:
    """Put the noise into an optimiser; from now on every ``optimizer.step()`` adds it.

    Args:
        optimizer: Of your loop.
        settings: The published ones, with the smallest variance, when None.
        seed: Seed of the run, the same in all of its processes.
        parameters: Those that get noise; all of the optimiser's if None.

    Returns:
        What holds the number of steps done; its ``state_dict`` belongs into a checkpoint.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> noise = attach(optimizer, Settings(eta=0.3), seed=0, parameters=[model.weight])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> noise.state_dict()["t"]
        1
    """
    s = settings or Settings()
    noise = AnnealedNoise(seed=seed, eta=s.eta, gamma=s.gamma)
    return GradientNoise(optimizer, noise, parameters=parameters, clip_norm=s.clip_norm, noise_first=s.noise_first)


def chosen_eta(validate: Callable[[float], float], etas: Sequence[float] = (0.0, *ETAS)) -> tuple[float, list[float]]:
    """Train with each variance and return the best one: the paper's way, and 0, which is to train without noise.

    Args:
        validate: Trains with this variance and returns a validation score; higher is better, NaN never wins.
        etas: Tried in this order; of equal scores the first wins.

    Returns:
        The variance and all scores.

    Raises:
        UserError: Nothing to try.
    """
    if not etas:
        raise UserError("etas", tuple(etas), allowed="at least one variance")
    scores = [float(validate(eta)) for eta in etas]
    ranked = sorted(
        range(len(etas)), key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0)
    )
    return etas[ranked[0]], scores

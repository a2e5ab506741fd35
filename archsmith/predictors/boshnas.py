"""The surrogate of BOSHNAS: three small networks that say what to expect, how noisy that is, and how unsure they are.

A natural-parameter network gives the mean and the noise of the data (aleatoric). A teacher with dropout is asked ten
times; a student learns the spread of its answers (epistemic), so that it can be differentiated. What is minimised over
inputs is ``mean - k * uncertainty``.

Published: one example per update, 200 epochs, three optimisers. Here all examples make one update by default, with
learning rates to match; ``published_surrogate`` has the published ones, and takes about a hundred times as long. The
mean gradient of an epoch is the same; its noise is not.

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from archsmith.core.errors import UserError
from archsmith.predictors.base import Predictor, at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from archsmith.layers.natural import NaturalNetwork

# N examples, D features, U unlabelled rows

PASSES = 10
"""Answers of the teacher behind a standard deviation."""

DROPOUT = 0.3
MARGIN = 0.1
"""Distance that the targets keep from 0 and 1, the ends of a sigmoid."""

UNLABELLED = 256
"""Rows without a target, at most, on which the student learns the teacher's uncertainty besides."""


class BoshnasSurrogate(Predictor):
    """Natural-parameter network, teacher and student; needs torch. Features are standardised.

    Args:
        epochs: Passes over the examples, at most, of each of the three, from 1.
        batch_size: Examples of an update, None for all.
        learning_rates: Of the natural-parameter network, the teacher (both AdamW) and the student.
        student: Optimiser of the student, "adamw" or "sgd".
        validation: Share of the examples that is kept out to decide when to stop: training ends when their loss has
            risen ``patience`` epochs in a row. With fewer than ``least`` of them, nothing is kept out.
        reshuffle: Draw the kept ones anew in every epoch, as published: the stopping rule then sees them in training.
        patience: See ``validation``.
        least: See ``validation``.
        unlabelled: Rows of features (U, D) of which the student learns too how unsure the teacher is; at most 256 of
            them are drawn. The examples alone if None.
        unit: Whether targets are numbers in (0, 1) already; else they are spread over 0.1 to 0.9.
        seed: Of the initial weights, the split, the order and the dropout; torch's global stream is left alone.

    Predictions have the mean of the natural-parameter network and the student's standard deviation.

    Raises:
        UserError: A setting out of range.
    """

    def __init__(
        self,
        *,
        epochs: int = 200,
        batch_size: int | None = None,
        learning_rates: tuple[float, float, float] = (0.01, 0.01, 0.003),
        student: Literal["adamw", "sgd"] = "adamw",
        validation: float = 0.2,
        reshuffle: bool = False,
        patience: int = 7,
        least: int = 1,
        unlabelled: np.ndarray | None = None,
        unit: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        at_least("epochs", epochs, 1)
        at_least("patience", patience, 1)
        at_least("least", least, 1)
        if batch_size is not None:
            at_least("batch_size", batch_size, 1)
        for rate in learning_rates:
            at_least("learning_rates", rate, 1e-12)
        if not 0 <= validation < 1:
            raise UserError("validation", validation, allowed="a share from 0 to below 1")
        if student not in ("adamw", "sgd"):
            raise UserError("student", student, allowed="'adamw' or 'sgd'")
        self.epochs, self.batch_size, self.learning_rates = epochs, batch_size, tuple(learning_rates)
        self.student, self.validation, self.reshuffle = student, validation, reshuffle
        self.patience, self.least, self.unlabelled, self.unit = patience, least, unlabelled, unit

    def acquisition(self, x_ND: Tensor, *, weight: float = 0.5, aleatoric: bool = False) -> Tensor:
        """Return ``mean - weight * uncertainty`` (N,) in the unit of 0 to 1; differentiable twice, smaller is better.

        Args:
            x_ND: Features as ``fit`` got them, float64.
            weight: Of the uncertainty.
            aleatoric: Whether the noise of the data counts as uncertainty too, as its variance.
        """
        mean, variance, spread = self.parts(x_ND)
        return mean - weight * (spread + variance if aleatoric else spread)

    def parts(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance of the data and the student's standard deviation, in the unit of 0 to 1."""
        x = (x_ND - self._centre) / self._spread
        mean, variance = self._natural(x)
        return mean, variance, _answer(self._student, x)

    def unit_targets(self, targets_N: np.ndarray) -> np.ndarray:
        """Return targets in the unit of 0 to 1, as ``fit`` turned them."""
        found: np.ndarray = (np.asarray(targets_N, dtype=np.float64) - self._floor) / self._range
        return found

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        import torch

        values = self._offset + self._scale * targets
        self._floor, self._range = 0.0, 1.0
        if not self.unit:
            self._range = float(np.ptp(values)) / (1 - 2 * MARGIN)
            self._floor = float(values.min()) - MARGIN * self._range
        spread = features.std(axis=0)
        self._centre = torch.from_numpy(features.mean(axis=0))
        self._spread = torch.from_numpy(np.where(spread > 1e-12, spread, 1.0))
        x = (torch.from_numpy(features) - self._centre) / self._spread
        y = torch.from_numpy((values - self._floor) / self._range)
        generator = torch.Generator().manual_seed(self._library_seed())
        self._fit_natural(x, y, generator)
        self._fit_teacher(x, y, generator)
        self._fit_student(x, generator)

    def _fit_natural(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        import torch

        from archsmith.layers.natural import NaturalNetwork, natural_loss

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._library_seed("natural"))
            network = NaturalNetwork(x.shape[1]).double()
        self._natural: NaturalNetwork = network

        def loss(rows: Tensor) -> Tensor:
            mean, variance = network(x[rows])
            return natural_loss(mean, variance, y[rows]) / len(rows)

        parameters = list(network.parameters())
        optimiser = torch.optim.AdamW(parameters, lr=self.learning_rates[0], foreach=True)
        self._train(optimiser, loss, loss, len(y), generator)

    def _fit_teacher(self, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        import torch

        weights = self._teacher = _weights(x.shape[1], generator)

        def loss(rows: Tensor) -> Tensor:
            return ((_answer(weights, x[rows], generator) - y[rows]) ** 2).mean()

        def quiet(rows: Tensor) -> Tensor:
            return ((_answer(weights, x[rows]) - y[rows]) ** 2).mean()

        optimiser = torch.optim.AdamW(weights, lr=self.learning_rates[1], foreach=True)
        self._train(optimiser, loss, quiet, len(y), generator)

    def _fit_student(self, x: Tensor, generator: torch.Generator) -> None:
        import torch

        if self.unlabelled is not None and len(self.unlabelled):
            chosen = torch.randperm(len(self.unlabelled), generator=generator)[:UNLABELLED].numpy()
            more = torch.from_numpy(np.asarray(self.unlabelled, dtype=np.float64)[chosen])
            x = torch.cat([x, (more - self._centre) / self._spread])
        with torch.no_grad():
            answers = torch.stack([_answer(self._teacher, x, generator) for _ in range(PASSES)])
        y = answers.std(dim=0)
        weights = self._student = _weights(x.shape[1], generator)
        with torch.no_grad():  # spreads are small: begin at their mean, or large steps run into the end of the sigmoid
            weights[-1] += torch.logit(y.mean().clamp(1e-4, 0.5)) - torch.logit(_answer(weights, x), eps=1e-9).mean()

        def loss(rows: Tensor) -> Tensor:
            return ((_answer(weights, x[rows]) - y[rows]) ** 2).mean()

        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if self.student == "adamw" else torch.optim.SGD
        optimiser = make(weights, lr=self.learning_rates[2], foreach=True)
        self._train(optimiser, loss, loss, len(y), generator)

    def _train(
        self,
        optimiser: torch.optim.Optimizer,
        loss: Callable[[Tensor], Tensor],
        validation_loss: Callable[[Tensor], Tensor],
        examples: int,
        generator: torch.Generator,
    ) -> None:
        """Train until the loss of what is kept out has risen ``patience`` epochs in a row, or all epochs are over."""
        import torch

        kept = int(self.validation * examples)
        kept = kept if kept >= self.least and kept < examples else 0
        order = torch.randperm(examples, generator=generator)
        before, risen = float("inf"), 0
        for _ in range(self.epochs):
            if self.reshuffle:
                order = torch.randperm(examples, generator=generator)
            for rows in self._batches(order[kept:], generator):
                optimiser.zero_grad()
                loss(rows).backward()
                optimiser.step()
            if kept:
                with torch.no_grad():
                    now = float(validation_loss(order[:kept]))
                risen, before = (risen + 1 if now > before else 0), now
                if risen >= self.patience:
                    break

    def _batches(self, rows: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        import torch

        if self.batch_size is None or self.batch_size >= len(rows):
            return iter((rows,))
        return iter(rows[torch.randperm(len(rows), generator=generator)].split(self.batch_size))

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.no_grad():
            mean, _, spread = (part.numpy() for part in self.parts(torch.from_numpy(features)))
        found = self._floor + self._range * mean
        return (found - self._offset) / self._scale, self._range * spread / self._scale


def published_surrogate(**settings: Any) -> BoshnasSurrogate:
    """Return a surrogate fitted as published: one example per update, its learning rates, the split drawn every epoch.

    Args:
        settings: Others of ``BoshnasSurrogate``, or these anew.
    """
    own: dict[str, Any] = {"batch_size": 1, "learning_rates": (5e-5, 2e-3, 2e-3), "student": "sgd", "reshuffle": True}
    return BoshnasSurrogate(**(own | settings))


def _weights(inputs: int, generator: torch.Generator, hidden: Sequence[int] = (64, 32)) -> list[Tensor]:
    """Return matrices and biases, drawn as torch draws those of linear layers."""
    import torch

    found = []
    sizes = (inputs, *hidden, 1)
    for a, b in itertools.pairwise(sizes):
        for shape in ((a, b), (b,)):
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            found.append(((2 * drawn - 1) / a**0.5).requires_grad_())
    return found


def _answer(weights: Sequence[Tensor], x: Tensor, dropout: torch.Generator | None = None) -> Tensor:
    """Return the output (N,) of a softplus network with a sigmoid at its end; with a generator, hidden units drop."""
    import torch
    from torch.nn import functional

    for number in range(0, len(weights) - 2, 2):
        x = functional.softplus(x @ weights[number] + weights[number + 1])
        if dropout is not None:
            kept = torch.rand(x.shape, generator=dropout, dtype=x.dtype) >= DROPOUT
            x = x * kept / (1 - DROPOUT)
    return torch.sigmoid(x @ weights[-2] + weights[-1]).squeeze(-1)

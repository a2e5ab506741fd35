"""Training one network by a recipe, epoch by epoch, so that it can be left and taken up exactly.

The first e epochs of a training are the same whatever its length, because the schedule is laid over the recipe's whole
length and every batch depends on (seed, epoch, step) only. So a training that goes on from the tensors of ``state`` is
the one that was never left, to the last bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.base import Task
from archsmith.train.compute import Compute
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.noise import GAMMA, AnnealedNoise, noise_or_none
from archsmith.train.optim import decay_groups
from archsmith.train.patience import Patience, PatienceState
from archsmith.train.schedules import annealed
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

PATIENCE_FIELDS = ("rate_patience", "rate_mult", "rate_min", "stop_patience")
"""Fields of ``Patience`` that a space may choose."""

OptimizerName = Literal["sgd_mom", "nesterov", "adam"]
ScheduleName = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How a candidate is trained.

    Attributes:
        epochs: Passes over the training part; with ``patience`` the most there are.
        batch_size: Examples for one step.
        optimizer: "sgd_mom" (momentum), "nesterov" (Nesterov's momentum) or "adam".
        lr: Learning rate, its largest one under a falling schedule.
        momentum: Of the first two.
        weight_decay: L2 on convolutions and linear layers.
        schedule: "constant", "cosine" or "linear", over ``epochs``; constant with ``patience``, which has its own.
        warmup_epochs: Linear rise at the beginning of a falling schedule.
        clip_norm: Largest norm of the gradient, 0 for none.
        gradient_noise: Variance at step 0 of Gaussian noise on the gradient, added behind the clipping; 0 for none. See
            ``archsmith.train.noise``.
        gradient_noise_decay: Exponent with which that variance decays.
        patience: Lowers the rate and stops early by the validation accuracy, which is then taken after every epoch.

    Raises:
        UserError: A value out of its range, or values that do not go together.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: OptimizerName = "nesterov"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: ScheduleName = "cosine"
    warmup_epochs: int = 0
    clip_norm: float = 0.0
    gradient_noise: float = 0.0
    gradient_noise_decay: float = GAMMA
    patience: Patience | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("warmup_epochs", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"recipe.{name}", value, allowed=f"an integer from {least}")
        for name, good, allowed in (
            ("optimizer", self.optimizer in get_args(OptimizerName), f"one of {list(get_args(OptimizerName))}"),
            ("schedule", self.schedule in get_args(ScheduleName), f"one of {list(get_args(ScheduleName))}"),
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("momentum", 0 <= self.momentum < 1, "a number from 0, below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number from 0"),
            ("clip_norm", 0 <= self.clip_norm < math.inf, "a finite number from 0"),
            ("gradient_noise", 0 <= self.gradient_noise < math.inf, "a finite number from 0"),
            ("gradient_noise_decay", 0 <= self.gradient_noise_decay < math.inf, "a finite number from 0"),
        ):
            if not good:
                raise UserError(f"recipe.{name}", getattr(self, name), allowed=allowed)
        if self.patience is not None and self.schedule != "constant":
            raise UserError(
                "recipe.schedule", self.schedule, allowed="'constant' with patience, which lowers the rate by itself"
            )
        if self.optimizer == "nesterov" and self.momentum == 0:
            raise UserError("recipe.momentum", self.momentum, allowed="more than 0 with the optimizer 'nesterov'")

    def changed(self, changes: Mapping[str, Any]) -> TrainingRecipe:
        """Return the recipe with other values for some of its fields.

        Raises:
            UserError: A name that a recipe does not have, or what the constructor raises.
        """
        known = [field.name for field in fields(self)]
        if unknown := [name for name in changes if name not in known]:
            raise UserError(f"recipe.{unknown[0]}", Shown("an unknown field"), allowed=", ".join(known))
        return replace(self, **changes)

    def with_published(self, published: Mapping[str, Any]) -> TrainingRecipe:
        """Return the recipe with the values that a space publishes for its evaluator (``UserHyperparams``).

        Args:
            published: Fields of the recipe by name; those of ``Patience`` (rate_mult, ...) change its patience.

        Raises:
            UserError: A name that a recipe does not have, or a value out of its range.
        """
        rule = {name: value for name, value in published.items() if name in PATIENCE_FIELDS}
        own = {name: value for name, value in published.items() if name not in rule}
        if rule and self.patience is None:
            raise UserError(
                "published hyper-parameters",
                sorted(rule),
                allowed="values of a recipe that has a patience",
                hint="Give the recipe patience=Patience().",
            )
        return self.changed({**own, "patience": replace(self.patience, **rule)} if self.patience and rule else own)

    def noise(self, seed: int) -> AnnealedNoise | None:
        """Return the noise on the gradients, None without."""
        return noise_or_none(self.gradient_noise, self.gradient_noise_decay, seed)

    def make_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of a network."""
        groups = decay_groups(network, self.weight_decay)
        if self.optimizer == "adam":
            return torch.optim.Adam(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.optimizer == "nesterov")


class Training:
    """The training of one network.

    Args:
        network: Changed in place. If it has ``set_progress``, it is told the part of the training that is over.
        task: Its training part is learned, its validation part scored.
        recipe: How.
        seed: Seed of batches, augmentation and dropout.
        compute: Device and precision; CPU when None.

    Attributes:
        epochs: Epochs done.
        train: Means of "loss" and "accuracy" over the steps of the last epoch, as trained (augmentation, dropout).

    Raises:
        UserError: The batch does not fit the task.
    """

    def __init__(
        self, network: nn.Module, task: Task, recipe: TrainingRecipe, *, seed: int, compute: Compute | None = None
    ) -> None:
        self.recipe = recipe
        self.network, self.task, self.seed = network, task, seed
        self.compute = compute or Compute()
        self.steps = task.steps_per_epoch(recipe.batch_size)
        network.to(self.compute.device)
        self.optimizer = recipe.make_optimizer(network)
        self.forward = self.compute.forward(network)
        self.epochs = 0
        self.train: dict[str, float] = {}
        self.patience: PatienceState | None = recipe.patience.start(recipe.lr) if recipe.patience else None
        self._best: dict[str, Tensor] | None = None
        self._tell_progress()

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done or patience is at its end."""
        return self.epochs >= self.recipe.epochs or bool(self.patience and self.patience.stopped)

    def run(self, epochs: int) -> None:
        """Train until ``epochs`` epochs are done in all, or the training is over.

        The time limit of the patience counts from this call.

        Raises:
            Diverged: The loss became NaN or infinite.
        """
        started = time.perf_counter()
        while self.epochs < epochs and not self.is_over:
            position = Position(epoch=self.epochs, total=self.epochs * self.steps)
            hooks = LoopHooks(
                rate=self._rate,
                after_backward=self._clip,
                on_step=lambda where, _: self._tell_progress(where),
                noise=self.recipe.noise(self.seed),
            )
            train_epoch(
                self.network,
                self.optimizer,
                self.task,
                position,
                hooks,
                batch_size=self.recipe.batch_size,
                seed=self.seed,
                compute=self.compute,
                forward=self.forward,
            )
            self.train = position.means()
            next_epoch(position)
            self.epochs = position.epoch
            if self.recipe.patience is not None and self.patience is not None:
                score, before = self._validate()[self.task.metric], self.patience
                elapsed = time.perf_counter() - started
                self.patience = self.recipe.patience.after_epoch(before, score, seconds=elapsed)
                if self.patience.best_epoch != before.best_epoch:
                    self._best = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def finish(self) -> dict[str, float]:
        """Return the task's validation scores of the result: the last epoch, or with patience the best one.

        With patience the network has the weights of that epoch afterwards; do not train on.
        """
        if self._best is not None:
            self.network.load_state_dict(self._best)
        return self._validate()

    def state(self) -> dict[str, Tensor]:
        """Return everything that ``load`` needs to go on, as named tensors; ``result_weights`` finds the network's."""
        tensors = {f"last.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self._best or {}).items()}
        tensors |= optimizer_tensors(self.optimizer, self.network)
        rule = self.patience or PatienceState(rate=self.recipe.lr)
        counts = [self.seed, self.epochs, rule.best_epoch, rule.epochs, rule.bad_for_rate, rule.bad_for_stop]
        numbers = [rule.rate, rule.best, self.train.get("loss", 0.0), self.train.get("accuracy", 0.0)]
        tensors["training.counts"] = torch.tensor([*counts, int(bool(rule.stopped))], dtype=torch.int64)
        tensors["training.numbers"] = torch.tensor(numbers, dtype=torch.float64)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned, with the seed it had.

        Raises:
            UserError: The tensors are those of another network or another kind of training.
        """
        try:
            self.network.load_state_dict(_below("last.", tensors))
            load_optimizer_tensors(self.optimizer, self.network, tensors)
            counts = [int(value) for value in tensors["training.counts"]]
            rate, best, loss, accuracy = tensors["training.numbers"].tolist()
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                "weights", Shown(f"tensors of another training ({_first_line(error)})"), allowed="those of this network"
            ) from error
        self.seed, self.epochs, best_epoch, epochs, bad_for_rate, bad_for_stop, stopped = counts
        self.train = {"loss": loss, "accuracy": accuracy}
        if self.recipe.patience is not None:
            self._best = _below("best.", tensors) or None
            self.patience = PatienceState(
                rate=rate,
                best=best,
                best_epoch=best_epoch,
                epochs=epochs,
                bad_for_rate=bad_for_rate,
                bad_for_stop=bad_for_stop,
                stopped="it had stopped before" if stopped else "",
            )
        self._tell_progress()

    def _rate(self, step: int) -> float:
        recipe = self.recipe
        if self.patience is not None:
            return self.patience.rate
        if recipe.schedule == "constant":
            return recipe.lr
        total, warmup = recipe.epochs * self.steps, min(recipe.warmup_epochs, recipe.epochs) * self.steps
        return annealed(step, peak=recipe.lr, total=total, warmup=warmup, shape=recipe.schedule)

    def _clip(self) -> None:
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)

    def _tell_progress(self, position: Position | None = None) -> None:
        tell = getattr(self.network, "set_progress", None)
        if tell is not None:
            done = self.epochs * self.steps if position is None else position.total
            tell(done / (self.recipe.epochs * self.steps))

    def _validate(self) -> dict[str, float]:
        self.network.eval()
        scores = self.task.evaluate(self.compute.evaluating(self.network), "valid")
        return {name: float(value) for name, value in scores.items()}


def result_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the ``state_dict`` of the result in what ``Training.state`` returned: the best epoch's, or the last's."""
    return _below("best.", state) or _below("last.", state)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

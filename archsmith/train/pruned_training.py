"""Our own training of a task with a pruner in it, kept after every epoch and taken up exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from archsmith.atoms.prunable import unwrapped
from archsmith.core.errors import Shown, UserError
from archsmith.core.files import write_atomic
from archsmith.tasks.augment import changed_augment
from archsmith.tasks.base import Task
from archsmith.train.compute import Compute
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.noise import AnnealedNoise
from archsmith.train.schedules import dropped
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors
from archsmith.train.workers import refuse_unrepeatable


class Pruner(Protocol):
    """What prunes a training from inside."""

    steps: int

    @property
    def mixup(self) -> float:
        """Alpha of mixup for the next batch, 0 for none."""

    def before_step(self) -> None:
        """Act between backward and the optimiser's step."""

    def after_step(self) -> None:
        """Act after the optimiser's step."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that ``load_state_dict`` needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from it."""


P = TypeVar("P", bound=Pruner)


class StepRecipe(Protocol):
    """Momentum SGD whose rate falls to a tenth with some epochs; ``archsmith.methods.clicktrain.Recipe`` is one."""

    @property
    def epochs(self) -> int:
        """Passes over the training part."""

    @property
    def batch_size(self) -> int:
        """Examples for one step."""

    @property
    def lr(self) -> float:
        """Rate at the beginning."""

    @property
    def drops(self) -> tuple[int, ...]:
        """Epochs with which the rate falls."""

    @property
    def momentum(self) -> float:
        """Of SGD."""

    @property
    def weight_decay(self) -> float:
        """L2 on all parameters."""


class PruningTraining(Generic[P]):
    """A training with a pruner in it, that can be left after any epoch and taken up exactly.

    Exactly, where the task's batches depend on seed, epoch and step alone: the image tasks, and loaders that archsmith
    can seed. A loader with an order of its own begins the next epoch as it does in a new process.

    Args:
        network: Changed in place.
        task: Its training part is learned.
        recipe: How it is trained.
        make_pruner: Makes the pruner for network, optimiser, steps of an epoch, and the processes.
        identity: JSON values that must be the same where a kept training is taken up.
        label_smoothing: For all epochs.
        noise: Added to the gradients before every step.
        seed: Seed of batches, augmentation and dropout.
        compute: Device, precision, processes; the CPU when None.

    Attributes:
        click: The pruner.
        position: Where it stands.
        history: Means of loss and accuracy of each epoch, as trained.

    Raises:
        UserError: The batch does not fit the task, or what ``make_pruner`` raises.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        recipe: StepRecipe,
        make_pruner: Callable[[nn.Module, torch.optim.Optimizer, int, Compute], P],
        *,
        identity: Mapping[str, Any],
        label_smoothing: float = 0.0,
        noise: AnnealedNoise | None = None,
        seed: int = 0,
        compute: Compute | None = None,
    ) -> None:
        self._noise = noise
        self.compute = compute or Compute()
        self.compute.check_batch_size(recipe.batch_size)
        refuse_unrepeatable(task.resume_note, self.compute.workers.count)
        self.network, self.task, self.seed = network, task, seed
        self._recipe, self._identity, self._smoothing = recipe, dict(identity), label_smoothing
        self.steps = task.steps_per_epoch(recipe.batch_size)
        network.to(self.compute.device)
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.click = make_pruner(network, self.optimizer, self.steps, self.compute)
        self.position = Position()
        self.history: list[dict[str, float]] = []
        self.forward = self.compute.forward(network)

    def epoch(self) -> dict[str, float]:
        """Train one epoch; return its means of "loss" and "accuracy".

        Raises:
            Diverged: The loss became NaN or infinite.
        """
        recipe = self._recipe
        hooks = LoopHooks(
            rate=lambda step: dropped(step, base=recipe.lr, drops=recipe.drops, steps_per_epoch=self.steps),
            after_backward=self.click.before_step,
            after_step=lambda rate: self.click.after_step(),
            noise=self._noise,
        )
        changes = {"mixup": self.click.mixup, "label_smoothing": self._smoothing}
        with changed_augment(self.task, **{name: value for name, value in changes.items() if value}):
            train_epoch(
                self.network,
                self.optimizer,
                self.task,
                self.position,
                hooks,
                batch_size=recipe.batch_size,
                seed=self.seed,
                compute=self.compute,
                forward=self.forward,
            )
        means = self.position.means()
        self.history.append(means)
        next_epoch(self.position)
        return means

    def scores(self, split: str = "valid") -> dict[str, float]:
        """Return the task's scores of the network as it is."""
        self.network.eval()
        found = self.task.evaluate(self.compute.evaluating(self.network), split)
        return {name: float(value) for name, value in found.items()}

    def state(self) -> dict[str, Tensor]:
        """Return everything that ``load`` needs, as named tensors; taken between two epochs."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, self.network)
        tensors |= {f"click.{name}": tensor for name, tensor in self.click.state_dict().items()}
        tensors["history"] = torch.tensor(
            [[means["loss"], means["accuracy"]] for means in self.history], dtype=torch.float64
        )
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned.

        Raises:
            UserError: The tensors are those of another network.
        """
        try:
            self.network.load_state_dict(_below("network.", tensors))
            load_optimizer_tensors(self.optimizer, self.network, tensors)
        except (KeyError, RuntimeError) as error:
            raise UserError("state", Shown(str(error).splitlines()[0]), allowed="that of this network") from error
        self.click.load_state_dict(_below("click.", tensors))
        self.history = [{"loss": loss, "accuracy": accuracy} for loss, accuracy in tensors["history"].tolist()]
        self.position = Position(epoch=len(self.history), total=self.click.steps)

    def resume_from(self, path: Path) -> None:
        """Go on from what ``keep`` wrote; nothing happens without the file.

        Raises:
            UserError: The file is damaged, or of another training.
        """
        found = self.compute.workers.from_main(lambda: self._read(path))
        if found is not None:
            self.load(found)

    def keep(self, path: Path) -> None:
        """Write the state and what it belongs to; in one of several processes."""
        if self.compute.workers.main:
            tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.state().items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, safetensors.torch.save(tensors, {"training": self._written_identity()}))

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                identity = (stream.metadata() or {}).get("training")
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError("folder", str(path), allowed="a file that this function wrote", hint=str(error)) from error
        if identity != self._written_identity():
            raise UserError(
                "folder",
                str(path),
                allowed="a new folder, or that of this very training",
                hint="Settings, recipe, seed, task or network differ from those of the training that is kept there.",
            )
        return tensors

    def _written_identity(self) -> str:
        """Return what must be the same for a kept state to fit."""
        shapes = {name: list(tensor.shape) for name, tensor in unwrapped(self.network).state_dict().items()}
        own = {"seed": self.seed, "task": self.task.digest, "network": shapes}
        return json.dumps({**self._identity, **own}, sort_keys=True)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

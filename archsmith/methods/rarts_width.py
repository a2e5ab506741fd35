"""RARTS for widths: how many channels each layer keeps, by factors that two copies of the weights share.

Xue, Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", IEEE Access 2022, arXiv 2008.03901.

The scheme of ``archsmith.methods.rarts``, with one factor for each channel as the architecture in place of logits of
operations. The network learns from one half of the training images, its copy from the other, a spring ties them, and
the factors learn from both under ``penalty * sum |factor|``. Then one threshold for the whole network cuts: channels
with smaller factors, or a stated part of all channels, and whatever a budget asks for besides. What is left is trained
on with all images, from the weights it has or from new ones.

Reconstructed, as the other half: the paper's body and code were not at hand; of its width search the abstract says that
it exists and beats pruning. Chosen here: factors act where a channel is read (so a factor of zero takes its shift out
as well), Adam, the penalty in the gradient, the threshold, training on from inherited weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from archsmith.atoms.shrinker import Shrinker
from archsmith.atoms.unit_budget import Order
from archsmith.core.rng import seed_of
from archsmith.run import shrink_model
from archsmith.run.drive import Monitor
from archsmith.supernet.split import Passes, Relaxed
from archsmith.tasks.base import Batch, Task
from archsmith.train.bilevel import halves
from archsmith.train.schedules import annealed
from archsmith.train.width_search import ModelLoss, Sparsity, WidthSearch

__all__ = ["Searcher", "Settings", "WidthSearch", "preset_settings"]

SYSTEM = {
    "slug": "rarts-width",
    "title": "RARTS: relaxed first-order search of widths",
    "year": 2022,
    "arxiv": "2008.03901",
    "kind": "shrink",
    "aliases": ["rarts"],
}

TASK_OPTIONS: dict[str, Any] = {}


class Settings(shrink_model.Settings):
    """Hyper-parameters; the phase "shrink" is the search.

    Attributes:
        epochs_before: Ordinary training before, with all images; none, because both copies begin alike and learn.
        epochs_shrink: Epochs of the search, over the first half of the images; the rate falls as a cosine.
        lr_shrink: Peak learning rate of both copies.
        penalty: rho, of the factors' absolute values.
        sparsity: "gradient" adds its sign to the factors' gradient; "threshold" moves factors by ``rate * penalty``.
        gate_lr: Learning rate of the factors, Adam.
        passes: "fused" (2 forward and backward passes a step) or "gauss-seidel" (4: all at the newest values).
        train_weight: Weight of the training loss, lambda.
        coupling: Strength of the spring between the copies, beta.
        threshold: Channels with smaller factors are cut.
        ratio: In place of ``threshold``, the part of all channels that is cut.
        order: What a budget takes besides: "score" is the global threshold.
        clip_norm: Largest norm of the gradient of a copy's loss; the spring is not clipped.
    """

    epochs_before: int = Field(0, ge=0)
    epochs_shrink: int = Field(50, ge=1, description="epochs of the search, each over half of the images")
    epochs_after: int = Field(25, ge=0, description="training of the network that was found, with all images")
    lr_shrink: float = Field(0.025, gt=0, description="peak rate of both copies in the search")
    score: Literal["factor"] = "factor"
    schedule: Literal["dead"] = "dead"
    order: Order = "score"
    penalty: float | None = Field(1e-3, ge=0, allow_inf_nan=False, description="rho; None for 0")
    sparsity: Sparsity = "gradient"
    gate_lr: float | None = Field(3e-4, gt=0, description="rate of the factors; None for 3e-4")
    passes: Passes = "fused"
    train_weight: float = Field(1.0, gt=0)
    coupling: float = Field(1e-2, gt=0)
    threshold: float = Field(1e-2, ge=0)
    ratio: float | None = Field(None, ge=0, lt=1)
    clip_norm: float = Field(5.0, ge=0)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "epochs_shrink": 20,
        "epochs_after": 10,
        "batch_size": 32,
        "lr_shrink": 0.05,
        "gate_lr": 0.01,
        "penalty": 0.01,
    },
}
"""A rate of 3e-4 needs thousands of steps to bring a factor from 1 to 0; runs of minutes have hundreds."""


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "small" below 24 pixels, else that of DARTS."""
    return PRESETS["small" if min(image[1:]) < 24 else "paper"]


class Searcher(shrink_model.Searcher):
    """One run: search of widths with two copies, one cut, training of what was found. Arguments as of its base."""

    settings: Settings

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.halves = halves(self.task, self.seed)

    def rate(self, step: int) -> float:
        """Return the learning rate after ``step`` steps; those of the search are steps over half of the images."""
        s = self.settings
        before, searching = s.epochs_before * self.steps, s.epochs_shrink * self._search_steps
        if step < before:
            return super().rate(step)
        if step < before + searching:
            return annealed(step - before, peak=s.lr_shrink, total=searching, shape="cosine")
        return super().rate(step + s.epochs_shrink * (self.steps - self._search_steps))

    @property
    def _search_steps(self) -> int:
        return self.halves[0].steps_per_epoch(self.settings.batch_size)

    def advance(self, monitor: Monitor) -> dict[str, Any] | None:
        """Go on to the end of an epoch and return its figures, or None when the monitor asked to stop before."""
        if self.phase != "shrink":
            return super().advance(monitor)
        if self.shrinker is None:
            self._begin_shrinking()
        return self._end_epoch("shrink") if self._search_epoch(monitor) else None

    def _search_epoch(self, monitor: Monitor) -> bool:
        """Search from the position to the end of its epoch, or until asked to stop."""
        assert isinstance(self.shrinker, WidthSearch) and self.shrinker.twin is not None
        first, second = self.halves
        position, size = self.position, self.settings.batch_size
        self.network.train()
        self.shrinker.twin.train()
        batches = first.batches(
            "train", batch_size=size, seed=seed_of(self.seed, "order"), epoch=position.epoch, start=position.step
        )
        for batch in batches:
            where = (position.epoch, position.step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(position.total)
            other = next(iter(second.batches("train", batch_size=size, seed=seed_of(self.seed, "copy-order", *where))))
            metrics: dict[str, Tensor] = {}
            figures = self.shrinker.learn(
                self._loss(first, batch, metrics, "weights", *where),
                self._loss(second, other, {}, "copy", *where),
                where,
            )
            position.step += 1
            position.total += 1
            for name, figure in {**figures, **{name: float(metric) for name, metric in metrics.items()}}.items():
                position.sums[name] = position.sums.get(name, 0.0) + figure
            monitor.step(position.total, loss=figures["loss"], accuracy=position.means().get("accuracy", 0.0))
            if monitor.should_stop():
                break
        return position.step >= self._search_steps

    def _loss(self, task: Task, batch: Batch, metrics: dict[str, Tensor], *names: str | int) -> ModelLoss:
        """Return the loss of a batch; called again it draws the same augmentation and the same dropout."""

        def loss(network: Any) -> Tensor:
            augment = torch.Generator().manual_seed(seed_of(self.seed, "augment", *names))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, "dropout", *names))
                value, found = task.loss(
                    lambda inputs: network(inputs.contiguous(memory_format=self.format)), batch, augment
                )
            metrics.update(found)
            return value

        return loss

    def _new_shrinker(self) -> Shrinker:
        s = self.settings
        return WidthSearch(
            self.costs.find(self.network),
            self.optimizer,
            self.costs.budget_text or None,
            relaxed=Relaxed(train_weight=s.train_weight, coupling=s.coupling),
            passes=s.passes,
            penalty=s.penalty or 0.0,
            sparsity=s.sparsity,
            rate=s.gate_lr or 3e-4,
            threshold=s.threshold,
            ratio=s.ratio,
            order=s.order,
            clip_norm=s.clip_norm,
            seed=self.seed,
            measure=self.costs.measure,
        )

    def _method_figures(self, phase: shrink_model.Phase) -> dict[str, Any]:
        if phase != "shrink" or not isinstance(self.shrinker, WidthSearch):
            return {}
        means = self.position.means()
        figures: dict[str, Any] = {"twin_loss": means["twin_loss"], "distance": means["distance"]}
        if self.shrinker.twin is not None:
            figures["closed"] = sum(len(units) for units in self.shrinker.going().values())
            figures["penalty"] = self.shrinker.penalty()
        return figures

    # ------------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs: tensors by name and plain JSON values."""
        tensors, state = super().state()
        if isinstance(self.shrinker, WidthSearch):
            tensors.update({f"search.{name}": tensor for name, tensor in self.shrinker.tensors().items()})
        return tensors, state

    def load(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        super().load(dict(tensors), state)
        if isinstance(self.shrinker, WidthSearch):
            own = {name.removeprefix("search."): t for name, t in tensors.items() if name.startswith("search.")}
            self.shrinker.load_tensors(own)

"""ClickTrain: one ordinary training at whose end the network is pruned, by patterns and by kernels, layers unchanged.

Zhang, Li, et al., "ClickTrain: Efficient and Accurate End-to-End Deep Learning Training via Fine-Grained
Architecture-Preserving Pruning", ICS 2021 (arXiv 2011.10170). Read: the abstract, and descriptions of the released
code and configurations; what the paper's body says beyond them is not known here.

Instead of training, then pruning, then fine-tuning, one training has three stages:

1. **Plain** training for E1 epochs.
2. On the first batch of epoch E1 each weight's importance is measured, ``(w * dL/dw)^2``. In every layer the least
   important *kernels* will go, ranked over the layer; in every 3x3 kernel the best of P shared *patterns* of four
   weights will stay. Until E2 a group lasso **regularises** what will go towards zero, and nothing else.
3. From E2 the masks are hard: weights outside are zero after every step. Mixup is on.

So the epochs of pruning and fine-tuning are not added to the training, and the hard step costs little accuracy because
the weights that it sets to zero are small already.

Differences: "patterns are generated" (abstract) is offered as ``pool="frequent"``, our reading; the fixed pool of the
released code is the default. One ratio for the whole network, in place of a percentage for each layer, is ours.
The compiler that turns patterns into fast code is not part of this; what it needs is written by ``export``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from archsmith.atoms.hard_masks import HardMasks
from archsmith.atoms.pattern_choice import (
    Decision,
    choose,
    masks_of,
    percents_of,
    ratios,
    weight_budget,
    weights_per_kernel,
)
from archsmith.atoms.pattern_file import KernelChoice, packed_model, save_packed
from archsmith.atoms.prunable import chosen_convolutions, convolutions, unwrapped, weight_of
from archsmith.atoms.weight_masks import importance, kept_weights, pattern_pool
from archsmith.core.errors import Shown, UserError
from archsmith.cost import count
from archsmith.layers.pattern_conv import Execution
from archsmith.tasks.base import Task
from archsmith.train.agree import from_first_rank
from archsmith.train.compute import Compute
from archsmith.train.mask_lasso import ComplementLasso
from archsmith.train.noise import GAMMA, noise_or_none
from archsmith.train.phases import Phase, PhaseSchedule
from archsmith.train.pruned_training import PruningTraining

SYSTEM = {
    "slug": "clicktrain",
    "title": "ClickTrain: Efficient and Accurate End-to-End Deep Learning Training via Fine-Grained Architecture-Preserving Pruning",  # noqa: E501
    "year": 2021,
    "arxiv": "2011.10170",
    "kind": "train",
    "aliases": ["pattern-pruning"],
}

Decide = Callable[[Callable[[], "Decision | None"]], "Decision | None"]
Stage = Literal["plain", "regularise", "prune"]


class Settings(BaseModel):
    """How a training is pruned; epochs count from 0.

    Attributes:
        regularise_from: E1, the epoch with whose first batch the masks are chosen (published: after the first fall of
            the learning rate).
        prune_from: E2, the first epoch under hard masks; the same as E1 prunes without the lasso.
        strength: Lambda of the group lasso. It multiplies a sum over all kernels, and what it does adds up over the
            steps of stage 2: the norm of a group moves by at most ``lr / (1 - momentum) * strength`` a step. Keep the
            sum of that over the stage: 0.92, 1.84 and 0.68 in the published trainings of VGG-11, VGG-13 and ResNet-32.
            So a short training needs a larger strength.
        decoupled: Apply the lasso as a proximal step after the optimiser's, not as a gradient: for Adam and its kind,
            which would normalise it away. Published is the gradient, with SGD.
        kernels: Percent of the kernels that go: one number for all layers, or for each by its name (layers that are not
            named are left whole). None: ``ratio`` decides.
        ratio: Convolution weights of the whole network over those that stay, reached by ranking the kernels of all
            layers together; in place of ``kernels``.
        patterns: P, the patterns of the pool.
        pool: "fixed": the released patterns. "frequent": the network's own most frequent ones.
        centre: Patterns of the pool keep the centre of the kernel.
        exclude: Names of convolutions that stay whole, besides the first one and shortcuts.
        mixup: Alpha of mixup from ``prune_from`` on, 0 for none.
        label_smoothing: In our own training, for all epochs (0.1 is configured but switched off in the released code).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    regularise_from: int = Field(default=65, ge=0)
    prune_from: int = Field(default=143, ge=0)
    strength: float = Field(default=3.5e-4, ge=0, allow_inf_nan=False)
    decoupled: bool = False
    kernels: float | dict[str, float] | None = None
    ratio: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    patterns: int = Field(default=4, ge=1, le=126)
    pool: Literal["fixed", "frequent"] = "fixed"
    centre: bool = False
    exclude: tuple[str, ...] = ()
    mixup: float = Field(default=0.3, ge=0, le=16)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _checked(self) -> Settings:
        if (self.kernels is None) == (self.ratio is None):
            raise UserError(
                "kernels", self.kernels, allowed="percentages of kernels, or ratio in their place; one of them"
            )
        if self.prune_from < self.regularise_from:
            raise UserError("prune_from", self.prune_from, allowed=f"regularise_from ({self.regularise_from}) or later")
        percents = self.kernels.values() if isinstance(self.kernels, dict) else (self.kernels,)
        for percent in percents:
            if percent is not None and not 0 <= percent <= 100:
                raise UserError("kernels", percent, allowed="percentages from 0 to 100")
        if self.pool == "fixed":
            pattern_pool("fixed", self.patterns, centre=self.centre)
        return self

    def phases(self) -> PhaseSchedule:
        """Return the three stages."""
        length = self.prune_from - self.regularise_from
        return PhaseSchedule([Phase("plain", self.regularise_from), Phase("regularise", length), Phase("prune", None)])


class Recipe(BaseModel):
    """How the network is trained around it; the defaults are the published CIFAR-10 training of VGG-11.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images for one step.
        lr: Learning rate at the beginning.
        drops: Epochs with which the rate falls to a tenth.
        momentum: Of SGD.
        weight_decay: L2 on all parameters.
        gradient_noise: Variance at step 0 of noise on the gradients, see ``archsmith.train.noise``; 0 for none.
        gradient_noise_decay: Exponent with which it decays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=190, ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr: float = Field(default=0.1, gt=0)
    drops: tuple[int, ...] = (55, 131)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    gradient_noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    gradient_noise_decay: float = Field(default=GAMMA, ge=0, allow_inf_nan=False)


class ClickTrain:
    """Prunes a training from inside; three lines in a loop of your own.

    Args:
        model: Trained by the loop; wrapped by ``DistributedDataParallel`` or ``torch.compile`` or not.
        optimizer: Of its parameters.
        settings: What to prune and when.
        steps_per_epoch: Optimiser steps of one epoch.
        scaler: The loop's ``torch.amp.GradScaler`` if it has one: gradients are unscaled here, so that the lasso is not
            scaled away; the loop then does not call ``scaler.unscale_`` itself.
        from_main: How several processes agree: calls its argument in one of them and gives all its result. Under plain
            ``torch.distributed`` rank 0 decides.

    Attributes:
        steps: Steps done.
        decision: What stays, None before it is chosen.

    Raises:
        UserError: A layer that does not exist or must not be pruned, or a ratio out of reach.

    Example:
        >>> from archsmith.layers.plain_nets import PlainVgg
        >>> model = PlainVgg((8, 0, 16), 1, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> settings = Settings(regularise_from=1, prune_from=2, kernels=50)
        >>> click = ClickTrain(model, optimizer, settings, steps_per_epoch=1)
        >>> for _ in range(3):
        ...     model(torch.ones(2, 1, 8, 8)).square().mean().backward()
        ...     click.before_step()
        ...     optimizer.step()
        ...     click.after_step()
        >>> click.report()["layers"]["feature.4"]["nonzero"] <= 8 * 16 * 4 / 2
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        *,
        steps_per_epoch: int,
        scaler: torch.amp.GradScaler | None = None,
        from_main: Decide = from_first_rank,
    ) -> None:
        if steps_per_epoch < 1:
            raise UserError("steps_per_epoch", steps_per_epoch, allowed="1 or more")
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self.steps_per_epoch, self.scaler, self._from_main = steps_per_epoch, scaler, from_main
        self.phases = settings.phases()
        self.steps = 0
        self.decision: Decision | None = None
        names = settings.kernels if isinstance(settings.kernels, dict) else None
        self.layers = {
            one.name: one.module for one in chosen_convolutions(model, names=names, exclude=settings.exclude)
        }
        self._budget = weight_budget(model, self.layers, settings.ratio)
        self._lasso: ComplementLasso | None = None
        self._hard: HardMasks | None = None
        self._shrink = False

    @property
    def stage(self) -> Stage:
        """The stage of the next step, or of the one being done."""
        return cast(Stage, self.phases.at(self.steps // self.steps_per_epoch).name)

    @property
    def mixup(self) -> float:
        """Alpha of mixup for the next batch: 0 before the hard masks."""
        return self.settings.mixup if self.stage == "prune" else 0.0

    def before_step(self) -> None:
        """Between backward and ``optimizer.step()``, before any clipping: choose once, then add the lasso's gradient.

        A gradient that is not finite (a loss scale too large) is not chosen by: the choice waits for the next step.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.stage == "plain":
            return
        if self.decision is None:
            decision = self._from_main(self._decide)
            if decision is not None:
                self._take(decision)
        elif self.stage == "regularise" and self._lasso is not None:
            if self.settings.decoupled:
                self._shrink = True
            else:
                self._lasso.add_gradient_(self.settings.strength)

    def after_step(self) -> None:
        """After ``optimizer.step()``, also when a scaler skipped it: apply the masks in the last stage."""
        if self._shrink and self._lasso is not None:
            rates = {id(p): float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
            self._lasso.shrink_([self.settings.strength * rates.get(id(w), 0.0) for w, _ in self._lasso.layers])
            self._shrink = False
        if self.stage == "prune" and self._hard is not None:
            self._hard.apply_(self.optimizer)
        self.steps += 1

    def prune_(self) -> None:
        """Apply the masks now, whatever the stage.

        Raises:
            UserError: Nothing has been chosen yet.
        """
        self._masks().apply_(self.optimizer)

    def lasso(self) -> float:
        """Return the present value of the group lasso, without its strength; 0 before the choice."""
        return 0.0 if self._lasso is None else float(self._lasso.value().detach())

    def report(self) -> dict[str, Any]:
        """Return what is there: per layer and for all convolutions the weights, those that are not zero, the ratio.

        Returns:
            "ratio" over all convolutions, "ratio_without_shortcuts", "ratio_pruned" over the pruned layers alone,
            "removed_but_not_zero" (0 once pruned), "pool", and "layers" by name.
        """
        rows = {
            one.name: {
                "weights": one.module.weight.numel(),
                "nonzero": int(one.module.weight.detach().count_nonzero()),
                "percent": None if self.decision is None else self.decision.percent.get(one.name),
                "kept": "" if one.name in self.layers else one.kept or "not chosen",
            }
            for one in convolutions(self.model)
        }
        return {
            "stage": self.stage,
            **ratios(rows),
            "removed_but_not_zero": None if self._hard is None else sum(self._hard.violations().values()),
            "pool": None if self.decision is None else self.decision.pool,
            "layers": rows,
        }

    def macs(self, inputs: Tensor) -> dict[str, int]:
        """Return the multiply-accumulates of one example: with all weights, and with those that are not zero alone.

        The second number is what an execution could do, not what a dense convolution saves: its zeros are multiplied
        like any other weight. Time is to be measured.

        Args:
            inputs: An example batch of size 1.

        Returns:
            "dense" and "nonzero".
        """
        counts = count(unwrapped(self.model), inputs)
        own = {layer.name: layer.macs for layer in counts.layers}
        zero = 0
        for one in convolutions(self.model):
            weights = one.module.weight.numel()
            zero += own.get(one.name, 0) * (weights - int(one.module.weight.detach().count_nonzero())) // weights
        return {"dense": counts.macs, "nonzero": counts.macs - zero}

    def packed(self, *, execution: Execution = "sparse") -> nn.Module:
        """Return a copy of the network whose pruned layers store and compute only what stays.

        Raises:
            UserError: Nothing has been chosen, or the masks have not been applied yet.
        """
        left = sum(self._masks().violations().values())
        if left:
            raise UserError(
                "model",
                Shown(f"{left:,} removed weights that are not zero"),
                allowed="a pruned network",
                hint="Call prune_().",
            )
        assert self.decision is not None
        return packed_model(self.model, self.decision.choices, self.decision.pool, execution=execution)

    def export(self, folder: str | Path) -> None:
        """Write the pruned network for code generators and for ``archsmith.atoms.pattern_file.load_packed``."""
        save_packed(folder, self.packed())

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that ``load_state_dict`` needs to go on, as named tensors."""
        state = {"steps": torch.tensor(self.steps)}
        if self.decision is not None:
            state["pool"] = torch.tensor(self.decision.pool, dtype=torch.uint8)
            for name, choice in self.decision.choices.items():
                state[f"percent.{name}"] = torch.tensor(self.decision.percent[name], dtype=torch.float64)
                state[f"kept.{name}"] = choice.kept
                if choice.patterns is not None:
                    state[f"patterns.{name}"] = choice.patterns
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned; model and optimiser are loaded by themselves.

        Raises:
            UserError: The state is of other layers.
        """
        kept = {name.removeprefix("kept."): tensor for name, tensor in state.items() if name.startswith("kept.")}
        expected = {name: tuple(module.weight.shape[:2]) for name, module in self.layers.items()}
        if "steps" not in state or (kept and {name: tuple(mask.shape) for name, mask in kept.items()} != expected):
            raise UserError("state", Shown(f"masks of {sorted(kept)}"), allowed=f"those of {sorted(expected)}")
        self.steps = int(state["steps"])
        self.decision, self._lasso, self._hard = None, None, None
        if kept:
            pool = tuple(tuple(pattern) for pattern in state["pool"].tolist())
            percent = {name: float(state[f"percent.{name}"]) for name in kept}
            choices = {name: KernelChoice(mask.bool(), state.get(f"patterns.{name}")) for name, mask in kept.items()}
            self._take(Decision(pool, percent, choices))

    def _decide(self) -> Decision | None:
        scores = {}
        for name in self.layers:
            weight = weight_of(self.model, name)
            if weight.grad is None:
                raise UserError(
                    "layer", Shown(f"{name}, whose weight has no gradient"), allowed="layers that the loss depends on"
                )
            scores[name] = importance(weight, weight.grad)
        if not all(bool(torch.isfinite(score).all()) for score in scores.values()):
            return None
        return choose(scores, self.settings, budget=self._budget)

    def _take(self, decision: Decision) -> None:
        weights = {name: weight_of(self.model, name) for name in self.layers}
        masks = {name: masks_of(weights[name], choice, decision.pool) for name, choice in decision.choices.items()}
        self.decision = decision
        self._lasso = ComplementLasso([(weights[name], masks[name]) for name in masks])
        self._hard = HardMasks(weights, {name: torch.stack(both).all(0) for name, both in masks.items()})

    def _masks(self) -> HardMasks:
        if self._hard is None:
            raise UserError(
                "stage",
                self.stage,
                allowed="a training that has chosen its masks",
                hint=f"That happens in epoch {self.settings.regularise_from}.",
            )
        return self._hard


def plan(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """Return what a pruned network will have, by counting: nothing is trained, a network on the meta device will do.

    Args:
        model: The network.
        settings: With ``kernels``; where ``ratio`` is given the layers are not known before the choice.

    Returns:
        As ``ClickTrain.report``: "ratio", "ratio_without_shortcuts", "ratio_pruned", "layers".

    Raises:
        UserError: A layer that does not exist or must not be pruned, or ``settings.kernels`` is not given.
    """
    if settings.kernels is None:
        raise UserError(
            "kernels", None, allowed="percentages of kernels: with ratio the layers are chosen in the training"
        )
    names = settings.kernels if isinstance(settings.kernels, dict) else None
    chosen = [one.name for one in chosen_convolutions(model, names=names, exclude=settings.exclude)]
    percents = percents_of(settings, chosen)
    rows = {}
    for one in convolutions(model):
        shape, percent = one.module.weight.shape, percents.get(one.name)
        rows[one.name] = {
            "weights": shape.numel(),
            "nonzero": shape.numel()
            if percent is None
            else kept_weights(shape, percent, per_kernel=weights_per_kernel(shape)),
            "percent": percent,
            "kept": "" if percent is not None else one.kept or "not chosen",
        }
    return {**ratios(rows), "layers": rows}


class PrunedTraining(PruningTraining[ClickTrain]):
    """Our own training of a task with ``ClickTrain`` in it, see ``archsmith.train.pruned_training``.

    Args:
        network: Changed in place.
        task: Its training part is learned.
        settings: What to prune and when; ``prune_from`` before the last epoch.
        recipe: How it is trained.
        seed: Seed of batches, augmentation and dropout.
        compute: Device, precision, processes; the CPU when None.

    Raises:
        UserError: The last stage would never begin, the batch does not fit the task, or what ``ClickTrain`` raises.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        settings: Settings,
        recipe: Recipe,
        *,
        seed: int = 0,
        compute: Compute | None = None,
    ) -> None:
        if settings.prune_from >= recipe.epochs:
            raise UserError(
                "prune_from", settings.prune_from, allowed=f"less than the {recipe.epochs} epochs of the recipe"
            )
        self.settings, self.recipe = settings, recipe
        super().__init__(
            network,
            task,
            recipe,
            lambda model, optimizer, steps, processes: ClickTrain(
                model, optimizer, settings, steps_per_epoch=steps, from_main=processes.workers.from_main
            ),
            identity={"settings": settings.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")},
            label_smoothing=settings.label_smoothing,
            noise=noise_or_none(recipe.gradient_noise, recipe.gradient_noise_decay, seed),
            seed=seed,
            compute=compute,
        )


def train(
    network: nn.Module,
    task: Task,
    settings: Settings,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    compute: Compute | None = None,
    folder: str | Path | None = None,
    on_epoch: Callable[[PrunedTraining], None] = lambda training: None,
) -> PrunedTraining:
    """Train and prune a network on a task, in one go.

    Args:
        network: Changed in place.
        task: What is learned.
        settings: What to prune and when.
        recipe: How it is trained; the published CIFAR-10 training when None.
        seed: Seed of batches, augmentation and dropout.
        compute: Device, precision, processes.
        folder: Where the state is kept after every epoch. The same call again goes on from there, after Ctrl-C, a kill
            or a power cut, and ends with the same bits. At the end the pruned network is exported to ``folder/pruned``.
        on_epoch: Called after every epoch.

    Returns:
        The finished training: ``.scores("valid")``, ``.click.report()``.

    Raises:
        UserError: ``folder`` holds another training; or what ``PrunedTraining`` raises.
        Diverged: The loss became NaN or infinite.
    """
    training = PrunedTraining(network, task, settings, recipe or Recipe(), seed=seed, compute=compute)
    path = None if folder is None else Path(folder) / "training.safetensors"
    if path is not None:
        training.resume_from(path)
    while training.position.epoch < training.recipe.epochs:
        training.epoch()
        if path is not None:
            training.keep(path)
        on_epoch(training)
    network.eval()
    if folder is not None and training.compute.workers.main:
        training.click.export(Path(folder) / "pruned")
    return training


PUBLISHED: dict[str, dict[str, Any]] = {
    "vgg11-10.3x": {
        "settings": {"regularise_from": 65, "prune_from": 143, "strength": 3.5e-4, "patterns": 4},
        "recipe": {"epochs": 190, "drops": (55, 131)},
        "kernels": (35, 45, 65, 75, 80, 80, 85),
        "ratio": 10.303,
        "accuracy": 0.9169,
    },
    "vgg11-8.7x": {
        "settings": {"regularise_from": 65, "prune_from": 143, "strength": 3.5e-4, "patterns": 4},
        "recipe": {"epochs": 190, "drops": (55, 131)},
        "kernels": (45, 55, 55, 65, 65, 85, 85),
        "ratio": 8.682,
        "accuracy": 0.9209,
    },
    "vgg16": {
        "settings": {"regularise_from": 150, "prune_from": 163, "strength": 1.5e-4, "patterns": 12},
        "recipe": {"epochs": 190, "drops": (55, 131)},
        "kernels": (35, 45, 55, 55, 55, 65, 65, 65, 75, 80, 85, 85),
        "ratio": 8.832,
    },
    "resnet32-8.6x": {
        "settings": {"regularise_from": 61, "prune_from": 141, "strength": 2.5e-4, "patterns": 4},
        "recipe": {"epochs": 190, "drops": (55, 130)},
        "kernels": (*[55] * 6, *[65] * 10, *[75] * 14),
        "ratio": 8.575,
    },
    "resnet50-imagenet": {
        "settings": {"regularise_from": 35, "prune_from": 78, "strength": 2.5e-4, "patterns": 4},
        "recipe": {"epochs": 95, "drops": (31, 61, 75)},
        "kernels": (*[25] * 18, *[35] * 9, *[45] * 12, *[55] * 9),
        "ratio": 2.820,
    },
}
"""Published configurations: percent of kernels for each convolution that is pruned, in order; "ratio" leaves shortcuts
out, as published; "accuracy" is what the configuration notes for CIFAR-10. ``published_settings`` uses them."""


def published_settings(name: str, network: nn.Module) -> tuple[Settings, Recipe]:
    """Return settings and recipe of a published configuration for a network of its form.

    Args:
        name: Key of ``PUBLISHED``.
        network: Its convolutions besides the first one and shortcuts must be as many as the configuration has.

    Raises:
        UserError: No such configuration, or a network of another form.
    """
    if name not in PUBLISHED:
        raise UserError("name", name, allowed=", ".join(PUBLISHED))
    published = PUBLISHED[name]
    layers = [one.name for one in chosen_convolutions(network)]
    if len(layers) != len(published["kernels"]):
        raise UserError(
            "network", Shown(f"{len(layers)} convolutions to prune"), allowed=f"{len(published['kernels'])} for {name}"
        )
    kernels = {layer: float(percent) for layer, percent in zip(layers, published["kernels"], strict=True)}
    return Settings(kernels=kernels, **published["settings"]), Recipe(**published["recipe"])

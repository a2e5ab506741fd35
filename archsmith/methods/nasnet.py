"""NASNet: search a pair of cells on small images, scale them by (N, F), regularise with ScheduledDropPath.

Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures for Scalable Image Recognition", CVPR 2018,
arXiv 1707.07012.

The search learns two cells only, one that keeps the resolution and one that halves it; the skeleton around them is
fixed and scaled by N (repeats) and F (filters), so that cells found on CIFAR-10 transfer to large images. A recurrent
controller makes the 50 decisions of a pair. Each sampled pair is built small, trained briefly, and scored on held-out
images; proximal policy optimisation moves the controller towards pairs of high score. The best pairs are trained to
convergence and the best of these is kept, widened and trained with ScheduledDropPath: paths are dropped with a
probability that grows with depth and, linearly, during training. The baseline is random search: the same with uniform
decisions.

What differs: the clip range, the optimiser and the number of updates for each batch are not published (0.2, Adam, 1
here); ``children`` and ``recipe`` have settings for one CPU besides the paper's 20,000 children of 20 epochs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from archsmith.families.nasnet import AUXILIARY_WEIGHT, NasnetFamily, nasnet_family
from archsmith.families.nasnet_space import nasnet_space
from archsmith.layers.nasnet import NasnetNetwork
from archsmith.space import Architecture, Objective, Space
from archsmith.strategies import PPO, RandomSearch, ReinforceController, Strategy
from archsmith.tasks.base import Task
from archsmith.train.auxiliary import WithAuxiliary
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.noise import GAMMA, noise_or_none
from archsmith.train.optim import decay_groups
from archsmith.train.schedules import annealed

SYSTEM = {
    "slug": "nasnet",
    "title": "NASNet: Learning Transferable Architectures for Scalable Image Recognition",
    "year": 2018,
    "arxiv": "1707.07012",
    "kind": "search",
    "aliases": ["ppo-controller"],
}


class Settings(BaseModel):
    """Hyper-parameters of the search; the defaults are the paper's (appendix A) where it states them.

    Attributes:
        policy: "ppo", "reinforce", or "random" (the paper's baseline: uniform decisions).
        children: Architectures to train and score.
        finalists: Best children that are trained to convergence; the best of them is the result.
        learning_rate: Of the controller.
        entropy_weight: Factor of the entropy bonus.
        baseline_decay: Decay of the average reward that is subtracted.
        batch: Children for one update.
        clip: How far a probability ratio may leave 1 (not stated in the paper).
        updates_per_batch: Updates on each batch (not stated in the paper).
        units: Width of the LSTM.
        recipe: Name of the children's recipe in ``RECIPES``.
        final_recipe: Name of the finalists' recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["ppo", "reinforce", "random"] = "ppo"
    children: int = Field(default=20_000, ge=1)
    finalists: int = Field(default=250, ge=1)
    learning_rate: float = Field(default=3.5e-4, ge=0)
    entropy_weight: float = Field(default=1e-5, ge=0)
    baseline_decay: float = Field(default=0.95, ge=0, lt=1)
    batch: int = Field(default=20, ge=1)
    clip: float = Field(default=0.2, gt=0, lt=1)
    updates_per_batch: int = Field(default=1, ge=1)
    units: int = Field(default=100, ge=1)
    recipe: Literal["child", "cpu-child"] = "child"
    final_recipe: Literal["cifar", "cpu-final"] = "cifar"


class Recipe(BaseModel):
    """How a network is stacked and trained.

    Attributes:
        skeleton: Name in ``archsmith.families.nasnet.SKELETONS``.
        family: Its settings that differ.
        epochs: Passes over the training images.
        batch_size: Images for one step.
        lr: Largest learning rate; a single cosine takes it to zero.
        momentum: Nesterov's.
        weight_decay: L2 on convolutions and the classifier.
        clip_norm: Largest norm of the gradient, 0 for none.
        auxiliary_weight: Weight of the auxiliary head's loss, 0 for no head.
        gradient_noise: Variance at step 0 of noise on the gradients, see ``archsmith.train.noise``; 0 for none.
        gradient_noise_decay: Exponent with which it decays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    skeleton: str = "search"
    family: dict[str, Any] = Field(default_factory=dict)
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=32, ge=2)
    lr: float = Field(default=0.025, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    clip_norm: float = Field(default=5.0, ge=0)
    auxiliary_weight: float = Field(default=0.0, ge=0)
    gradient_noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    gradient_noise_decay: float = Field(default=GAMMA, ge=0, allow_inf_nan=False)


RECIPES = {
    "child": Recipe(),
    "cifar": Recipe(skeleton="cifar", epochs=600, auxiliary_weight=AUXILIARY_WEIGHT),
    "cpu-child": Recipe(family={"filters": 4, "repeats": 1}, epochs=1, batch_size=32, lr=0.1),
    "cpu-final": Recipe(family={"filters": 8, "repeats": 1, "final_keep": 0.8}, epochs=30, batch_size=32, lr=0.05),
}
"""The paper's child (N = 2, F = 32, 20 epochs) and final network (6 @ 768, 600 epochs); and ours for one CPU."""

PUBLISHED_SEARCH = {"children": 20_000, "gpus": 500, "days": 4, "held_out": 5_000, "best_trained": 250}
"""The published search on CIFAR-10; ``held_out`` of the 50,000 training images give the reward."""

PUBLISHED_ERRORS = {
    "NASNet-A 6@768": {"params_millions": 3.3, "error": 3.41, "error_cutout": 2.65},
    "NASNet-A 7@2304": {"params_millions": 27.6, "error": 2.97, "error_cutout": 2.40},
}
"""Published CIFAR-10 test errors in percent, means of five trainings."""

PUBLISHED_IMAGENET = {
    "NASNet-A 4@1056": {"params_millions": 5.3, "macs_millions": 564, "top1": 74.0, "top5": 91.6},
    "NASNet-A 6@4032": {"params_millions": 88.9, "macs_millions": 23_800, "top1": 82.7, "top5": 96.2},
}
"""Published ImageNet accuracies in percent."""


def strategy(space: Space | None = None, settings: Settings | None = None, seed: int = 0) -> Strategy:
    """Return the search strategy: a controller trained by PPO or REINFORCE, or uniform decisions.

    Args:
        space: Where to search; the pairs of NASNet cells by default, but any space will do.
        settings: Hyper-parameters.
        seed: Seed of controller and samples.
    """
    space = nasnet_space() if space is None else space
    settings = Settings() if settings is None else settings
    reward = (Objective("valid_accuracy"),)
    if settings.policy == "random":
        return RandomSearch(space, objectives=reward, seed=seed)
    names = ("learning_rate", "entropy_weight", "baseline_decay", "batch", "units")
    shared: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if settings.policy == "reinforce":
        return ReinforceController(space, objectives=reward, seed=seed, **shared)
    return PPO(
        space,
        objectives=reward,
        seed=seed,
        clip=settings.clip,
        updates_per_batch=settings.updates_per_batch,
        **shared,
    )


def family_for(recipe: Recipe, *, image: tuple[int, int, int], num_classes: int) -> NasnetFamily:
    """Return the family that builds networks as ``recipe`` says.

    Args:
        recipe: Of children or finalists.
        image: (C, H, W).
        num_classes: Number of classes.
    """
    head = {"auxiliary": recipe.auxiliary_weight > 0}
    return nasnet_family(recipe.skeleton, image=image, num_classes=num_classes, **{**head, **recipe.family})


def train(network: NasnetNetwork, task: Task, recipe: Recipe, *, seed: int = 0) -> dict[str, float]:
    """Train a child or a finalist by its recipe, and score it on the held-out images.

    Momentum SGD, one cosine, clipped gradients; ScheduledDropPath follows the training, the auxiliary head adds its
    loss.

    Args:
        network: Changed in place.
        task: Its training part is learned, its validation part gives the reward.
        recipe: How.
        seed: Seed of batches, augmentation and dropped paths.

    Returns:
        "valid_accuracy" in [0, 1] and the "train_loss" of the last epoch.

    Raises:
        Diverged: The loss became NaN or infinite.
    """
    steps = task.steps_per_epoch(recipe.batch_size)
    total = recipe.epochs * steps
    nesterov = recipe.momentum > 0
    optimizer = torch.optim.SGD(
        decay_groups(network, recipe.weight_decay), lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov
    )
    learned = WithAuxiliary(task, network, recipe.auxiliary_weight)

    def clip() -> None:
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)

    hooks = LoopHooks(
        rate=lambda step: annealed(step, peak=recipe.lr, total=total, shape="cosine"),
        after_backward=clip,
        on_step=lambda position, loss: network.set_progress(position.total / total),
        noise=noise_or_none(recipe.gradient_noise, recipe.gradient_noise_decay, seed),
    )
    network.set_progress(0.0)
    position, means = Position(), {"loss": float("nan")}
    for _ in range(recipe.epochs):
        train_epoch(network, optimizer, learned, position, hooks, batch_size=recipe.batch_size, seed=seed)
        means = position.means()
        next_epoch(position)
    network.eval()
    scores = task.evaluate(network, "valid")
    return {"valid_accuracy": float(scores[task.metric]), "train_loss": means["loss"]}


def finalists(scored: Iterable[tuple[Architecture, float]], count: int) -> list[Architecture]:
    """Return the architectures of the best rewards, best first, each network once; of equal rewards the earlier.

    Args:
        scored: Architecture and reward of each child, in the order they finished; NaN never wins.
        count: How many at most.
    """
    best: dict[str, tuple[float, int, Architecture]] = {}
    for number, (architecture, reward) in enumerate(scored):
        key = architecture.network_digest
        if reward == reward and (key not in best or reward > best[key][0]):
            best[key] = (reward, number, architecture)
    ranked = sorted(best.values(), key=lambda entry: (-entry[0], entry[1]))
    return [architecture for _, _, architecture in ranked[:count]]


def preset_settings(image: tuple[int, int, int]) -> Mapping[str, Any]:
    """Return what a single CPU can do in place of the paper's search, for images of any size."""
    return {
        "children": 200,
        "finalists": 3,
        "learning_rate": 3.5e-3,
        "updates_per_batch": 4,
        "recipe": "cpu-child",
        "final_recipe": "cpu-final",
    }

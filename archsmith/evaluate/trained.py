"""Evaluation by training: build the network of a trial, train it by a recipe, score it on held-out data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import seed_of
from archsmith.cost import count, peak_activation_bytes, weight_bytes
from archsmith.evaluate.base import WeightStore
from archsmith.space import Architecture, Result, Space, Trial
from archsmith.tasks.base import Task
from archsmith.train.compute import Compute, resolve_device
from archsmith.train.loop import Diverged
from archsmith.train.recipe import Training, TrainingRecipe, result_weights

COSTS = ("macs", "params", "memory")
"""Exact costs of one image; "memory" is weights and peak activations in bytes and takes longest to count."""

INHERITED_EXAMPLES = 64
"""Training images that new layers take their statistics from."""

_OWNER = "training.network"


class BuildingFamily(Protocol):
    """What is asked of a family here."""

    @property
    def image(self) -> tuple[int, ...]:
        """Shape of one example, (C, H, W) of an image."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def space(self) -> Space:
        """The space whose points it builds."""

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
        """Return the network of an architecture, initialised from ``seed``."""


@runtime_checkable
class GrowingFamily(Protocol):
    """A family whose networks can take over the weights of smaller ones."""

    def inherit(
        self,
        weights: Mapping[str, Tensor],
        parent: Mapping[str, Any],
        child: Mapping[str, Any],
        *,
        edits: Sequence[tuple[Any, ...]] | None = None,
        examples: Tensor,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the ``state_dict`` of ``child`` made of that of ``parent``."""


class TrainedEvaluator:
    """Trains every architecture from the trial's seed and reports its validation accuracy.

    Args:
        family: Builds the networks.
        task: Its training part is learned, its validation part scored; the test part is never read.
        recipe: How; ``TrainingRecipe()`` when None.
        costs: Which of ``COSTS`` to count; an empty sequence counts none.
        device: "cpu", "cuda" or "auto".
        threads: Threads inside operators; 1 keeps workers on one machine out of each other's way. Another number
            gives other rounding.
        settings: Fields of the recipe that differ (``epochs=5``).

    **Fidelity** is a whole number of epochs, None all of the recipe's. A low fidelity is the beginning of the full
    training: the schedule is laid over ``recipe.epochs``.

    **Published values**: where the space has ``published`` (``UserHyperparams``: optimizer, lr, rate_mult, ...), these
    override the recipe.

    **Inheritance**: a trial with a parent, whose ``info`` has ``weights`` (the parent's) and ``parent_architecture``
    (as JSON), starts a new training from the parent's weights, grown to its network by the family's rule
    (``GrowingFamily``): by the edits in ``info["edits"]``, or else by those that lead from parent to child. Statistics
    of new layers are those of one training batch, at most ``INHERITED_EXAMPLES`` images as they are. The metric
    "inherited" of such a trial is 1, and 0 where the weights are not to be had: then it trains from the start.

    **Weights**: with a weight store the state of the training is kept and its key is in ``Result.weights``
    (``archsmith.train.recipe.result_weights`` picks the network's). Any other trial with a parent whose
    ``info["weights"]`` names kept weights goes on from there, also with the parent's seed, and ends as if it had never
    been left, bit for bit; where the store has nothing under that key it trains from the start.

    ``metrics``: "valid_accuracy" (a fraction) and "valid_loss" of the last epoch, with patience of the best one;
    "train_accuracy" and "train_loss" as trained over the last epoch; "epochs" trained in all. ``seconds`` is the time
    spent here. All else is determined by the trial, unless patience has a time limit.

    Example:
        >>> from archsmith.families.modules import open_family
        >>> from archsmith.tasks.catalogue import open_task
        >>> task = open_task("digits", limit=20)
        >>> family = open_family("deeparchitect", image=task.input_shape, num_classes=10, divisor=8)
        >>> evaluator = TrainedEvaluator(family, task, epochs=1)
        >>> result = evaluator.evaluate(Trial(id=1, architecture=family.smallest()))
        >>> sorted(result.costs)
        ['macs', 'memory', 'params']

    Raises:
        UserError: Family and task do not fit, a recipe that makes no sense, an unknown cost, no such device.
    """

    def __init__(
        self,
        family: BuildingFamily,
        task: Task,
        recipe: TrainingRecipe | None = None,
        *,
        costs: Sequence[str] = COSTS,
        device: str = "cpu",
        threads: int = 1,
        **settings: Any,
    ) -> None:
        given = (tuple(family.image), family.num_classes)
        if given != (tuple(task.input_shape), task.num_classes):
            raise UserError(
                "family",
                Shown(f"networks for images {given[0]} of {given[1]} classes"),
                allowed=f"images {tuple(task.input_shape)} and {task.num_classes} classes, as the task has them",
            )
        if unknown := [name for name in costs if name not in COSTS]:
            raise UserError("costs", unknown, allowed=f"some of {list(COSTS)}")
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise UserError("threads", threads, allowed="an integer from 1")
        self.recipe = (recipe or TrainingRecipe()).changed(settings)
        task.steps_per_epoch(self.recipe.batch_size)
        self.family, self.task, self.costs = family, task, tuple(costs)
        self.device, self.threads = resolve_device(device), threads

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Train and score one trial.

        Args:
            trial: What to train, for how many epochs, from which seed and weights.
            weights: Where inherited weights are read and trained ones kept.

        Returns:
            The result; a failed one when training diverges or the network cannot be built, trained or exported.

        Raises:
            UserError: The architecture is not of the family's space, the fidelity is no number of epochs of the recipe,
                the inherited weights are another network's, or the family has no rule to inherit by.
            MemoryError: The process has no memory left.
        """
        architecture = self.family.space.validate(trial.architecture)
        recipe = self.recipe.with_published(_published(self.family.space, architecture))
        epochs = _epochs(trial.fidelity, recipe)
        parent = self._parent(trial)
        inherited = _inherited(trial, parent or architecture, weights)
        started = time.perf_counter()
        with _threads(self.threads):
            try:
                return self._trained(trial, architecture, parent, recipe, epochs, inherited, weights, started)
            except (UserError, MemoryError):  # whoever called knows better what to do with its process
                raise
            except Diverged as error:
                return Result.failed(f"diverged: {error}", seconds=time.perf_counter() - started)
            except Exception as error:  # whatever a candidate does is a result, see Evaluator
                reason = f"{type(error).__name__}: {error}"
                return Result.failed(reason, seconds=time.perf_counter() - started)

    def _trained(
        self,
        trial: Trial,
        architecture: Architecture,
        parent: Architecture | None,
        recipe: TrainingRecipe,
        epochs: int,
        inherited: dict[str, Tensor] | None,
        weights: WeightStore | None,
        started: float,
    ) -> Result:
        compute = Compute(device=torch.device(self.device))
        network = self.family.build(architecture, seed=trial.seed)
        if parent is not None and inherited is not None:
            network.load_state_dict(self._grown(trial, architecture, parent, inherited))
        training = Training(network, self.task, recipe, seed=trial.seed, compute=compute)
        if parent is None and inherited is not None:
            training.load(inherited)
        training.run(epochs)
        kept = None if weights is None else weights.put({**training.state(), _OWNER: _owner(architecture)})
        scores = training.finish()
        metrics = {
            "valid_accuracy": scores[self.task.metric],
            "valid_loss": scores["loss"],
            "train_accuracy": training.train["accuracy"],
            "train_loss": training.train["loss"],
            "epochs": training.epochs,
        }
        if parent is not None:
            metrics["inherited"] = float(inherited is not None)
        if not math.isfinite(metrics["valid_loss"]):
            return Result.failed(
                f"the validation loss is {metrics['valid_loss']}", seconds=time.perf_counter() - started
            )
        costs = self.exact_costs(architecture)
        return Result(metrics=metrics, costs=costs, seconds=time.perf_counter() - started, weights=kept)

    def _parent(self, trial: Trial) -> Architecture | None:
        """Return the architecture whose weights a trial grows from, None where it does not."""
        data = trial.info.get("parent_architecture")
        if data is None:
            return None
        if not isinstance(self.family, GrowingFamily):
            raise UserError(
                "trial.info['parent_architecture']",
                Shown(f"a parent to inherit from, in the family {type(self.family).__name__}"),
                allowed="families with a method inherit, such as PlainFamily or DenseFamily",
            )
        return self.family.space.validate(Architecture.from_json(data))

    def _grown(
        self, trial: Trial, architecture: Architecture, parent: Architecture, inherited: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(self.family, GrowingFamily)
        size = min(INHERITED_EXAMPLES, self.task.size("train"))
        batch = next(iter(self.task.batches("train", batch_size=size, seed=trial.seed)))
        return self.family.inherit(
            result_weights(inherited),
            parent,
            architecture,
            edits=trial.info.get("edits"),
            examples=batch.inputs,
            generator=torch.Generator().manual_seed(seed_of(trial.seed, "inherit")),
        )

    def exact_costs(self, architecture: Architecture) -> dict[str, float]:
        """Return the costs that this evaluator counts, of one image; nothing is computed."""
        if not self.costs:
            return {}
        with torch.device("meta"):
            network, example = self.family.build(architecture), torch.zeros(1, *self.family.image)
        costs: dict[str, float] = {}
        if "memory" in self.costs:
            costs["memory"] = peak_activation_bytes(network, example) + weight_bytes(network)
        if {"macs", "params"} & set(self.costs):
            counted = count(network, example)
            costs |= {"macs": counted.macs, "params": counted.params}
        return {name: costs[name] for name in self.costs}


def _published(space: Space, architecture: Architecture) -> Mapping[str, Any]:
    publish: Callable[[Architecture], Mapping[str, Any]] | None = getattr(space, "published", None)
    return {} if publish is None else publish(architecture)


def _epochs(fidelity: float | None, recipe: TrainingRecipe) -> int:
    if fidelity is None:
        return recipe.epochs
    if not float(fidelity).is_integer() or not 1 <= fidelity <= recipe.epochs:
        raise UserError(
            "trial.fidelity", fidelity, allowed=f"a whole number of epochs from 1 to {recipe.epochs}, or None for all"
        )
    return int(fidelity)


def _inherited(trial: Trial, owner_architecture: Architecture, weights: WeightStore | None) -> dict[str, Tensor] | None:
    """Return the tensors that a trial goes on or grows from, None to train from the start."""
    key = trial.info.get("weights")
    if weights is None or trial.parent is None or key is None:
        return None
    try:
        tensors = weights.get(str(key))
    except KeyError:
        return None
    owner = tensors.get(_OWNER)
    if owner is None or not torch.equal(owner, _owner(owner_architecture)):
        raise UserError(
            "trial.info['weights']",
            Shown(f"{key}, the weights of another network"),
            allowed="weights that a TrainedEvaluator kept of the same network",
        )
    return tensors


def _owner(architecture: Architecture) -> Tensor:
    """Return the digest of a network as a tensor, to be kept with its weights."""
    return torch.tensor(list(bytes.fromhex(architecture.network_digest)), dtype=torch.uint8)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""``archsmith shrink``: the user's own network, trained, cut to a budget while training, and trained on.

Three phases, each as long as its setting says (none of it may be zero epochs but the second):

1. *before*: ordinary training at full width, for networks that come without trained weights;
2. *shrink*: constant learning rate, a ``Shrinker`` in the loop; when it ends the budget holds;
3. *after*: training of the small network, from the weights it has or from new ones.

The method here is the plain one: a score and a schedule. Published systems of kind "shrink" (``archsmith.methods``)
change the settings, and what stands in their papers besides.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from archsmith.atoms.gate_cost import Resource
from archsmith.atoms.gates import GateOptions
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.records import record
from archsmith.atoms.shrinker import CutEvent, ScoreKind, Shrinker
from archsmith.atoms.unit_budget import CutSchedule, Order, ScheduleKind
from archsmith.core.errors import UserError
from archsmith.run.drive import Delivered, Monitor
from archsmith.run.own_model import OwnCosts, OwnModel
from archsmith.run.plain_state import joined_state, split_state
from archsmith.space import Architecture
from archsmith.tasks.base import Task
from archsmith.train.layout import use_memory_format_
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.optim import decay_groups
from archsmith.train.schedules import annealed
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

SYSTEM = {"slug": "shrink", "title": "Cut a network of your own by scores", "kind": "shrink"}

TASK_OPTIONS: dict[str, Any] = {}


class Settings(BaseModel):
    """Hyper-parameters of ``archsmith shrink``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs_before: int = Field(10, ge=0, description="epochs at full width; 0 when trained weights are given")
    epochs_shrink: int = Field(5, ge=1, description="epochs in which it is cut")
    epochs_after: int = Field(10, ge=0, description="epochs of the small network")
    batch_size: int = Field(64, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0, description="peak rate of training before and of retraining from scratch")
    lr_shrink: float = Field(0.01, gt=0, description="constant rate while cutting")
    lr_after: float = Field(0.02, gt=0, description="peak rate of training on with inherited weights")
    weight_decay: float = Field(5e-4, ge=0)
    score: ScoreKind = "scale"
    order: Order = "share_per_cost"
    schedule: ScheduleKind = "cubic"
    cuts: int = Field(5, ge=1, description="number of cuts of a gradual schedule")
    penalty: float | None = Field(None, ge=0, description="of scales or gates, see Shrinker; None for its default")
    divisor: int = Field(1, ge=1, description="widths are multiples of it")
    minimum: int = Field(1, ge=1, description="fewest units of a group")
    retrain: Literal["inherit", "scratch"] = "inherit"
    tau: float = Field(0.1, gt=0, description="temperature of stochastic gates")
    annealing: float | None = Field(None, gt=0)
    straight_through: bool = False
    log_odds: float = 2.5
    soft_inference: bool = True
    keep_first: bool = True
    gate_lr: float | None = Field(None, gt=0)
    resource: Resource = "flops"


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size; one for all."""
    return {}


Phase = Literal["before", "shrink", "after"]


class Searcher:
    """One run of ``archsmith shrink``; the contract is ``archsmith.run.drive.Searcher``.

    Args:
        model: Makes the network.
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs and budget.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".
    """

    def __init__(
        self,
        *,
        model: OwnModel,
        task: Task,
        settings: Settings,
        costs: OwnCosts,
        seed: int,
        memory_format: Literal["channels_last", "contiguous"] = "channels_last",
    ) -> None:
        self.model, self.task, self.settings, self.costs, self.seed = model, task, settings, costs, seed
        self.format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.steps = task.steps_per_epoch(settings.batch_size)
        self.position = Position()
        self.network = self._laid_out(model.build())
        self.optimizer = self._new_optimizer()
        self.shrinker: Shrinker | None = None
        self.figures: dict[str, float] = {}
        self.cuts: list[CutEvent] = []

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        s = self.settings
        return s.epochs_before + s.epochs_shrink + s.epochs_after

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.position.epoch >= self.epochs

    @property
    def phase(self) -> Phase:
        """The phase of the present epoch."""
        s = self.settings
        if self.position.epoch < s.epochs_before:
            return "before"
        return "shrink" if self.position.epoch < s.epochs_before + s.epochs_shrink else "after"

    def advance(self, monitor: Monitor) -> dict[str, Any] | None:
        """Go on to the end of an epoch and return its figures, or None when the monitor asked to stop before."""
        phase = self.phase
        if phase == "shrink" and self.shrinker is None:
            self._begin_shrinking()
        cuts: list[CutEvent] = []

        def after_step(rate: float) -> None:
            if phase == "shrink" and self.shrinker is not None and self.shrinker.step():
                cuts.append(self.shrinker.history[-1])

        def on_step(position: Position, loss: float) -> None:
            monitor.step(position.total, loss=loss, accuracy=position.means().get("accuracy", 0.0))

        hooks = LoopHooks(rate=self.rate, after_step=after_step, on_step=on_step, should_stop=monitor.should_stop)
        complete = train_epoch(
            self.network,
            self.optimizer,
            self.task,
            self.position,
            hooks,
            batch_size=self.settings.batch_size,
            seed=self.seed,
            memory_format=self.format,
        )
        self.cuts += cuts
        return self._end_epoch(phase) if complete else None

    def rate(self, step: int) -> float:
        """Return the learning rate after ``step`` steps of the whole run."""
        s, epoch = self.settings, step // self.steps
        if epoch < s.epochs_before:
            return annealed(step, peak=s.lr, total=s.epochs_before * self.steps, warmup=self.steps, shape="cosine")
        first = s.epochs_before + s.epochs_shrink
        if epoch < first:
            return s.lr_shrink
        peak = s.lr if s.retrain == "scratch" else s.lr_after
        warmup = self.steps if s.retrain == "scratch" else 0
        return annealed(
            step - first * self.steps, peak=peak, total=s.epochs_after * self.steps, warmup=warmup, shape="cosine"
        )

    def _laid_out(self, network: nn.Module) -> nn.Module:
        use_memory_format_(network, self.format)
        return network

    def _new_optimizer(self) -> torch.optim.Optimizer:
        groups = decay_groups(self.network, self.settings.weight_decay)
        if self.settings.optimizer == "sgd":
            return torch.optim.SGD(groups, self.settings.lr, momentum=0.9)
        return torch.optim.AdamW(groups, self.settings.lr)

    # ------------------------------------------------------------------ the phases

    def _begin_shrinking(self) -> None:
        self.figures["accuracy_before"] = float(self._scores(self.network)["accuracy"])
        self.shrinker = self._new_shrinker()

    def _cut_schedule(self) -> CutSchedule:
        """Return when cuts are made, in steps of the second phase."""
        s = self.settings
        end = s.epochs_shrink * self.steps
        every = max(1, end // s.cuts)
        return CutSchedule(kind=s.schedule, begin=max(1, end - (s.cuts - 1) * every), end=end, every=every)

    def _new_shrinker(self) -> Shrinker:
        s = self.settings
        return Shrinker(
            self.costs.find(self.network),
            self.optimizer,
            self.costs.budget_text or None,
            score=s.score,
            schedule=self._cut_schedule(),
            penalty=s.penalty,
            order=s.order,
            seed=self.seed,
            gate_lr=s.gate_lr,
            gates=GateOptions(
                log_odds=s.log_odds,
                tau=s.tau,
                annealing=s.annealing,
                straight_through=s.straight_through,
                soft_inference=s.soft_inference,
                keep_first=s.keep_first,
            ),
            resource=s.resource,
            measure=self.costs.measure,
        )

    def _end_epoch(self, phase: Phase) -> dict[str, Any]:
        training = self.position.means()
        removed = sum(sum(event.removed.values()) for event in self.cuts)
        last = (
            phase == "shrink" and self.position.epoch + 1 == self.settings.epochs_before + self.settings.epochs_shrink
        )
        if last:
            assert self.shrinker is not None
            if self.shrinker.finish():  # nothing is left to do unless the schedule was cut short
                removed += sum(self.shrinker.history[-1].removed.values())
        scores = self._scores(self.network)
        counts = self.shrinker.cost() if self.shrinker is not None else self.costs.largest
        if last:
            self.figures["accuracy_after_cut"] = float(scores["accuracy"])
            if self.settings.retrain == "scratch" and self.settings.epochs_after:
                self.network = self._laid_out(self.model.initialised(record(self.network)))
                self.optimizer = self._new_optimizer()
        figures: dict[str, Any] = {
            "epoch": self.position.epoch,
            "phase": phase,
            "loss": training["loss"],
            "train_accuracy": training.get("accuracy"),
            "valid_accuracy": scores["accuracy"],
            "valid_loss": scores["loss"],
            "macs": counts["macs"],
            "params": counts["params"],
            "macs_fraction": counts["macs"] / self.costs.largest["macs"],
            "atoms": sum(group.size for group in (self.shrinker or self.costs.atoms).groups),
            "within_budget": phase == "after" or last or not self.costs.limits,
            "cut": {"removed": removed} if removed else None,
            **self._method_figures(phase),
        }
        self.cuts = []
        next_epoch(self.position)
        return figures

    def _method_figures(self, phase: Phase) -> dict[str, Any]:
        """Return further figures of an epoch."""
        return {"penalty": self.shrinker.penalty()} if phase == "shrink" and self.shrinker is not None else {}

    def _scores(self, network: nn.Module) -> dict[str, float | int]:
        was = network.training
        network.eval()
        scores = self.task.evaluate(network, "valid")
        network.train(was)
        return scores

    # ------------------------------------------------------------------ the result

    def deliver(self) -> Delivered:
        """Return the network as it would be delivered now: a copy within the budget.

        Before the last cut of the schedule that is what would be left if it were made now.
        """
        twin = Searcher._of(self)
        if twin.phase != "after" and twin.shrinker is None and self.costs.limits:
            twin.shrinker = twin._new_shrinker()
        if twin.shrinker is not None:
            if twin.shrinker.score == "taylor" and not twin.shrinker.has_scores:
                twin.shrinker.score = "l2"  # nothing was observed since the last cut
            with warnings.catch_warnings():
                # That nothing trains the network after the last cut is meant here: the run itself goes on.
                warnings.filterwarnings("ignore", message=r"finish\(\) after")
                twin.shrinker.finish()
        network = twin.network.eval()
        figures = {**self.figures, "accuracy_final": float(twin._scores(network)["accuracy"])}
        return Delivered(network=network.cpu(), architecture=Architecture({}, space="own"), figures=figures)

    @staticmethod
    def _of(other: Searcher) -> Searcher:
        """Return a copy of a run in its present state."""
        twin = type(other)(
            model=other.model,
            task=other.task,
            settings=other.settings,
            costs=other.costs,
            seed=other.seed,
            memory_format="channels_last" if other.format == torch.channels_last else "contiguous",
        )
        tensors, state = other.state()
        twin.load({name: tensor.clone() for name, tensor in tensors.items()}, state)
        return twin

    # ------------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs: tensors by name and plain JSON values."""
        tensors = {f"network.{name}": tensor for name, tensor in tensors_of(self.network).items()}
        tensors.update(optimizer_tensors(self.optimizer, self.network))
        shrinker = None
        if self.shrinker is not None:
            plain, own = split_state(self.shrinker.state_dict(), "shrinker")
            tensors.update(own)
            shrinker = plain
        return tensors, {
            "position": self.position.to_json(),
            "figures": dict(self.figures),
            "cuts": [asdict(event) for event in self.cuts],
            "shrinker": shrinker,
            "scratch": self.settings.retrain == "scratch" and self.settings.epochs_after > 0 and self.phase == "after",
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.position = Position(**state["position"])
        self.figures = dict(state["figures"])
        self.cuts = [CutEvent(**event) for event in state["cuts"]]
        if state["shrinker"] is not None:
            self.shrinker = self._new_shrinker()
            self.shrinker.load_state_dict(joined_state(state["shrinker"], tensors))
        if state["scratch"]:  # the network that is trained anew is not the one that was cut
            self.network = self._laid_out(self.model.initialised(record(self.network)))
            self.optimizer = self._new_optimizer()
        with torch.no_grad():
            for name, tensor in tensors_of(self.network).items():
                saved = tensors[f"network.{name}"]
                if saved.shape != tensor.shape:
                    raise UserError("checkpoint", name, allowed=f"a tensor of shape {tuple(tensor.shape)}")
                tensor.copy_(saved)
        load_optimizer_tensors(self.optimizer, self.network, tensors)

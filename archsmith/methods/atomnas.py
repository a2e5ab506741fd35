"""AtomNAS: channel counts and kernel sizes searched inside one ordinary training run.

Mei et al., "AtomNAS: Fine-Grained End-to-End Neural Architecture Search", ICLR 2020, arXiv 1912.09640.

The supernet is the network: inverted residual blocks that hold every kernel size at full width. Its smallest unit, the
*atom*, is one hidden channel with its own depthwise kernel. While the weights train, an L1 penalty on the normalisation
scale in front of each atom's output, weighted by the atom's MACs, drives atoms to zero; atoms that are dead in the
weights and in their moving average are cut out physically, with their optimiser state, so later epochs are faster.
There are no architecture parameters, no second loop and no retraining: at the end stands the trained, small network,
with averaged weights and recalibrated statistics.

Beyond the paper: a budget steers the penalty and is enforced by a final mask; the constant that a dead atom leaves in
evaluation mode is absorbed by the next running mean, so a cut preserves the output; widths can keep a divisor.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from archsmith.atoms.groups import tensors_of
from archsmith.atoms.penalty import ScalePenalty, Weighting, penalty_weights
from archsmith.atoms.score import Keep, alive, cost_of, fit_budget, mask_by_macs_budget, protect
from archsmith.atoms.surgery import cut_
from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.families.mobile import MobileFamily, collapse_
from archsmith.layers.mobile import MobileNet
from archsmith.run.costs import CostModel
from archsmith.run.drive import Delivered, Monitor
from archsmith.space import Architecture
from archsmith.supernet.depthwise import use_fast_depthwise_
from archsmith.tasks.base import Task
from archsmith.train.average import MovingAverage, recalibrate, rescaled_decay
from archsmith.train.compute import Compute
from archsmith.train.layout import use_memory_format_
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.noise import GAMMA, noise_or_none
from archsmith.train.optim import RMSprop, decay_groups
from archsmith.train.schedules import annealed, penalty_ramp, staircase
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

SYSTEM = {
    "slug": "atomnas",
    "title": "AtomNAS: Fine-Grained End-to-End Neural Architecture Search",
    "year": 2020,
    "arxiv": "1912.09640",
    "kind": "search",
    "aliases": [],
}


class Settings(BaseModel):
    """Hyper-parameters; the defaults are the paper's, ``preset_settings`` has shorter recipes for small images.

    Epoch counts may be fractions. ``shrink_fraction`` is relative to the supernet's MACs: the paper's trigger is 1e6 of
    1,521,035,776. ``cuts="end"`` trains the whole supernet and cuts once, after the last epoch: what shrinking during
    training is compared with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(350, ge=1)
    batch_size: int = Field(2048, ge=2)
    optimizer: Literal["rmsprop", "sgd", "adamw"] = "rmsprop"
    schedule: Literal["staircase", "linear", "cosine"] = "staircase"
    lr: float = Field(0.016, gt=0)
    lr_warmup_epochs: float = Field(5.0, ge=0)
    weight_decay: float = Field(1e-5, ge=0)
    rho: float = Field(1e-4, ge=0)
    penalty: Weighting = "macs"
    free_epochs: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(25.0, ge=0)
    threshold: float = Field(1e-3, gt=0)
    shrink_fraction: float = Field(1e6 / 1_521_035_776, ge=0)
    cuts: Literal["during", "end"] = "during"
    divisor: int = Field(1, ge=1)
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    ema_reference_batch: int = Field(4096, ge=1)
    recalibration_batches: int = Field(16, ge=1)
    recalibration_batch_size: int = Field(256, ge=2)
    gradient_noise: float = Field(0.0, ge=0, allow_inf_nan=False, description="variance at step 0, see train.noise")
    gradient_noise_decay: float = Field(GAMMA, ge=0, allow_inf_nan=False)
    budget_by: float = Field(0.5, gt=0, le=1, description="fraction of the epochs after which the budget holds")

    @model_validator(mode="after")
    def _ordered(self) -> Settings:
        if self.warmup_epochs < self.free_epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must not be below free_epochs ({self.free_epochs})")
        return self


TASK_OPTIONS = {"label_smoothing": 0.1}
"""Options of the task that belong to the paper's recipe."""

PLAINLY_DEAD = 1e-3
"""The paper's threshold: a scale below it does nothing. Short recipes use a larger one to see death coming."""

STEERING_FACTOR = 1.3
"""By how much the budget moves the penalty at the end of an epoch."""

STEERING_END = 0.8
"""Part of the way to ``budget_epoch`` at which the boundary should have arrived at zero."""

STEERING_TOLERANCE = 0.05
"""Deviation of the boundary from its plan that is left alone."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {
        "epochs": 40,
        "batch_size": 64,
        "schedule": "linear",
        "lr": 0.02,
        "lr_warmup_epochs": 1.0,
        "rho": 1e-3,
        "warmup_epochs": 4.0,
        "threshold": 1e-2,
        "ema_decay": 0.99,
        "ema_reference_batch": 64,
        "recalibration_batches": 8,
        "recalibration_batch_size": 128,
    },
    "tiny": {
        "epochs": 30,
        "batch_size": 64,
        "schedule": "linear",
        "lr": 0.03,
        "lr_warmup_epochs": 2.0,
        "rho": 1.5e-3,
        "warmup_epochs": 4.0,
        "threshold": 1e-2,
        "ema_decay": 0.98,
        "ema_reference_batch": 64,
        "recalibration_batches": 4,
        "recalibration_batch_size": 256,
    },
}


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, "small" below 96, else the paper's."""
    size = min(image[1:])
    return PRESETS["tiny" if size < 24 else "small" if size < 96 else "paper"]


def _make_optimizer(
    name: Literal["rmsprop", "sgd", "adamw"], groups: list[dict[str, Any]], lr: float
) -> torch.optim.Optimizer:
    if name == "rmsprop":
        return RMSprop(groups, lr)
    return torch.optim.SGD(groups, lr, momentum=0.9) if name == "sgd" else torch.optim.AdamW(groups, lr)


class Searcher:
    """One AtomNAS run: trains, shrinks and ends as the delivered network.

    Args:
        family: The supernet's family, without squeeze-and-excitation (it would couple the atoms; the paper's A+/B+/C+
            are the found cells, trained anew).
        task: What is learned.
        settings: Hyper-parameters.
        costs: Exact and measured costs, with the resolved budget.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".
        architecture: Train this point of the space, with the same recipe and without searching: a baseline.
        compute: Processes, micro-batches, device and precision of the training steps. All processes hold the same
            network; what is decided (masks, the penalty's pressure) is decided by the first one.

    Raises:
        UserError: The supernet couples its atoms, or the given architecture is above the budget.
    """

    def __init__(
        self,
        *,
        family: MobileFamily,
        task: Task,
        settings: Settings,
        costs: CostModel,
        seed: int,
        memory_format: Literal["channels_last", "contiguous"] = "channels_last",
        architecture: Architecture | None = None,
        compute: Compute | None = None,
    ) -> None:
        if family.squeeze_ratio:
            raise UserError(
                "family.squeeze_ratio",
                family.squeeze_ratio,
                allowed="0 while searching",
                hint="Squeeze-and-excitation couples the atoms; search without it, then train the found cells with it.",
            )
        self.family, self.task, self.settings, self.costs, self.seed = family, task, settings, costs, seed
        self.format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.compute = compute or Compute()
        self.compute.check_batch_size(settings.batch_size)
        self.steps = task.steps_per_epoch(settings.batch_size)
        self.position = Position()
        self.pressure = 1.0  # factor on rho, moved by the budget
        self.fixed = architecture is not None
        self.budget_met = self.fixed  # no penalty any more
        supernet = family.build(architecture or family.largest(), seed=seed_of(seed, "weights"))
        everything = family.atoms(supernet)
        self.penalty_weights = penalty_weights(everything, settings.penalty)
        self.trigger = settings.shrink_fraction * (everything.cost("macs") + costs.base["macs"])
        self._adopt(supernet)
        if self.fixed and not costs.fits(self.atoms, self._everything()):
            raise UserError("architecture", architecture, allowed=f"one within the budget {costs.budget_text}")
        if costs.additive and not self.fixed:
            self._fitted(self._everything())  # a divisor may put the budget out of reach: say so before training

    def _adopt(self, network: MobileNet) -> None:
        """Make ``network`` the one that is trained, with a fresh optimiser and average."""
        s = self.settings
        network.to(self.compute.device)
        use_memory_format_(network, self.format)
        if self.format == torch.channels_last:
            use_fast_depthwise_(network)
        self.network = network
        self.forward = self.compute.forward(network)
        self.average = MovingAverage(network, rescaled_decay(s.ema_decay, s.batch_size, s.ema_reference_batch))
        groups = decay_groups(network, s.weight_decay)
        self.optimizer = _make_optimizer(s.optimizer, groups, s.lr)
        self.atoms = self.family.atoms(network)
        self.penalty = ScalePenalty(self.penalty_weights, self._scales())

    def _scales(self) -> dict[str, Tensor]:
        named = tensors_of(self.network)
        return {group.name: named[group.scale] for group in self.atoms}

    # ------------------------------------------------------------------ schedules

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return self.settings.epochs

    @property
    def budget_epoch(self) -> int:
        """Epoch after which the network is within the budget."""
        return max(1, round(self.settings.budget_by * self.epochs))

    def rate(self, step: int) -> float:
        """Return the learning rate after ``step`` steps."""
        s = self.settings
        if s.schedule == "staircase":
            return staircase(
                step,
                base=s.lr,
                batch_size=s.batch_size,
                steps_per_epoch=self.steps,
                warmup_epochs=s.lr_warmup_epochs,
            )
        warmup = round(s.lr_warmup_epochs * self.steps)
        return annealed(step, peak=s.lr, total=s.epochs * self.steps, warmup=warmup, shape=s.schedule)

    def rho(self, step: int) -> float:
        """Return the penalty strength after ``step`` steps: the ramp times the budget's pressure."""
        if self.budget_met:
            return 0.0
        s = self.settings
        return self.pressure * penalty_ramp(
            step,
            strength=s.rho,
            steps_per_epoch=self.steps,
            free_epochs=s.free_epochs,
            warmup_epochs=s.warmup_epochs,
        )

    # ------------------------------------------------------------------ training

    @property
    def done(self) -> bool:
        """Whether all epochs are done."""
        return self.position.epoch >= self.epochs

    def advance(self, monitor: Monitor) -> dict[str, Any] | None:
        """Train to the end of the present epoch; return its figures, or None when the monitor asked to stop before."""

        def after_backward() -> None:
            if self.settings.optimizer != "adamw":
                self.penalty.add_gradient_(self.rho(self.position.total))

        def after_step(rate: float) -> None:
            if self.settings.optimizer == "adamw":  # it would normalise the gradient of the penalty away
                self.penalty.proximal_step_(rate * self.rho(self.position.total))

        def on_step(position: Position, loss: float) -> None:
            if not self.budget_met and self.costs.additive:
                self.budget_met = self._within_budget(self._alive())
            monitor.step(position.total, loss=loss, accuracy=position.means().get("accuracy", 0.0))

        hooks = LoopHooks(
            rate=self.rate,
            after_backward=after_backward,
            after_step=after_step,
            on_step=on_step,
            should_stop=monitor.should_stop,
            noise=noise_or_none(self.settings.gradient_noise, self.settings.gradient_noise_decay, self.seed),
        )
        complete = train_epoch(
            self.network,
            self.optimizer,
            self.task,
            self.position,
            hooks,
            batch_size=self.settings.batch_size,
            seed=self.seed,
            average=self.average,
            memory_format=self.format,
            compute=self.compute,
            forward=self.forward,
        )
        return self._end_epoch() if complete else None

    def _end_epoch(self) -> dict[str, Any]:
        """Steer the penalty, shrink, recalibrate a copy, validate it."""
        training = self.position.means()
        last = self.position.epoch + 1 == self.epochs
        rho = self.rho(self.position.total)
        self._steer()
        cut = self._shrink(last=last)
        network = self._recalibrated(self.average.averaged_copy(self.network), self.position.epoch)
        scores, within_budget = self.compute.workers.from_main(
            lambda: (
                self.task.evaluate(self.compute.evaluating(network), "valid"),
                self.costs.fits(self.atoms, self._everything()),
            )
        )
        macs = self.costs.base["macs"] + self.atoms.cost("macs")
        figures = {
            "epoch": self.position.epoch,
            "loss": training["loss"],
            "train_accuracy": training.get("accuracy"),
            "valid_accuracy": scores["accuracy"],
            "valid_loss": scores["loss"],
            "macs": macs,
            "macs_fraction": macs / self.costs.largest["macs"],
            "atoms": len(self.atoms),
            "rho": rho,
            "within_budget": within_budget,
            "cut": cut,
            "kernels": {group.name: group.size for group in self.atoms},
        }
        next_epoch(self.position)
        return figures

    # ------------------------------------------------------------------ shrinking

    def _averages(self) -> dict[str, Tensor]:
        return {group.name: self.average.tensors[group.scale].cpu() for group in self.atoms}

    def _everything(self) -> Keep:
        return {group.name: torch.ones(group.size, dtype=torch.bool) for group in self.atoms}

    def _alive(self, *, average_alone: bool = True) -> Keep:
        """Return the living atoms, with every block's minimum and the divisor respected."""
        averages = self._averages()
        raw = {name: scale.detach().cpu() for name, scale in self.penalty.scales.items()}
        # Once the budget is met there is room for every atom that does anything: only what is plainly dead still goes.
        threshold = min(self.settings.threshold, PLAINLY_DEAD) if self.budget_met else self.settings.threshold
        keep = alive(raw, averages, threshold, average_alone=average_alone)
        return protect(self.atoms, keep, averages, divisor=self.settings.divisor)

    def _within_budget(self, keep: Keep) -> bool:
        return bool(self.costs.limits) and self.costs.fits(self.atoms, keep)

    def _steer(self) -> None:
        """Move the pressure so that the network is on its way to the budget; let go when the budget is met.

        All scales start at 1 and are pulled down by a constant force, so atoms die in numbers when they arrive at the
        threshold; counting the living would tell too late. What is steered is the *boundary*: the scale below which lie
        as many MACs as must go. It has to come down from 1 to 0 on a line that ends shortly before ``budget_epoch``.
        """
        if self.costs.limits and not self.budget_met:
            self.pressure, self.budget_met = self.compute.workers.from_main(self._steered)

    def _steered(self) -> tuple[float, bool]:
        """Return the new pressure and whether the budget is met."""
        if self._within_budget(self._alive()):
            return self.pressure, True
        averages = self._averages()
        excess = (
            self.costs.base["macs"] + self.atoms.cost("macs") - self.costs.target_fraction * self.costs.largest["macs"]
        )
        _, boundary, _ = mask_by_macs_budget(
            [averages[group.name] for group in self.atoms], [group.cost["macs"] for group in self.atoms], excess
        )
        start, end = self.settings.free_epochs, STEERING_END * self.budget_epoch
        now = self.position.epoch + 1
        planned = max(0.0, 1.0 - (now - start) / max(1.0, end - start))
        if now >= self.settings.warmup_epochs and abs(boundary - planned) > STEERING_TOLERANCE:
            factor = STEERING_FACTOR if boundary > planned else 1.0 / STEERING_FACTOR
            return min(64.0, max(0.5, self.pressure * factor)), False
        return self.pressure, False

    def _shrink(self, *, last: bool) -> dict[str, Any] | None:
        """Cut dead atoms when they are worth it, and what the budget demands when its time has come."""
        if self.fixed or (self.settings.cuts == "end" and not last):
            return None
        keep, living, self.budget_met = self.compute.workers.from_main(lambda: self._chosen(last))
        self.compute.workers.require_equal("the masks of a cut", _content(keep))
        if all(bool(mask.all()) for mask in keep.values()):
            return None
        report = cut_(
            self.network, self.atoms, keep, collapse=collapse_, optimizer=self.optimizer, tables=[self.average.tensors]
        )
        self.atoms = self.family.atoms(self.network)
        self.penalty.follow(self._scales())
        self.forward = self.compute.forward(self.network)
        return {
            "removed": sum(report.removed.values()),
            "forced": max(0, living - _size(keep)),  # alive, but the budget had no room for them
            "dead_blocks": report.dead_blocks,
        }

    def _chosen(self, last: bool) -> tuple[Keep, int, bool]:
        """Return what stays, how many atoms are alive, and whether the budget is met after it."""
        keep = self._alive(average_alone=last)
        living, budget_met = _size(keep), self.budget_met
        dead = self.atoms.cost("macs") - cost_of(self.atoms, self._alive(), "macs")
        if not (last or dead >= self.trigger > 0 or (self.trigger == 0 and dead > 0)):
            keep = self._everything()
        if self.costs.limits and (last or self.position.epoch + 1 >= self.budget_epoch):
            keep = self._fitted(keep)
            budget_met = True
        return keep, living, budget_met

    def _fitted(self, keep: Keep) -> Keep:
        """Return ``keep`` without the atoms of smallest averaged scale that the budget has no room for."""
        fitted = fit_budget(
            self.atoms,
            self._averages(),
            lambda mask: self._within_budget(mask),
            keep=keep,
            divisor=self.settings.divisor,
        )
        if fitted is None:
            raise UserError(
                "budget",
                self.costs.budget_text,
                allowed=f"what a network of this family with divisor {self.settings.divisor} can reach",
                hint="Even with every removable atom cut the network is above it: raise the budget or use divisor 1.",
            )
        return fitted

    # ------------------------------------------------------------------ the result

    def deliver(self) -> Delivered:
        """Return the network as it would be delivered now: averaged, within the budget, recalibrated; a copy."""
        network = self.average.averaged_copy(self.network)
        workers = self.compute.workers
        keep, figures = workers.from_main(self._affordable)
        workers.require_equal("the masks of the delivered network", _content(keep))
        if not all(bool(mask.all()) for mask in keep.values()):
            cut_(network, self.atoms, keep, collapse=collapse_)
        network.eval()
        running = workers.from_main(lambda: self.task.evaluate(self.compute.evaluating(network), "valid"))
        figures["valid_accuracy_running_statistics"] = float(running["accuracy"])
        epoch = max(0, self.position.epoch - (self.position.step == 0))
        delivered = self._recalibrated(network, epoch).cpu()
        return Delivered(network=delivered, architecture=self.family.architecture_of(delivered), figures=figures)

    def _affordable(self) -> tuple[Keep, dict[str, float]]:
        """Return what the budget has room for, and how many living atoms that costs when it is not everything."""
        if not self.costs.limits or self._within_budget(self._everything()):
            return self._everything(), {}
        alive_now = self._alive()
        keep = self._fitted(alive_now)
        return keep, {"forced": float(_size(alive_now) - _size(keep))}

    def _recalibrated(self, network: torch.nn.Module, epoch: int) -> MobileNet:
        assert isinstance(network, MobileNet)
        recalibrate(network, self._training_inputs(epoch), self.compute)
        return network

    def _training_inputs(self, epoch: int) -> Iterator[Tensor]:
        """Yield large batches of training images, each joined from training batches (a loader's size is its own)."""
        s = self.settings
        seed = seed_of(self.seed, "recalibrate")
        batches = self.task.batches("train", batch_size=s.batch_size, seed=seed, epoch=epoch)
        each = max(1, round(s.recalibration_batch_size / s.batch_size))
        for _ in range(s.recalibration_batches):
            joined = [batch.inputs for batch in islice(batches, each)]
            if not joined:
                return
            yield torch.cat(joined).contiguous(memory_format=self.format)

    # ------------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs: tensors by name and plain JSON values."""
        tensors = {f"network.{name}": tensor for name, tensor in tensors_of(self.network).items()}
        tensors.update({f"average.{name}": tensor for name, tensor in self.average.tensors.items()})
        tensors.update(optimizer_tensors(self.optimizer, self.network))
        return tensors, {
            "architecture": self.family.architecture_of(self.network).to_json(),
            "position": self.position.to_json(),
            "average_steps": self.average.steps,
            "pressure": self.pressure,
            "budget_met": self.budget_met,
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        self._adopt(self.family.build(Architecture.from_json(state["architecture"])))
        with torch.no_grad():
            for name, tensor in tensors_of(self.network).items():
                tensor.copy_(tensors[f"network.{name}"])
            for name, tensor in self.average.tensors.items():
                tensor.copy_(tensors[f"average.{name}"])
        load_optimizer_tensors(self.optimizer, self.network, tensors)
        self.average.steps = state["average_steps"]
        self.position = Position(**state["position"])
        self.pressure = state["pressure"]
        self.budget_met = state["budget_met"]


def _content(keep: Keep) -> bytes:
    """Return what must be the same in all processes before they cut."""
    return b"".join(name.encode() + mask.numpy().tobytes() for name, mask in sorted(keep.items()))


def _size(keep: Keep) -> int:
    """Return how many atoms a mask keeps."""
    return sum(int(mask.sum()) for mask in keep.values())

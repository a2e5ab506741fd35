"""The run that differentiable cell searches share: phases on the relaxed supernet, selection, phases on what it gave.

``RelaxedSearcher`` is a ``Searcher`` (see ``archsmith.run.drive``): it can be stopped after any step and goes on bit
for bit. A method gives it the phases and overrides what it changes: the layers, what a phase freezes, the selection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.families.darts import DartsFamily
from archsmith.families.darts_space import CELLS, Genotype, architecture_of
from archsmith.families.darts_supernet import DartsSupernet
from archsmith.layers.darts import DartsNetwork, DenseLayers
from archsmith.run.costs import CostModel
from archsmith.run.drive import Delivered, Monitor
from archsmith.space import Architecture
from archsmith.supernet.relaxed import batch_statistics, entropy
from archsmith.tasks.base import Task
from archsmith.train.auxiliary import WithAuxiliary
from archsmith.train.average import recalibrate
from archsmith.train.bilevel import BilevelStep, Order, bilevel_epoch, halves
from archsmith.train.layout import use_memory_format_
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.schedules import cosine_by_epoch
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

RECALIBRATION_BATCHES = 8
"""Training batches from which a path taken out of the supernet gets statistics of its own."""

FREE = ("skip_connect", "max_pool_3x3", "avg_pool_3x3", "none")
"""Operations without weights; a search whose cells hold little else has collapsed."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a training, with its own momentum SGD.

    Attributes:
        name: As the method calls it.
        epochs: Its length; 0 leaves it out.
        batch_size: Images of a step.
        lr: Learning rate of the first epoch; a cosine takes it to ``lr_min``.
        lr_min: See ``lr``.
        momentum: Of the optimiser.
        weight_decay: L2 on all that is trained.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        logits: Whether the architecture logits learn too (in the search).
        drop_path: Probability of dropped paths at the end of the phase, rising linearly (behind the search).
        auxiliary_weight: Weight of the auxiliary classifier's loss; 0 for none (behind the search).
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    lr_min: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip_norm: float = 5.0
    logits: bool = False
    drop_path: float = 0.0
    auxiliary_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole search.

    Attributes:
        search: Phases on the supernet.
        final: Phases on the network that was selected, from fresh weights.
        channels: Channels of the first cells of the search network.
        cells: Its cells.
        order: How the gradient of the logits is taken.
        logit_lr: Learning rate of the logits (Adam).
        logit_betas: Its decay rates.
        logit_decay: L2 on the logits.
    """

    search: tuple[Phase, ...]
    final: tuple[Phase, ...]
    channels: int
    cells: int
    order: Order = "first"
    logit_lr: float = 3e-4
    logit_betas: tuple[float, float] = (0.5, 0.999)
    logit_decay: float = 1e-3


def phase_hooks(optimizer: torch.optim.Optimizer, phase: Phase, rate: float) -> LoopHooks:
    """Return the hooks of an epoch: one learning rate, gradients clipped as the phase says."""

    def clip() -> None:
        if phase.clip_norm:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], phase.clip_norm)

    return LoopHooks(rate=lambda step: rate, after_backward=clip)


class RelaxedSearcher:
    """Search on a relaxed supernet, then training of the selected network from scratch.

    Args:
        family: Family of the final network; the search network has its cells and image size.
        task: What is learned. The search moves weights on one half of the training images and logits on the other; the
            final network learns from all of them.
        plan: Phases and sizes.
        costs: For the MACs of the present selection; the family counts them if None. It must have no limits.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".

    Attributes:
        supernet: While the search lasts, else None.
        network: The final network, once there is one, else None.
        genotype: The selection, once it is made.

    Raises:
        UserError: A budget, another family, or a task that cannot be parted.
    """

    def __init__(
        self,
        *,
        family: Any,
        task: Task,
        plan: Plan,
        costs: CostModel | None = None,
        seed: int,
        memory_format: str = "contiguous",
    ) -> None:
        if not isinstance(family, DartsFamily):
            raise UserError("family", type(family).__name__, allowed="'darts', whose cells this method searches")
        if costs is not None and costs.limits:
            raise UserError("budget", costs.budget_text, allowed="none: this method searches for accuracy alone")
        weighty = any(phase.auxiliary_weight > 0 for phase in plan.final)
        self.family = replace(family, auxiliary=weighty)
        self.small = replace(family, auxiliary=False, channels=plan.channels, cells=plan.cells)
        self.task, self.plan, self.costs, self.seed = task, plan, costs, seed
        self.phases = tuple(phase for phase in (*plan.search, *plan.final) if phase.epochs > 0)
        self._searching = sum(phase.epochs > 0 for phase in plan.search)
        if not self._searching or self._searching == len(self.phases):
            raise UserError("epochs", [p.epochs for p in (*plan.search, *plan.final)], allowed="some before and after")
        self._starts = (0, *accumulate(phase.epochs for phase in self.phases))
        self.halves = halves(task, seed_of(seed, "halves"))
        self._steps = [  # asked here, so that a batch too large for its images is refused at once
            self._learned(index).steps_per_epoch(phase.batch_size) for index, phase in enumerate(self.phases)
        ]
        self.format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.position = Position()
        self.genotype: Genotype | None = None
        self.figures: dict[str, float] = {}
        self.network: DartsNetwork | None = None
        self.supernet: DartsSupernet | None = self.small.supernet(seed=seed_of(seed, "weights"), layers=self.layers())
        use_memory_format_(self.supernet.network, self.format)
        self.logit_optimizer = torch.optim.Adam(
            self.supernet.logits.parameters(),
            lr=plan.logit_lr,
            betas=plan.logit_betas,
            weight_decay=plan.logit_decay,
        )
        self._enter(0, fresh=True)

    # ------------------------------------------------------------------ what a method may change

    def layers(self) -> DenseLayers | None:
        """Return what makes convolutions and classifier, for the supernet and again for the final network."""
        return None

    def begin_(self, network: nn.Module, phase: Phase, *, fresh: bool) -> None:
        """Freeze and set what a phase needs; here nothing, everything learns.

        Args:
            network: The supernet's network or the final one.
            phase: The phase that begins.
            fresh: False when it is only continued from a checkpoint.
        """

    def optimizer_for(self, network: nn.Module, phase: Phase) -> torch.optim.Optimizer:
        """Return the optimiser over what ``begin_`` left trainable."""
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, phase.lr, phase.momentum, weight_decay=phase.weight_decay)

    def select(self, supernet: DartsSupernet) -> Genotype:
        """Return the cells that the supernet stands for: its strongest edges."""
        return supernet.genotype()

    def finished(self, network: DartsNetwork) -> DartsNetwork:
        """Return the final network as it is handed over: a copy, ordinary layers, no auxiliary classifier."""
        plain = DartsNetwork(**{**network.constructor(), "auxiliary": False, "layers": None})
        state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("auxiliary.")}
        plain.load_state_dict(state)
        return plain

    # ------------------------------------------------------------------ position

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return self._starts[-1]

    @property
    def steps(self) -> int:
        """Mean number of steps in an epoch, rounded up."""
        total = sum(phase.epochs * steps for phase, steps in zip(self.phases, self._steps, strict=True))
        return -(-total // self.epochs)

    @property
    def done(self) -> bool:
        """Whether all phases are done."""
        return self.position.epoch >= self.epochs

    def _learned(self, index: int) -> Task:
        """Return what the weights learn from in a phase."""
        return self.halves[0] if index < self._searching else self.task

    def _enter(self, index: int, *, fresh: bool) -> None:
        self.index = index
        phase = self.phases[index]
        network = self._trained()
        self.begin_(network, phase, fresh=fresh)
        self.optimizer = self.optimizer_for(network, phase)

    def _trained(self) -> nn.Module:
        """Return the network whose weights are trained at present."""
        if self.supernet is not None:
            return self.supernet.network
        assert self.network is not None
        return self.network

    # ------------------------------------------------------------------ training

    def advance(self, monitor: Monitor) -> dict[str, Any] | None:
        """Train to the end of the present epoch; return its figures, or None when the monitor asked to stop before."""
        phase = self.phases[self.index]
        own = self.position.epoch - self._starts[self.index]
        rate = cosine_by_epoch(own, epochs=phase.epochs, peak=phase.lr, floor=phase.lr_min)

        def on_step(position: Position, loss: float) -> None:
            monitor.step(position.total, loss=loss, accuracy=position.means().get("accuracy", 0.0))

        hooks = replace(phase_hooks(self.optimizer, phase, rate), on_step=on_step, should_stop=monitor.should_stop)
        searching = self.supernet is not None
        complete = self._search_epoch(phase, rate, hooks) if searching else self._final_epoch(phase, own, hooks)
        if not complete:
            return None
        means = self.position.means()
        figures = {
            "epoch": self.position.epoch,
            "phase": phase.name,
            "loss": means["loss"],
            "train_accuracy": means.get("accuracy"),
            **(self._search_figures() if searching else self._final_figures()),
        }
        next_epoch(self.position)
        if self.position.epoch == self._starts[self.index + 1] and not self.done:
            if self.index + 1 == self._searching:
                self._derive()
            self._enter(self.index + 1, fresh=True)
        return figures

    def _search_epoch(self, phase: Phase, rate: float, hooks: LoopHooks) -> bool:
        assert self.supernet is not None
        step = BilevelStep(
            weight_task=self.halves[0],
            logit_task=self.halves[1],
            batch_size=phase.batch_size,
            seed=self.seed,
            order=self.plan.order,
            clip_norm=phase.clip_norm,
            memory_format=self.format,
        )
        return bilevel_epoch(
            self.supernet,
            self.optimizer,
            self.logit_optimizer if phase.logits else None,
            step,
            self.position,
            rate=rate,
            on_step=hooks.on_step,
            should_stop=hooks.should_stop,
        )

    def _final_epoch(self, phase: Phase, epoch: int, hooks: LoopHooks) -> bool:
        assert self.network is not None
        self.network.set_drop_path(phase.drop_path * epoch / phase.epochs)
        return train_epoch(
            self.network,
            self.optimizer,
            WithAuxiliary(self.task, self.network, phase.auxiliary_weight),
            self.position,
            hooks,
            batch_size=phase.batch_size,
            seed=self.seed,
            memory_format=self.format,
        )

    # ------------------------------------------------------------------ figures and selection

    def _search_figures(self) -> dict[str, Any]:
        """Return what the supernet says of itself; nothing that could be delivered has been trained yet."""
        assert self.supernet is not None
        scores = self._score(None)
        genotype = self.select(self.supernet)
        with torch.no_grad():
            mixing = self.supernet.mixing()
        return {
            "valid_accuracy": scores["accuracy"],
            "valid_loss": scores["loss"],
            "macs": self._macs(architecture_of(genotype)),
            "within_budget": False,  # the supernet is not what is delivered
            "entropy": {cell: float(entropy(mixing[cell])) for cell in CELLS},
            "probabilities": {cell: mixing[cell].tolist() for cell in CELLS},
            "genotype": genotype.to_json(),
            "weightless": weightless(genotype),
        }

    def _final_figures(self) -> dict[str, Any]:
        assert self.network is not None
        network = self.network.eval()
        scores = self.task.evaluate(network, "valid")
        return {
            "valid_accuracy": scores["accuracy"],
            "valid_loss": scores["loss"],
            "macs": self._macs(self.family.architecture_of(network)),
            "within_budget": self.index == len(self.phases) - 1,  # earlier phases train what is not delivered yet
        }

    def _score(self, architecture: Architecture | None) -> dict[str, float | int]:
        """Return the supernet's scores on validation images, relaxed or along one path, by batch statistics."""
        assert self.supernet is not None
        self.supernet.activate(architecture)
        with batch_statistics(self.supernet):
            scores = self.task.evaluate(self.supernet, "valid")
        self.supernet.activate(None)
        return scores

    def _macs(self, architecture: Architecture) -> int:
        costs = self.family.exact_costs(architecture) if self.costs is None else self.costs.of(architecture)
        return int(costs["macs"])

    def _derive(self) -> None:
        """Select, note what the selection costs the supernet, and build the network that is trained from scratch."""
        assert self.supernet is not None
        self.genotype = self.select(self.supernet)
        relaxed, alone = self._score(None), self._score(architecture_of(self.genotype))
        self.figures = {
            "supernet_accuracy": float(relaxed["accuracy"]),
            "selected_path_accuracy": float(alone["accuracy"]),
            "discretisation_gap": float(relaxed["accuracy"]) - float(alone["accuracy"]),
            "weightless_operations": float(sum(weightless(self.genotype).values())),
        }
        self.supernet = None
        self._build_final()

    def _build_final(self) -> None:
        assert self.genotype is not None
        seed = seed_of(self.seed, "final-weights")
        self.network = self.family.build(architecture_of(self.genotype), seed=seed, layers=self.layers())
        use_memory_format_(self.network, self.format)

    # ------------------------------------------------------------------ the result

    def deliver(self) -> Delivered:
        """Return the network as it would be delivered now; before there is a final one, a path of the supernet."""
        if self.network is not None:
            network = self.finished(self.network).eval()
            return Delivered(network, self.family.architecture_of(network), self.figures)
        assert self.supernet is not None
        architecture = architecture_of(self.select(self.supernet))
        network = self.finished_path(self.supernet, architecture)
        recalibrate(network, self._training_inputs())
        return Delivered(network, architecture, self.figures)

    def finished_path(self, supernet: DartsSupernet, architecture: Architecture) -> DartsNetwork:
        """Return a path of the supernet as a network with ordinary layers."""
        return supernet.extract(architecture)

    def _training_inputs(self) -> Iterator[Tensor]:
        seed = seed_of(self.seed, "recalibrate")
        batches = self.task.batches("train", batch_size=self.phases[self.index].batch_size, seed=seed)
        yield from (batch.inputs for batch in islice(batches, RECALIBRATION_BATCHES))

    # ------------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs: tensors by name and plain JSON values."""
        if self.supernet is not None:
            model: nn.Module = self.supernet
            tensors = {f"supernet.{name}": tensor for name, tensor in self.supernet.state_dict().items()}
            tensors.update(optimizer_tensors(self.logit_optimizer, self.supernet))
        else:
            model = self._trained()
            tensors = {f"final.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors.update(optimizer_tensors(self.optimizer, model))
        return tensors, {
            "position": self.position.to_json(),
            "phase": self.index,
            "genotype": None if self.genotype is None else self.genotype.to_json(),
            "figures": self.figures,
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.position = Position(**state["position"])
        self.figures = dict(state["figures"])
        if state["genotype"] is None:
            model: nn.Module | None = self.supernet
            prefix = "supernet."
        else:
            self.genotype = Genotype.from_json(state["genotype"])
            self.supernet = None
            self._build_final()
            model, prefix = self.network, "final."
        assert model is not None
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(tensors[prefix + name])
        self._enter(state["phase"], fresh=False)
        if self.supernet is not None:
            load_optimizer_tensors(self.logit_optimizer, model, _under(tensors, "optimizer.logits."))
            load_optimizer_tensors(self.optimizer, model, _under(tensors, "optimizer.network."))
        else:
            load_optimizer_tensors(self.optimizer, model, tensors)


def weightless(genotype: Genotype) -> dict[str, int]:
    """Return how many operations of each cell have no weights."""
    return {cell: sum(name in FREE for name, _ in getattr(genotype, cell)) for cell in CELLS}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

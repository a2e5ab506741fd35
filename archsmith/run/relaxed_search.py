"""The run that differentiable searches share: phases on the relaxed supernet, selection, phases on what it gave.

``RelaxedSearcher`` is a ``Searcher`` (see ``archsmith.run.drive``): it can be stopped after any step and goes on bit
for bit. A method gives it the phases and overrides what it changes: the relaxation, the edges, the updater, what a
phase freezes, the selection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, islice
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.families import relaxable_families
from archsmith.run.costs import CostModel
from archsmith.run.drive import Delivered, Monitor
from archsmith.run.perturbed_selection import PerturbedSelection
from archsmith.run.relaxed_settings import Phase, Plan, RelaxedSettings, plan_of
from archsmith.space import Architecture
from archsmith.supernet.expected import CandidateMacs
from archsmith.supernet.mixed import Relaxation
from archsmith.supernet.relaxed import MakeEdge, SearchSupernet, batch_statistics, entropy
from archsmith.tasks.base import Task
from archsmith.train.auxiliary import AuxiliaryNetwork, WithAuxiliary
from archsmith.train.average import recalibrate
from archsmith.train.bilevel import Bilevel, BilevelStep, Updater, bilevel_epoch, halves
from archsmith.train.layout import use_memory_format_
from archsmith.train.loop import LoopHooks, Position, next_epoch, train_epoch
from archsmith.train.noise import AnnealedNoise
from archsmith.train.schedules import cosine_by_epoch
from archsmith.train.smoothed import Smoothed
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

S = TypeVar("S", bound=RelaxedSettings)

RECALIBRATION_BATCHES = 8
"""Training batches from which a path taken out of the supernet gets statistics of its own."""

UPDATER = "updater."
"""Prefix of the updater's tensors in a checkpoint."""


@runtime_checkable
class DropsPaths(Protocol):
    """A network that can drop paths while it trains."""

    def set_drop_path(self, probability: float) -> None:
        """Set the probability."""


@runtime_checkable
class RelaxableFamily(Protocol):
    """A family whose choices can be relaxed."""

    def relaxed(self, **options: Any) -> SearchSupernet:
        """Return the supernet; options are ``seed``, ``relaxation``, and those of the hooks that a method overrides."""

    def search_form(self, channels: int, cells: int) -> Any:
        """Return the family of the search network; one without a smaller form returns itself."""

    def final_form(self, *, auxiliary: bool) -> Any:
        """Return the family of the final network, with an auxiliary classifier where it can have one."""


def phase_hooks(optimizer: torch.optim.Optimizer, phase: Phase, rate: float) -> LoopHooks:
    """Return the hooks of an epoch: one learning rate, gradients clipped as the phase says."""

    def clip() -> None:
        if phase.clip_norm:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], phase.clip_norm)

    return LoopHooks(rate=lambda step: rate, after_backward=clip)


class RelaxedSearcher:
    """Search on a relaxed supernet, then training of the selected network from scratch.

    Args:
        family: Family of the final network; the search network is its ``search_form``.
        task: What is learned. The search moves weights on one half of the training images and logits on the other; the
            final network learns from all of them.
        plan: Phases and sizes.
        costs: For the MACs of the present selection; the family counts them if None. It must have no limits.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".

    Attributes:
        supernet: While the search lasts, else None.
        network: The final network, once there is one, else None.
        chosen: The selection, once it is made.

    Raises:
        UserError: A budget, a family without a relaxed supernet, or a task that cannot be parted.
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
        if not isinstance(family, RelaxableFamily):
            names = " or ".join(map(repr, relaxable_families()))
            raise UserError("family", type(family).__name__, allowed=f"{names}, whose choices can be relaxed")
        if costs is not None and costs.limits:
            raise UserError("budget", costs.budget_text, allowed="none: this method searches for accuracy alone")
        self.family: Any = family.final_form(auxiliary=any(phase.auxiliary_weight > 0 for phase in plan.final))
        self.small: Any = family.search_form(plan.channels, plan.cells)
        self.task, self.plan, self.costs, self.seed = task, plan, costs, seed
        self.halves = self.parts(task, seed_of(seed, "halves"))
        self.supernet: SearchSupernet | None = self.small.relaxed(
            seed=seed_of(seed, "weights"), **self.supernet_options()
        )
        self.selection: PerturbedSelection | None = None
        search = plan.search
        if plan.perturbation is not None:
            self.selection = PerturbedSelection(self.supernet, plan.perturbation, self.halves[1], seed=seed)
            search = (*search, self.selection.phase)
        self.phases = tuple(phase for phase in (*search, *plan.final) if phase.epochs > 0)
        self._searching = sum(phase.epochs > 0 for phase in search)
        if not self._searching or self._searching == len(self.phases):
            raise UserError("epochs", [p.epochs for p in (*plan.search, *plan.final)], allowed="some before and after")
        self._lengths = [phase.epochs for phase in self.phases]
        self._steps = [  # asked here, so that a batch too large for its images is refused at once
            self._learned(index).steps_per_epoch(phase.batch_size) for index, phase in enumerate(self.phases)
        ]
        self.format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.position = Position()
        self.chosen: Architecture | None = None
        self.figures: dict[str, float] = {}
        self.network: nn.Module | None = None
        use_memory_format_(self.supernet.network, self.format)
        self.logit_optimizer = self.logit_optimizer_for(list(self.supernet.logits.parameters()))
        self.updater = self.make_updater()
        if plan.smoothing is not None and not isinstance(self.updater, Smoothed):
            raise UserError(
                "smoothing", plan.smoothing.kind, allowed="'none' for this method, whose step is not that of DARTS"
            )
        self._expected: CandidateMacs | None = None
        self._enter(0, fresh=True)

    # ------------------------------------------------------------------ what a method may change

    def relaxation(self) -> Relaxation | None:
        """Return how logits become mixing weights; the softmax if None."""
        return None

    def make_edge(self) -> MakeEdge | None:
        """Return what makes an edge of its candidates; an ordinary mixed operation if None."""
        return None

    def layers(self) -> Any:
        """Return what makes convolutions and classifier, for supernet and final network; ordinary ones if None."""
        return None

    edge_weights = False
    """Whether the edges of a node are weighted against each other."""

    def parts(self, task: Task, seed: int) -> tuple[Task, Task]:
        """Return what the weights and what the logits learn from in the search; the first one's valid part judges it.

        Args:
            task: What is learned.
            seed: Names the parts.
        """
        return halves(task, seed)

    def make_updater(self) -> Updater:
        """Return what a step of the search does."""
        smoothing = self.plan.smoothing
        if smoothing is None:
            return Bilevel(self.plan.order)
        epochs = sum(phase.epochs for phase in self.plan.search)
        return Smoothed(self.plan.order, kind=smoothing.kind, epochs=epochs, start=smoothing.start, end=smoothing.end)

    def begin_(self, network: nn.Module, phase: Phase, *, fresh: bool) -> None:
        """Freeze and set what a phase needs; here nothing, everything learns.

        Args:
            network: The supernet's network or the final one.
            phase: The phase that begins.
            fresh: False when it is only continued from a checkpoint.
        """

    def begin_epoch_(self, phase: Phase, epoch: int) -> None:
        """Set what changes with an epoch (from 0) of a phase; called again when a run goes on within the epoch."""

    def end_epoch_(self, phase: Phase, epoch: int, figures: dict[str, Any]) -> bool:
        """Take in the figures of an epoch (from 0) of a phase, add to them; return True to end the phase with it.

        Whatever this keeps belongs into ``state``. A phase ends after its ``epochs`` at the latest.
        """
        return False

    def rate(self, phase: Phase, epoch: int) -> float:
        """Return the learning rate of an epoch (from 0) of a phase."""
        if phase.schedule == "constant":
            return phase.lr
        return cosine_by_epoch(epoch, epochs=phase.epochs, peak=phase.lr, floor=phase.lr_min)

    def optimizer_for(self, network: nn.Module, phase: Phase) -> torch.optim.Optimizer:
        """Return the optimiser over what ``begin_`` left trainable."""
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, phase.lr, phase.momentum, weight_decay=phase.weight_decay)

    def logit_optimizer_for(self, logits: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of the logits."""
        plan = self.plan
        return torch.optim.Adam(logits, lr=plan.logit_lr, betas=plan.logit_betas, weight_decay=plan.logit_decay)

    def select(self, supernet: SearchSupernet) -> Architecture:
        """Return the architecture that the supernet stands for: its strongest edges and operations."""
        return supernet.derive()

    def finished(self, network: nn.Module) -> nn.Module:
        """Return the final network as it is handed over: a copy, without what only its training needs."""
        plain = self.family.final_form(auxiliary=False).build(self.family.architecture_of(network))
        state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("auxiliary.")}
        plain.load_state_dict(state)
        return cast(nn.Module, plain)

    def finished_path(self, supernet: SearchSupernet, architecture: Architecture) -> nn.Module:
        """Return a path of the supernet as a network with ordinary layers."""
        return supernet.extract(architecture)

    def supernet_options(self) -> dict[str, Any]:
        """Return what the family's ``relaxed`` is given besides the seed: what the hooks above say, where they do."""
        said = {"relaxation": self.relaxation(), "make_edge": self.make_edge(), "layers": self.layers()}
        options = {name: value for name, value in said.items() if value is not None}
        return {**options, **({"edge_weights": True} if self.edge_weights else {})}

    # ------------------------------------------------------------------ position

    @property
    def _starts(self) -> tuple[int, ...]:
        """First epoch of each phase, and the end of the last."""
        return (0, *accumulate(self._lengths))

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, as far as it is known: a phase may end early."""
        return self._starts[-1]

    @property
    def steps(self) -> int:
        """Mean number of steps in an epoch, rounded up."""
        total = sum(length * steps for length, steps in zip(self._lengths, self._steps, strict=True))
        return -(-total // self.epochs)

    @property
    def done(self) -> bool:
        """Whether all phases are done."""
        return self.position.epoch >= self.epochs

    @property
    def _selecting(self) -> bool:
        """Whether the present phase is that of the selection by perturbation."""
        return self.selection is not None and self.index == self._searching - 1

    def _selected(self) -> Architecture:
        """Return what would be selected now: by the method's rule, or what the perturbations have left."""
        assert self.supernet is not None
        if self._selecting:
            return self.supernet.derive()
        return self.select(self.supernet)

    def _learned(self, index: int) -> Task:
        """Return what the weights learn from in a phase."""
        return self.halves[0] if index < self._searching else self.task

    def _enter(self, index: int, *, fresh: bool) -> None:
        self.index = index
        phase = self.phases[index]
        network = self._trained()
        self.begin_(network, phase, fresh=fresh)
        self.optimizer = self.optimizer_for(network, phase)
        if self.supernet is not None:
            self.updater.begin_(self.supernet, self.optimizer, fresh=fresh)

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
        rate = self.rate(phase, own)
        self.begin_epoch_(phase, own)
        if self._selecting and self.selection is not None and not self.selection.decide(own, monitor.should_stop):
            return None

        def on_step(position: Position, loss: float) -> None:
            monitor.step(position.total, loss=loss, accuracy=position.means().get("accuracy", 0.0))

        hooks = replace(
            phase_hooks(self.optimizer, phase, rate),
            on_step=on_step,
            should_stop=monitor.should_stop,
            noise=self._noise("final"),
        )
        searching = self.supernet is not None
        complete = self._search_epoch(phase, own, rate, hooks) if searching else self._final_epoch(phase, own, hooks)
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
        if self.end_epoch_(phase, own, figures):
            self._lengths[self.index] = own + 1
        next_epoch(self.position)
        if self.position.epoch == self._starts[self.index + 1] and not self.done:
            if self.index + 1 == self._searching:
                self._derive()
            self._enter(self.index + 1, fresh=True)
        return figures

    def _search_epoch(self, phase: Phase, epoch: int, rate: float, hooks: LoopHooks) -> bool:
        assert self.supernet is not None
        learns = phase.logits and epoch >= phase.logits_from and self.supernet.undecided
        step = BilevelStep(
            weight_task=self.halves[0],
            logit_task=self.halves[1],
            batch_size=phase.batch_size,
            seed=self.seed,
            clip_norm=phase.clip_norm,
            memory_format=self.format,
        )
        return bilevel_epoch(
            self.supernet,
            self.optimizer,
            self.logit_optimizer if learns else None,
            step,
            self.position,
            rate=rate,
            updater=self.updater,
            before_step=self._before_step,
            on_step=hooks.on_step,
            should_stop=hooks.should_stop,
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, moved: str) -> None:
        """Add the noise of a step of the search; what it moves is its stream, so that two copies of weights differ."""
        noise = self._noise(moved)
        if noise is not None:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            noise.add_(parameters, self.position.total)

    def _noise(self, stream: str) -> AnnealedNoise | None:
        """Return the noise on gradients in the search, or of the "final" training's.

        Args:
            stream: "logits", "final", or a name of weights: "weights", and "copy" where a search has a second copy.
        """
        plan = self.plan.noise
        if plan is None or not (plan.logits if stream == "logits" else plan.weights):
            return None
        # The final network is a new training with new weights, so its noise is as strong at first as the search's was.
        searched = sum(
            phase.epochs * steps
            for phase, steps in zip(self.phases[: self._searching], self._steps[: self._searching], strict=True)
        )
        first = searched if stream == "final" else 0
        return AnnealedNoise(seed=self.seed, eta=plan.eta, gamma=plan.gamma, stream=stream, first=first)

    def _final_epoch(self, phase: Phase, epoch: int, hooks: LoopHooks) -> bool:
        assert self.network is not None
        if isinstance(self.network, DropsPaths):
            self.network.set_drop_path(phase.drop_path * epoch / phase.epochs)
        task: Task = self.task
        if isinstance(self.network, AuxiliaryNetwork):
            task = WithAuxiliary(task, self.network, phase.auxiliary_weight)
        return train_epoch(
            self.network,
            self.optimizer,
            task,
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
        supernet = self.supernet
        scores = self._score(None)
        architecture = self._selected()
        with torch.no_grad():
            mixing = supernet.probabilities()
        if self._expected is None:
            self._expected = CandidateMacs.of(supernet, self.task.input_shape)
        return {
            "valid_accuracy": scores["accuracy"],
            "valid_loss": scores["loss"],
            "macs": self._macs(architecture),
            "within_budget": False,  # the supernet is not what is delivered
            "expected_macs": float(self._expected(mixing).detach()),
            "entropy": {group: float(entropy(mixing[group])) for group in supernet.options},
            "probabilities": {group: weights.tolist() for group, weights in mixing.items()},
            "chosen": supernet.drawing(architecture),
            **({"edges": supernet.edges()} if self.position.epoch == 0 else {}),
            "operations": {
                group: len(set(targets)) * supernet.per_node if supernet.per_node else len(targets)
                for group, targets in supernet.targets.items()
            },
            "weightless": supernet.weightless(architecture),
            **({"selection": self.selection.figures()} if self.selection is not None and self._selecting else {}),
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
        """Return the supernet's scores on validation images, relaxed or along one path, by batch statistics.

        A relaxation that samples draws anew for every batch of them, from a stream that the epoch names.
        """
        assert self.supernet is not None
        supernet = self.supernet
        generator = torch.Generator().manual_seed(seed_of(self.seed, "score", self.position.epoch))
        path = None if architecture is None else supernet.path(architecture)
        supernet.eval()  # no dropout; normalisations use their batches all the same
        with batch_statistics(supernet), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, "scored-operations"))  # for operations that draw
            return self.halves[0].evaluate(
                lambda inputs: supernet(inputs, supernet.mixing(generator=generator) if path is None else path),
                "valid",
            )

    def _macs(self, architecture: Architecture) -> int:
        costs = self.family.exact_costs(architecture) if self.costs is None else self.costs.of(architecture)
        return int(costs["macs"])

    def _derive(self) -> None:
        """Select, note what the selection costs the supernet, and build the network that is trained from scratch."""
        assert self.supernet is not None
        self.chosen = self._selected()
        relaxed, alone = self._score(None), self._score(self.chosen)
        self.figures = {
            "supernet_accuracy": float(relaxed["accuracy"]),
            "selected_path_accuracy": float(alone["accuracy"]),
            "discretisation_gap": float(relaxed["accuracy"]) - float(alone["accuracy"]),
            "weightless_operations": float(sum(self.supernet.weightless(self.chosen).values())),
        }
        self.supernet = None
        self._build_final()

    def _build_final(self) -> None:
        assert self.chosen is not None
        seed, layers = seed_of(self.seed, "final-weights"), self.layers()
        self.network = self.family.build(self.chosen, seed=seed, **({} if layers is None else {"layers": layers}))
        use_memory_format_(self.network, self.format)

    # ------------------------------------------------------------------ the result

    def deliver(self) -> Delivered:
        """Return the network as it would be delivered now; before there is a final one, a path of the supernet."""
        if self.network is not None:
            network = self.finished(self.network).eval()
            return Delivered(network, self.family.architecture_of(network), self.figures)
        assert self.supernet is not None
        architecture = self._selected()
        network = self.finished_path(self.supernet, architecture)
        recalibrate(network, self._training_inputs())
        return Delivered(network, architecture, self.figures)

    def _training_inputs(self) -> Iterator[Tensor]:
        seed = seed_of(self.seed, "recalibrate")
        batches = self.task.batches("train", batch_size=self.phases[self.index].batch_size, seed=seed)
        yield from (batch.inputs for batch in islice(batches, RECALIBRATION_BATCHES))

    # ------------------------------------------------------------------ exact resume

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs: tensors by name and plain JSON values."""
        values: dict[str, Any] = {}
        fixed: dict[str, Any] = {}
        if self.supernet is not None:
            model: nn.Module = self.supernet
            fixed = {group: list(map(list, edges.items())) for group, edges in self.supernet.fixed.items()}
            tensors = {f"supernet.{name}": tensor for name, tensor in self.supernet.state_dict().items()}
            tensors.update(optimizer_tensors(self.logit_optimizer, self.supernet))
            carried, values = self.updater.state()
            tensors.update({f"{UPDATER}{name}": tensor for name, tensor in carried.items()})
        else:
            model = self._trained()
            tensors = {f"final.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors.update(optimizer_tensors(self.optimizer, model))
        return tensors, {
            "position": self.position.to_json(),
            "phase": self.index,
            "lengths": list(self._lengths),
            "chosen": None if self.chosen is None else self.chosen.to_json(),
            "figures": self.figures,
            "updater": values,
            "fixed": fixed,
            **({} if self.selection is None else {"selection": self.selection.state()}),
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.position = Position(**state["position"])
        self.figures = dict(state["figures"])
        self._lengths = list(state["lengths"])
        if state["chosen"] is None:
            model: nn.Module | None = self.supernet
            prefix = "supernet."
            assert self.supernet is not None
            self.supernet.fixed = {
                group: {int(edge): tuple(row) for edge, row in edges} for group, edges in state["fixed"].items()
            }
        else:
            self.chosen = self.family.space.validate(Architecture.from_json(state["chosen"]))
            self.supernet = None
            self._build_final()
            model, prefix = self.network, "final."
        assert model is not None
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(tensors[prefix + name])
        self._enter(state["phase"], fresh=False)
        if self.selection is not None:
            self.selection.load(state["selection"])
        if self.supernet is not None:
            load_optimizer_tensors(self.logit_optimizer, model, _under(tensors, "optimizer.logits."))
            load_optimizer_tensors(self.optimizer, model, _under(tensors, "optimizer.network."))
            carried = {name.removeprefix(UPDATER): tensor for name, tensor in _under(tensors, UPDATER).items()}
            self.updater.load(carried, state["updater"])
        else:
            load_optimizer_tensors(self.optimizer, model, tensors)


class ConfiguredSearcher(RelaxedSearcher, Generic[S]):
    """A ``RelaxedSearcher`` that a method's settings describe; most methods are one.

    Args:
        family: One that can be relaxed; its sizes are those of the final network.
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs of the final network, without a budget.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".

    Attributes:
        settings: As given.

    Raises:
        UserError: As ``RelaxedSearcher``.
    """

    def __init__(
        self,
        *,
        family: Any,
        task: Task,
        settings: S,
        costs: CostModel | None = None,
        seed: int,
        memory_format: str = "contiguous",
    ) -> None:
        self.settings = settings
        super().__init__(
            family=family, task=task, plan=self.planned(settings), costs=costs, seed=seed, memory_format=memory_format
        )

    def planned(self, settings: S) -> Plan:
        """Return the phases of the run; by default search and final training, see ``plan_of``."""
        return plan_of(settings)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

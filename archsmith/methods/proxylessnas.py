"""ProxylessNAS: a network searched block by block, directly on its task and for its device, at the memory of one path.

Cai, Zhu, Han, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", ICLR 2019, arXiv
1812.00332.

Every place of the network holds all candidate blocks, and a binary gate opens one of them, sampled by the softmax of
the place's logits. The weights are trained along sampled paths, alone at first. Then every few steps the logits learn
on held-out images from the gradient of the gates, the closed ones' included; the expected latency of the network under
these probabilities, from a table measured block by block on this machine, enters their loss. So the search needs no
proxy (a smaller network, fewer images) and knows its hardware. At the end every place keeps its most probable block,
places that keep none vanish, and the network is trained from scratch. With ``gradient="reinforce"`` sampled networks
are rewarded instead, and their latency may be measured on themselves.

What differs: half of the training images are held out for the logits (published: 50,000 of ImageNet's). Rates follow
their cosines epoch by epoch, not step by step. The baseline of REINFORCE is the released one; ``baseline="average"`` is
what was probably meant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast, final

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.cost import LookupTable, measure_table
from archsmith.run.costs import CostModel
from archsmith.run.relaxed_search import RelaxedSearcher
from archsmith.run.relaxed_settings import Phase, Plan, RelaxedSettings
from archsmith.space import Architecture
from archsmith.supernet.expected import CandidateMacs, ExpectedCost
from archsmith.supernet.gates import BinaryGates
from archsmith.supernet.relaxed import RelaxedSupernet, SearchSupernet, Tensors
from archsmith.tasks.base import Task
from archsmith.tasks.vision import ImageClassification
from archsmith.train.bilevel import Updater
from archsmith.train.gated import CostTerm, GatedAlternation, Reinforced
from archsmith.train.optim import RowAdam

SYSTEM = {
    "slug": "proxylessnas",
    "title": "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware",
    "year": 2019,
    "arxiv": "1812.00332",
    "kind": "search",
    "aliases": ["proxyless"],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed; latency tables need blocks that can be named."""

TASK_OPTIONS = {"label_smoothing": 0.1}
"""In the steps on the weights; those on the logits see the plain loss."""

MILLION = 1e6


class Settings(RelaxedSettings):
    """Hyper-parameters; the defaults are those of the published ImageNet search.

    Attributes:
        warmup_epochs: Epochs on the weights alone, in front of ``search_epochs``.
        warmup_lr: Their learning rate; a cosine takes it to zero.
        search_epochs: Epochs on weights and logits; in the first the logits still rest.
        order: "first" alone: gates are asked at the present weights.
        logit_decay: 0 alone: a place that rests must not decay.
        logits_every: Steps on the weights for each on the logits.
        mode: Gates that are asked in a step on the logits: "full", "full_v2" (at the memory of one path), "two".
        gradient: "gates", or "reinforce".
        cost: "latency" (ms, from a table measured here), "macs" (millions) or "none"; "auto" is latency for families
            whose blocks can be measured alone, else MACs.
        reference: Cost that others are compared with; the expected cost before the search if None. (Published: 80 ms on
            a phone, 300 million.)
        form: "multiplicative" or "additive", see ``CostTerm``.
        cost_scale: Factor of the multiplicative form.
        cost_exponent: Its exponent.
        cost_weight: Weight of the additive form.
        samples: Networks for each step of REINFORCE.
        reward_exponent: How much the cost counts in their reward.
        baseline: "published" or "average", see ``Reinforced``.
        baseline_decay: See ``baseline``.
        measure: Whether REINFORCE measures the latency of every sampled network itself, in place of the table; such a
            measurement is kept in the run's journal.
    """

    search_epochs: int = Field(120, ge=1)
    warmup_epochs: int = Field(40, ge=0)
    warmup_lr: float = Field(0.05, gt=0)
    search_batch_size: int = Field(256, ge=2)
    search_lr_min: float = Field(0.0, ge=0)
    logit_lr: float = Field(1e-3, ge=0)
    logit_decay: float = Field(0.0, ge=0, le=0)
    logits_every: int = Field(5, ge=1)
    mode: Literal["full", "full_v2", "two"] = "full_v2"
    gradient: Literal["gates", "reinforce"] = "gates"
    cost: Literal["auto", "latency", "macs", "none"] = "auto"
    reference: float | None = Field(None, gt=0)
    form: Literal["multiplicative", "additive"] = "multiplicative"
    cost_scale: float = Field(0.2, gt=0)
    cost_exponent: float = Field(0.3, ge=0)
    cost_weight: float = Field(0.1, ge=0)
    samples: int = Field(10, ge=1)
    reward_exponent: float = Field(0.1, ge=0)
    baseline: Literal["published", "average"] = "published"
    baseline_decay: float = Field(0.99, ge=0, le=1)
    measure: bool = False
    epochs: int = Field(150, ge=1)
    batch_size: int = Field(256, ge=2)
    lr: float = Field(0.05, gt=0)
    weight_decay: float = Field(4e-5, ge=0)
    clip_norm: float = Field(0.0, ge=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    auxiliary_weight: float = Field(0.0, ge=0)

    @field_validator("order")
    @classmethod
    def _first(cls, order: str) -> str:
        if order != "first":
            raise ValueError("gates are asked at the present weights, which is 'first'")
        return order


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "warmup_epochs": 25,
        "search_epochs": 25,
        "search_batch_size": 16,
        "search_lr": 0.05,
        "logits_every": 2,
        "logit_lr": 0.02,
        "form": "additive",
        "epochs": 30,
        "batch_size": 64,
    },
}


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the paper's."""
    return dict(PRESETS["tiny" if min(image[1:]) < 24 else "paper"])


def plan_of(s: Settings) -> Plan:
    """Return warm-up, search and final training as phases."""
    shared: dict[str, Any] = {"momentum": s.momentum, "weight_decay": s.weight_decay, "clip_norm": s.clip_norm}
    searching = {"batch_size": s.search_batch_size, **shared}
    warmup = Phase(name="warmup", epochs=s.warmup_epochs, lr=s.warmup_lr, **searching)
    search = Phase(
        name="search",
        epochs=s.search_epochs,
        lr=s.search_lr,
        lr_min=s.search_lr_min,
        logits=True,
        logits_from=1,
        **searching,
    )
    training = Phase(
        name="final",
        epochs=s.epochs,
        batch_size=s.batch_size,
        lr=s.lr,
        drop_path=s.drop_path,
        auxiliary_weight=s.auxiliary_weight,
        **shared,
    )
    return Plan(
        search=(warmup, search),
        final=(training,),
        channels=s.search_channels,
        cells=s.search_cells,
        logit_lr=s.logit_lr,
        logit_betas=(0.0, 0.999),  # without momentum, which would move what a step did not ask
        logit_decay=s.logit_decay,
    )


@final
class Searcher(RelaxedSearcher):
    """One ProxylessNAS run: warm-up, search, selection, training from scratch.

    Args:
        family: "mobile-chain" as published, or another that can be relaxed.
        task: What is learned.
        settings: Hyper-parameters.
        costs: Costs of the final network, without a budget; measures what has to be measured, and keeps it in the run.
        seed: Seed of the run.
        memory_format: "channels_last" or "contiguous".

    Attributes:
        table: Latency of every block, where the search looks at latency.
    """

    def __init__(
        self,
        *,
        family: Any,
        task: Task,
        settings: Settings,
        costs: CostModel | None = None,
        seed: int,
        memory_format: str = "contiguous",
    ) -> None:
        self.settings = settings
        tabled = hasattr(family, "expected_latency")
        self.cost: str = ("latency" if tabled else "macs") if settings.cost == "auto" else settings.cost
        if self.cost == "latency" and not tabled:
            raise UserError(
                "cost", "latency", allowed="macs or none for this family", hint="'mobile-chain' has tables."
            )
        if settings.measure and (settings.gradient != "reinforce" or self.cost != "latency" or costs is None):
            raise UserError(
                "measure",
                True,
                allowed="False, but for gradient='reinforce' with cost='latency' in a run that has costs",
                hint="The gates' gradient needs a table.",
            )
        self.table: LookupTable | None = None
        super().__init__(
            family=family, task=task, plan=plan_of(settings), costs=costs, seed=seed, memory_format=memory_format
        )
        logit_task = self.halves[1]
        if isinstance(logit_task, ImageClassification):
            logit_task.augment = replace(logit_task.augment, label_smoothing=0.0)

    def relaxation(self) -> BinaryGates:
        """Return the binary gates."""
        return BinaryGates(self.settings.mode)

    def make_updater(self) -> Updater:
        """Return what a step of the search does, the latency table measured."""
        if self.cost == "latency" and self.table is None:
            parts = self.small.measurable()
            self.table = measure_table(parts) if self.costs is None else self.costs.lookup_table(parts)
        s, cost = self.settings, self.expected_cost()
        uniform = {name: torch.zeros_like(tensor) for name, tensor in self._searched().logits.items()}
        before = None if cost is None else float(cost(self._searched().probabilities(uniform)))
        reference = s.reference if s.reference is not None else before
        if s.gradient == "gates":
            term = None
            if reference is not None and cost is not None:
                term = CostTerm(
                    reference=reference,
                    form=s.form,
                    scale=s.cost_scale,
                    exponent=s.cost_exponent,
                    weight=s.cost_weight,
                )
            return GatedAlternation(cost=cost, term=term, logits_every=s.logits_every)
        return Reinforced(
            cost_of=None if cost is None else self.cost_of_sample,
            reference=reference or 1.0,
            exponent=s.reward_exponent,
            samples=s.samples,
            baseline=s.baseline,
            decay=s.baseline_decay,
            logits_every=s.logits_every,
        )

    def optimizer_for(self, network: nn.Module, phase: Phase) -> torch.optim.Optimizer:
        """Return SGD with Nesterov's momentum."""
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        nesterov = phase.momentum > 0
        return torch.optim.SGD(trained, phase.lr, phase.momentum, weight_decay=phase.weight_decay, nesterov=nesterov)

    def logit_optimizer_for(self, logits: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return Adam in which places that sampled no block rest."""
        return RowAdam(logits, self.plan.logit_lr, betas=self.plan.logit_betas)

    def expected_cost(self) -> ExpectedCost | None:
        """Return the expected cost by mixing weights, in ms or in millions of MACs; None without one."""
        if self.cost == "none":
            return None
        if self.table is not None:
            cost: ExpectedCost = self.small.expected_latency(self.table)
            return cost
        macs = CandidateMacs.of(self._searched(), self.task.input_shape)
        rows = {group: costs_EO / MILLION for group, costs_EO in macs.of_candidates.items()}
        return ExpectedCost(rows, macs.fixed / MILLION)

    def cost_of_sample(self, supernet: RelaxedSupernet, mixing: Tensors) -> float:
        """Return the cost of one sampled network, measured on itself where the settings say so."""
        if self.settings.measure:
            assert self.costs is not None
            return self.costs.latency_ms(cast(SearchSupernet, supernet).derive(mixing))
        cost = self.expected_cost()
        assert cost is not None
        return float(cost(mixing))

    def _searched(self) -> SearchSupernet:
        assert self.supernet is not None
        return self.supernet

    # ------------------------------------------------------------------ figures and exact resume

    def _search_figures(self) -> dict[str, Any]:
        figures = super()._search_figures()
        if self.table is None:
            return figures
        with torch.no_grad():
            expected = self.small.expected_latency(self.table)(self._searched().probabilities())
        chosen = self.select(self._searched())
        return {
            **figures,
            "expected_latency_ms": float(expected),
            "table_latency_ms": self.table.cost(self.small.keys(chosen)),
        }

    def _derive(self) -> None:
        super()._derive()
        if self.table is not None:
            self.figures["table_latency_ms"] = self.table.cost(self.family.keys(cast(Architecture, self.chosen)))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs, the measured table included."""
        tensors, values = super().state()
        return tensors, {**values, "table": None if self.table is None else self.table.to_json()}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit, by its table."""
        if state["table"] is not None:
            self.table = LookupTable.from_json(state["table"])
            self.updater = self.make_updater()
        super().load(tensors, state)

"""What pushes units towards zero in the user's loop: proximal steps on scales and gates, or charged stochastic gates.

Scales belong to the model and are trained by the user's optimiser; gates belong to the shrinker and have an optimiser
of their own, fed by the same backward pass. The penalty on magnitudes never becomes a gradient: ``lr * rho * c_i`` is
subtracted from the magnitude after the optimiser has stepped, so that Adam cannot normalise its weighting away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from archsmith.atoms.gate_banks import LogisticGates, MagnitudeGates
from archsmith.atoms.gate_cost import GateCost, Resource
from archsmith.atoms.gate_sites import require_sites
from archsmith.atoms.gates import GateOptions
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.unit_costs import UnitCosts
from archsmith.atoms.unit_scores import scale_places
from archsmith.atoms.units import IntArray, UnitGroup

Gating = Literal["magnitude", "factors", "logistic", "none"]

LOGISTIC_RATE = 0.05
"""Default learning rate of log odds (Adam)."""


class UnitPenalty:
    """Penalty and gates of one model.

    Args:
        model: The model; gates are put on it as hooks.
        groups: Its groups.
        costs: Their costs; what units are charged is fixed here, so that a cut does not rescale the penalty.
        optimizers: The user's; learning rates are read from them.
        gating: "magnitude": scales, and gates on units without one. "factors": such gates on everything. "logistic":
            stochastic gates on everything. "none": neither.
        strength: rho, or lambda in units of one over the initial cost for "logistic".
        rate: Learning rate of the gates; None for that of the first optimiser ("logistic": 0.05).
        options: Of stochastic gates; temperature 0.1 when None.
        resource: What stochastic gates are charged for.
        seed: Of their noise.

    Attributes:
        bank: The gates, or None.
        charge: ``c_i`` by group name: MACs of a unit over the mean of all units.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        costs: UnitCosts,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        gating: Gating,
        strength: float,
        rate: float | None,
        options: GateOptions | None,
        resource: Resource,
        seed: int,
    ) -> None:
        self._model, self._optimizers, self._strength = model, optimizers, strength
        self._groups = list(groups)
        self._gating: Gating = gating
        self._rate = LOGISTIC_RATE if rate is None and gating == "logistic" else rate
        self._resource: GateCost | None = None
        self.bank: MagnitudeGates | LogisticGates | None = None
        alive = [group for group in groups if not group.frozen]
        if gating == "logistic":
            generator = torch.Generator().manual_seed(seed)
            self.bank = LogisticGates(model, alive, options=options or GateOptions(tau=0.1), generator=generator)
            self._resource = GateCost(costs, resource)
        elif gating == "factors":
            self.bank = MagnitudeGates(model, alive)
            require_sites(self.bank.values, self.bank.refused, "model")
        elif gating == "magnitude":
            places = scale_places(model, groups)
            if bare := [group for group in alive if not places[group.name]]:
                self.bank = MagnitudeGates(model, bare)
        sizes = np.array(costs.sizes, dtype=np.float64)
        per_unit = costs.compiled("macs").gradient(sizes)
        mean = float(per_unit @ sizes) / max(1.0, float(sizes.sum()))
        self.charge = {name: float(c) / mean if mean else 1.0 for name, c in zip(costs.names, per_unit, strict=True)}
        self.optimizer = self._new_optimizer()

    @property
    def refused(self) -> dict[str, str]:
        """Why some groups have neither scale nor gate, by name."""
        return {} if self.bank is None else dict(self.bank.refused)

    def gates(self) -> dict[str, nn.Parameter]:
        """Return the trained vectors of the gates by group name; layers in the model left out."""
        if self.bank is None:
            return {}
        return dict(self.bank.values if isinstance(self.bank, MagnitudeGates) else self.bank.logits)

    def _new_optimizer(self) -> torch.optim.Optimizer | None:
        parameters = list(self.gates().values())
        if not parameters:
            return None
        first = self._optimizers[0]
        if self._gating in ("magnitude", "factors") and isinstance(first, torch.optim.SGD):
            return torch.optim.SGD(parameters, lr=self._gate_rate(), momentum=float(first.param_groups[0]["momentum"]))
        return torch.optim.Adam(parameters, lr=self._gate_rate(), weight_decay=0.0)

    def _gate_rate(self) -> float:
        return self._rate if self._rate is not None else float(self._optimizers[0].param_groups[0]["lr"])

    def _rate_of(self, parameter: Tensor) -> float:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(p is parameter for p in group["params"]):
                    return float(group["lr"])
        return float(self._optimizers[0].param_groups[0]["lr"])

    # ------------------------------------------------------------------ in the loop

    def before_optimizer(self) -> None:
        """Add the gradient of the charge to gate layers of the user's model, which the user's optimiser trains."""
        if not isinstance(self.bank, LogisticGates) or not self.bank.layers or not self._strength:
            return
        own = {id(logits) for logits in self.bank.logits.values()}
        layers = [p for p in self.bank.parameters() if id(p) not in own]
        gradients = torch.autograd.grad(self.regulariser(), layers, allow_unused=True)
        for parameter, gradient in zip(layers, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def after_optimizer(self, grad_scale: float) -> None:
        """Train the gates on the gradients of this step, then shrink scales and gates.

        Args:
            grad_scale: What the loss was multiplied with.
        """
        self._train_gates(grad_scale)
        if self._gating in ("magnitude", "factors") and self._strength:
            self._proximal_step()

    def sample(self) -> None:
        """Draw the masks of the next step."""
        if isinstance(self.bank, LogisticGates):
            self.bank.sample()

    def _train_gates(self, grad_scale: float) -> None:
        if self.optimizer is None:
            return
        parameters = list(self.gates().values())
        for parameter in parameters:
            if parameter.grad is not None and grad_scale != 1.0:
                parameter.grad.div_(grad_scale)
        if dist.is_available() and dist.is_initialized():  # DDP knows nothing of gates outside the model
            for parameter in parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(gradient)
                parameter.grad = gradient.div_(dist.get_world_size())
        if isinstance(self.bank, LogisticGates) and self._strength:
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(self.regulariser(), parameters), strict=True
            ):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for group in self.optimizer.param_groups:
            group["lr"] = self._gate_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _proximal_step(self) -> None:
        """Shrink scales and gates by ``lr * rho * c_i`` towards zero, stopping there."""
        for name, scale, index in self._scales():
            step = self._rate_of(scale) * self._strength * self.charge[name]
            values = scale[index]
            scale[index] = torch.sign(values) * (values.abs() - step).clamp_min_(0.0)
        for name, gate in self.gates().items():
            step = self._gate_rate() * self._strength * self.charge[name]
            gate.copy_(torch.sign(gate) * (gate.abs() - step).clamp_min_(0.0))

    def _scales(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return group, scale vector and positions of all normalisation scales of groups without gates."""
        if self._gating == "factors":
            return []
        tensors, gated = tensors_of(self._model), self.gates()
        found = []
        for name, places in scale_places(self._model, self._groups).items():
            for place in places if name not in gated else ():
                index = torch.from_numpy(place.index.reshape(-1).copy())
                found.append((name, tensors[place.tensor], index.to(tensors[place.tensor].device)))
        return found

    # ------------------------------------------------------------------ values

    def regulariser(self) -> Tensor:
        """Return ``lambda * sum of reg(v)`` of stochastic gates, differentiable in their log odds."""
        assert isinstance(self.bank, LogisticGates) and self._resource is not None
        vectors = {name: self.bank.regularisation(name) for name in self.bank.names}
        alive: dict[str, int | Tensor] = {group.name: group.size for group in self._groups}
        alive.update({name: self.bank.alive(name) for name in self.bank.names})
        return self._strength / self._resource.value({}) * self._resource.regulariser(vectors, alive)

    @torch.no_grad()
    def value(self) -> float:
        """Return the present penalty: ``rho * sum c_i |g_i|``, or ``lambda * reg``."""
        if isinstance(self.bank, LogisticGates):
            return float(self.regulariser())
        total = sum(self.charge[name] * float(scale[index].abs().sum()) for name, scale, index in self._scales())
        total += sum(self.charge[name] * float(gate.abs().sum()) for name, gate in self.gates().items())
        return self._strength * total

    # ------------------------------------------------------------------ cuts

    def suspend(self) -> None:
        """Take the hooks off for a while, for copies that are measured, counted or checked."""
        if self.bank is not None:
            self.bank.remove()

    def resume(self) -> None:
        """Put the hooks back on."""
        if self.bank is not None:
            self.bank.follow(self._groups, {group.name: np.arange(group.size) for group in self._groups})

    def fold_(self) -> None:
        """Multiply magnitude gates into the weights; stochastic ones go on until the end."""
        if isinstance(self.bank, MagnitudeGates):
            self.bank.fold_()

    def follow(self, groups: Sequence[UnitGroup], kept: Mapping[str, IntArray]) -> None:
        """Go on with the units that survived a cut, with the state of the gates' optimiser."""
        self._groups = list(groups)
        sizes = {name: len(gate) for name, gate in self.gates().items()}
        if self.bank is not None:
            self.bank.follow(groups, kept)
        for name, gate in self.gates().items():
            state: dict[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(gate, {})
            index = torch.from_numpy(kept[name])
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() == 1 and len(value) == sizes[name]:
                    state[key] = value[index.to(value.device)]

    def let_go(self) -> None:
        """Fold all gates and take the hooks off for good."""
        if self.bank is not None:
            self.bank.fold_()
            self.bank.remove()

    # ------------------------------------------------------------------ resume

    def state(self) -> dict[str, Any]:
        """Return gates, noise and the state of their optimiser."""
        generator: Tensor | None = None
        noise: dict[str, Tensor] = {}
        steps = 0
        if isinstance(self.bank, LogisticGates):
            generator, noise = self.bank.state()
            steps = self.bank.steps
        return {
            "gates": {name: gate.detach().clone() for name, gate in self.gates().items()},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "generator": generator,
            "noise": noise,
            "steps": steps,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, after the cuts that led to it."""
        if isinstance(self.bank, LogisticGates):
            self.bank.load(state["generator"], state["noise"], int(state["steps"]))
        for name, gate in self.gates().items():
            gate.copy_(state["gates"][name])
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])

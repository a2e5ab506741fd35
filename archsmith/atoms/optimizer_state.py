"""The state that optimisers keep for a parameter, cut with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError

ELEMENTWISE = frozenset(
    {
        *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "acc_delta", "sum"),
        *("exp_inf", "ax", "prev", "step_size", "exp_avg_diff", "momentum", "variance", "acc"),
    }
)
"""Names under which optimisers keep one number for each element of a parameter."""

FACTORED = frozenset({"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col", "R", "C"})
"""Names of sums over rows or columns: what remains of them can not be told from the sums."""


SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""Names of averages or sums of squared gradients."""

GRADIENTS = frozenset({"exp_avg", "grad_avg", "exp_inf", "prev", "exp_avg_diff"})
"""Names of averages of gradients; "momentum_buffer" is one where it is not normalised (SGD)."""


@dataclass(frozen=True, eq=False)
class StateTensor:
    """A state tensor with one number for each element of a parameter.

    Attributes:
        parameter: Name of the parameter.
        state: The optimiser's dictionary for it.
        key: Name of the tensor there.
        value: The tensor.
        order: Power of the gradient that it scales with: 1 for averages of gradients, 2 for those of squares, else 0.
    """

    parameter: str
    state: dict[str, Any]
    key: str
    value: Tensor
    order: int


def _order(optimizer: torch.optim.Optimizer, key: str) -> int:
    if key == "momentum_buffer":
        return 1 if isinstance(optimizer, torch.optim.SGD) else 0
    return 2 if key in SQUARES else 1 if key in GRADIENTS else 0


def inner_optimizers(optimizers: Iterable[Any]) -> list[torch.optim.Optimizer]:
    """Return the torch optimisers behind wrappers that hold one as ``.optimizer`` (Fabric, accelerate).

    Raises:
        UserError: One of them is no optimiser.
    """
    found = []
    for given in optimizers:
        inner = given
        while not isinstance(inner, torch.optim.Optimizer) and hasattr(inner, "optimizer"):
            inner = inner.optimizer
        if not isinstance(inner, torch.optim.Optimizer):
            raise UserError("optimizers", Shown(f"a {type(given).__name__}"), allowed="a list of torch.optim.Optimizer")
        found.append(inner)
    return found


def check_owners(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that no optimiser holds, and refuse an optimiser that holds none.

    Args:
        optimizers: All optimisers that train the network.
        parameters: The parameters that change, by qualified name.

    Raises:
        UserError: An optimiser was built on other parameters (a copy, or the network before ``model.to(...)``), or
            keeps one state for all of them (L-BFGS).
    """
    mine = {id(parameter) for parameter in parameters.values()}
    held = set()
    for number, optimizer in enumerate(optimizers):
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not own & mine:
            raise UserError(
                f"optimizers[{number}]",
                Shown(f"a {type(optimizer).__name__} that holds none of the parameters to be cut"),
                allowed="optimisers built on the parameters of this very model object",
                hint="Build it after the model is copied or moved, or leave it out if it trains another network.",
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError(
                f"optimizers[{number}]", Shown("LBFGS"), allowed="optimisers with a state for each parameter"
            )
        held |= own
    return [
        name for name, p in parameters.items() if isinstance(p, nn.Parameter) and p.requires_grad and id(p) not in held
    ]


def elementwise_states(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, Tensor],
    elementwise: Iterable[str] = (),
) -> list[StateTensor]:
    """Return every state tensor that has one number for each element of its parameter.

    Args:
        optimizers: Whose states.
        parameters: The parameters that change, by qualified name.
        elementwise: Further keys that hold one number for each element, for optimisers that torch does not have.

    Raises:
        UserError: A state is factored (Adafactor), or nothing says that its elements are those of the parameter.
    """
    known = ELEMENTWISE | set(elementwise)
    found = []
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter)
            if not state:
                continue
            if factored := sorted(FACTORED & state.keys()):
                raise UserError(
                    "optimizers",
                    Shown(f"{kind} with the factored states {factored} of '{name}'"),
                    allowed="states with a number for each element (SGD, Adam, AdamW, RMSprop, Adagrad, ...)",
                    hint="Sums over rows can not be cut; build the optimiser anew after the cut.",
                )
            for key, value in state.items():
                if not isinstance(value, Tensor | list | tuple | dict):
                    continue  # None, step counts
                if isinstance(value, Tensor) and value.dim() == 0 and (parameter.dim() or key not in known):
                    continue
                if not isinstance(value, Tensor) or key not in known or value.shape != parameter.shape:
                    what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    raise UserError(
                        "optimizers",
                        Shown(f"{kind} with the state '{key}' ({what}) of '{name}' {tuple(parameter.shape)}"),
                        allowed="states with a number for each element of the parameter",
                        hint=f"If '{key}' is one, say so with elementwise=('{key}',)." if key not in known else "",
                    )
                found.append(StateTensor(name, state, key, value, _order(optimizer, key)))
    return found

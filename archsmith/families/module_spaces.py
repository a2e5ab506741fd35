"""The search spaces of DeepArchitect as module expressions, and its training hyper-parameters; needs no torch.

The published sizes are exact integers: 2025; 18 * 432 * 18 * 432; R (1 + 2 R) with R = r + r^2 + r^4 + r^8, r = 17496.
The option lists are **reconstructions**: they follow the spaces' descriptions and give exactly these sizes, but which
filters, window sizes and keep probabilities the authors listed is not published in the paper.

Source: Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792.
"""

from __future__ import annotations

from archsmith.core.errors import UserError
from archsmith.space.modules import (
    Affine,
    BatchNormalization,
    Concat,
    Conv2D,
    Dropout,
    MaxPooling2D,
    MaybeSwap,
    Module,
    Optional,
    ReLU,
    Repeat,
    RepeatTied,
    Residual,
    UserHyperparams,
)

SPACES = ("tfref_convnet", "deepconv", "resnet")
"""Names of the three published spaces."""

PUBLISHED_SIZES = {"tfref_convnet": 2025, "deepconv": 60_466_176, "resnet": "R * (1 + 2 * R)"}
"""Published numbers of networks, training hyper-parameters not counted."""

TRAINING = ("none", "light", "heavy")
"""Names of the sets of training hyper-parameters: 1, 128 and 4096 combinations."""


def published_module(name: str, *, num_classes: int, divisor: int = 1, training: str = "none") -> Module:
    """Return the expression of a published space.

    Args:
        name: One of ``SPACES``.
        num_classes: Width of the last layer.
        divisor: All filters and units are divided by it, for one CPU; the size of the space stays.
        training: One of ``TRAINING``; "light" and "heavy" put ``training_hyperparameters`` in front.

    Raises:
        UserError: An unknown name, or a divisor that makes two widths equal.
    """
    if name not in SPACES:
        raise UserError("space", name, allowed=" or ".join(SPACES))
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise UserError("divisor", divisor, allowed="an integer from 1")
    body = {"tfref_convnet": _tfref_convnet, "deepconv": _deepconv, "resnet": _resnet}[name](divisor)
    whole = Concat([body, Affine([num_classes])])
    return whole if training == "none" else Concat([training_hyperparameters(training), whole])


def training_hyperparameters(which: str = "heavy") -> Module:
    """Return the training hyper-parameters that are tuned together with a network, as a module that computes nothing.

    Published for "heavy" are the numbers of values and their ends: the optimiser, 32 learning rates, log-spaced from
    1e-2 to 1e-7, 8 decay multipliers from 0.01 to 0.9, 8 rate patiences from 4 to 32. The even spacing of the
    multipliers is a reconstruction, and so is "light", of which the size (128) alone is known.

    Args:
        which: "heavy" (4096 combinations) or "light" (128).
    """
    if which not in ("light", "heavy"):
        raise UserError("training", which, allowed=" or ".join(TRAINING))
    rates, factors, patiences = (32, 8, 8) if which == "heavy" else (16, 4, 1)
    return UserHyperparams(
        optimizer=["adam", "sgd_mom"],
        lr=[float(f"{10 ** (-2 - 5 * i / (rates - 1)):.4g}") for i in range(rates)],
        rate_mult=[round(0.01 + 0.89 * i / (factors - 1), 4) for i in range(factors)],
        rate_patience=[4 * (i + 1) for i in range(patiences)] if which == "heavy" else [8],
    )


def _tfref_convnet(divisor: int) -> Module:
    """TensorFlow's CIFAR-10 tutorial network with open widths and windows: (5 * 3) * (5 * 3) * 3 * 3 = 2025."""
    filters, units = _narrowed([32, 48, 64, 96, 128], divisor), _narrowed([96, 192, 384], divisor)
    parts: list[Module] = []
    for _ in range(2):
        parts += [Conv2D(filters, [3, 5, 7]), ReLU(), MaxPooling2D([3], [2]), BatchNormalization()]
    for _ in range(2):
        parts += [Affine(units), ReLU()]
    return Concat(parts)


def _deepconv(divisor: int) -> Module:
    """Two stages of a reduction (3 * 3 * 2 = 18) and a tied repetition of a block (4 * 3 * 3 * 2 * 2 * 3 = 432)."""
    filters, initialisers = _narrowed([48, 96, 192], divisor), ["kaiming", "xavier"]
    reduction = Conv2D(filters, [3, 5, 7], [2], initialisers=initialisers)
    block = Concat(
        [
            Conv2D(filters, [1, 3, 5], initialisers=initialisers),
            MaybeSwap(BatchNormalization(), ReLU()),
            Optional(Dropout([0.5, 0.9])),
        ]
    )
    return Concat([part for _ in range(2) for part in (reduction, RepeatTied(block, [1, 2, 4, 8]))])


def _resnet(divisor: int) -> Module:
    """One chain of 1, 2, 4 or 8 residual blocks (r = 18 * 18 * 18 * 3), and perhaps a reduction (2) and another."""
    filters = _narrowed([16, 32, 64], divisor)
    parts: list[Module] = []
    for _ in range(3):
        parts += [Conv2D(filters, [1, 3, 5]), MaybeSwap(BatchNormalization(), ReLU())]
    chain = Repeat(Residual(Concat([*parts, Optional(Dropout([0.5, 0.9]))])), [1, 2, 4, 8])
    reduction = Conv2D(_narrowed([64, 128], divisor), [3], [2])
    return Concat([chain, Optional(Concat([reduction, chain]))])


def _narrowed(widths: list[int], divisor: int) -> list[int]:
    narrow = [max(1, width // divisor) for width in widths]
    if len(set(narrow)) < len(narrow):
        raise UserError("divisor", divisor, allowed=f"one that keeps the widths {widths} apart")
    return narrow

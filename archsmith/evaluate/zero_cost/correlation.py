"""How far variables are from being copies of one another: the two numbers that covariance scores are made of.

Source: Mellor et al. 2020, arXiv 2006.04647, version 1 (the spectrum of correlations); Serianni and Kalita 2023,
arXiv 2306.00288 (its use on hidden states, and the cosine form).
"""

# N variables, S observations

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from archsmith.core.errors import Shown, UserError

SHIFT = 1e-5
"""k: added to the eigenvalues, as published."""

ROOT = 1 / 20
"""Exponent of the absolute cosines, as published."""

_CONSTANT = 1e-12

Constant = Literal["nan", "drop"]


@dataclass(frozen=True)
class Spectrum:
    """The spectral score of some variables, and what to distrust in it.

    Attributes:
        score: ``-sum (log(v + k) + 1 / (v + k))`` over the eigenvalues v of the correlations; NaN where undefined.
        variables: Rows that were given.
        observations: Columns that were given.
        constant: Numbers of the rows that do not vary: they have no correlation.
        singular: Eigenvalues below k. Each costs up to 1 / k = 100,000, so that a few of them are the whole score.
    """

    score: float
    variables: int
    observations: int
    constant: tuple[int, ...]
    singular: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Return warnings, empty when there is nothing to warn of."""
        found = []
        if self.constant:
            found.append(f"{len(self.constant)} of {self.variables} variables are constant and have no correlation.")
        if self.variables >= self.observations:
            found.append(
                f"{self.variables} variables have {self.observations} observations: the correlations are singular "
                "whatever the network. Compare only scores of equally many observations."
            )
        elif self.singular:
            found.append(f"{self.singular} eigenvalues are below {SHIFT:g} and dominate the score.")
        return tuple(found)


def spectrum(rows: Tensor, *, constant: Constant = "nan") -> Spectrum:
    """Return the spectral score of variables and what it was made of.

    Args:
        rows: (N, S), a variable in each row.
        constant: What becomes of rows that do not vary, whose correlations are 0 / 0: ``nan`` makes the score NaN, as
            the definition has it, ``drop`` leaves them out.

    Computed in float64. Eigenvalues below zero, which rounding alone makes, count as zero.

    Raises:
        UserError: Not a matrix.
    """
    rows_NS = _matrix(rows)
    centred = rows_NS - rows_NS.mean(1, keepdim=True)
    lengths = centred.norm(dim=1)
    varies = lengths > _CONSTANT * rows_NS.norm(dim=1)
    fixed = tuple(int(i) for i in torch.nonzero(~varies).flatten()) if bool(torch.isfinite(lengths).all()) else ()
    sizes = (rows_NS.shape[0], rows_NS.shape[1], fixed)
    if not bool(torch.isfinite(rows_NS).all()) or (fixed and constant == "nan") or not bool(varies.any()):
        return Spectrum(math.nan, *sizes, 0)
    unit = centred[varies] / lengths[varies, None]
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T).clamp_min(0)
    shifted = eigenvalues + SHIFT
    score = -float((shifted.log() + 1 / shifted).sum())
    return Spectrum(score, *sizes, int((eigenvalues < SHIFT).sum()))


def spectral(rows: Tensor, *, constant: Constant = "nan") -> float:
    """Return ``-sum_n (log(v_n + k) + 1 / (v_n + k))``, v the eigenvalues of the rows' Pearson correlations.

    At most about -N, reached when the N rows are uncorrelated; about -100,000 for each row that others determine.
    Shifting or scaling a row, and the order of rows, change nothing. Arguments as for ``spectrum``.
    """
    return spectrum(rows, constant=constant).score


def cosine(rows: Tensor) -> float:
    """Return ``1 - sum_{i != j} |cos(x_i, x_j)|^(1/20) / (2 (N^2 - N))`` of the rows: 1 when all are orthogonal.

    Args:
        rows: (N, S), N at least 2; NaN when one of them is zero.

    Raises:
        UserError: Not a matrix, or fewer than two rows.
    """
    rows_NS = _matrix(rows)
    count = len(rows_NS)
    if count < 2:
        raise UserError("rows", Shown(f"{count} row"), allowed="at least two rows, which are compared in pairs")
    unit = rows_NS / rows_NS.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0)
    return 1 - float(0.5 * cosines.pow(ROOT).sum()) / (count**2 - count)


def agreement(pre_activations: list[Tensor]) -> Tensor:
    """Return how many units agree on each pair of samples: ``sum x x^T + (1 - x)(1 - x)^T``, x = [a > 0]; (B, B).

    Args:
        pre_activations: (B, units) each.
    """
    kernel = torch.zeros(len(pre_activations[0]), len(pre_activations[0]), dtype=torch.float64)
    for values in pre_activations:
        signs = torch.where(values.flatten(1) > 0, 1.0, -1.0).double()
        kernel += ((signs.shape[1] + signs @ signs.T) / 2).cpu()
    return kernel


def log_determinant(kernel: Tensor) -> float:
    """Return ``log |det K|``, minus infinity for a singular one."""
    return float(torch.linalg.slogdet(kernel).logabsdet)


def _matrix(rows: Tensor) -> Tensor:
    if rows.dim() != 2 or 0 in rows.shape:
        raise UserError("rows", Shown(f"a tensor of shape {tuple(rows.shape)}"), allowed="(variables, observations)")
    return rows.detach().double()

"""Learning from a vote of teachers: their probabilities, joined, and the distance of a student from them.

Everything happens at a temperature: logits are divided by it, and the distance is multiplied with its square, so that
gradients keep their size. The gradient with respect to the student's logits ``z`` is
``temperature * (softmax(z / temperature) - vote)`` for each example.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; several teachers that
vote, as Zhu, Li, Liu, Wang, arXiv 2302.05629, have them.
"""

# K teachers, B batch, C classes

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from archsmith.core.errors import UserError

Vote = Literal["soft", "majority"]
"""How teachers are joined: the mean of their probabilities, or the share of teachers for whom a class comes first."""


def voted(teacher_logits_KBC: Sequence[Tensor] | Tensor, temperature: float, how: Vote = "soft") -> Tensor:
    """Return the teachers' joint probabilities (B, C), without gradient.

    The order of the teachers does not matter (beyond the rounding of a sum), and teachers that agree are as one.

    Args:
        teacher_logits_KBC: Logits (B, C) of each teacher.
        temperature: Above 0. A majority does not depend on it.
        how: See ``Vote``. A teacher with several equal largest logits votes for the first of them.

    Raises:
        UserError: No teacher, a temperature that is not above 0, or an unknown ``how``.
    """
    if len(teacher_logits_KBC) == 0:
        raise UserError("teachers", 0, allowed="at least one")
    _require_temperature(temperature)
    if how not in get_args(Vote):
        raise UserError("vote", how, allowed=", ".join(get_args(Vote)))
    with torch.no_grad():
        logits_KBC = torch.stack([each.detach() for each in teacher_logits_KBC])
        if how == "soft":
            return (logits_KBC / temperature).softmax(dim=-1).mean(dim=0)
        first_KB = logits_KBC.argmax(dim=-1)
        return functional.one_hot(first_KB, logits_KBC.shape[-1]).to(logits_KBC.dtype).mean(dim=0)


def distillation(student_logits_BC: Tensor, vote_BC: Tensor, temperature: float) -> Tensor:
    """Return ``temperature^2 * KL(vote || softmax(student / temperature))`` in nats, the mean over the batch.

    Args:
        student_logits_BC: Logits of the student; the gradient goes here.
        vote_BC: The teachers' probabilities, constants.
        temperature: Above 0; the one of the vote.

    Raises:
        UserError: A temperature that is not above 0, or different shapes.
    """
    _require_temperature(temperature)
    if student_logits_BC.shape != vote_BC.shape:
        raise UserError("vote", tuple(vote_BC.shape), allowed=f"the student's shape {tuple(student_logits_BC.shape)}")
    own_BC = (student_logits_BC / temperature).log_softmax(dim=-1)
    return temperature**2 * functional.kl_div(own_BC, vote_BC.detach(), reduction="batchmean")


def soft_cross_entropy(student_logits_BC: Tensor, teacher_logits_BC: Tensor) -> Tensor:
    """Return ``-sum_c softmax(teacher)_c log softmax(student)_c``, the mean over the batch; temperature 1.

    Its gradient is that of the divergence from the teacher; its smallest value is the teacher's entropy, not 0.

    Args:
        student_logits_BC: Logits of the student; the gradient goes here alone.
        teacher_logits_BC: Logits of the teacher, constants.

    Raises:
        UserError: Different shapes.

    Source: in-place distillation, Yu and Huang, arXiv 1903.05134, and BigNAS, arXiv 2003.11142.
    """
    if student_logits_BC.shape != teacher_logits_BC.shape:
        raise UserError(
            "teacher", tuple(teacher_logits_BC.shape), allowed=f"the student's shape {tuple(student_logits_BC.shape)}"
        )
    return functional.cross_entropy(student_logits_BC, teacher_logits_BC.detach().softmax(dim=-1))


def ramp(step: int, length: float) -> float:
    """Return a factor that rises linearly from 0 at step 0 to 1 at ``length`` steps, and stays there."""
    return 1.0 if length <= 0 else min(1.0, step / length)


def _require_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError("temperature", temperature, allowed="a number above 0")

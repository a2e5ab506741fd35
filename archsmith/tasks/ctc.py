"""What a task with sequences of tokens shares: the CTC loss with lengths, greedy decoding, and error rates.

A network gives scores for every frame of its output, at a lower frame rate maybe. The lengths of examples follow the
time: ``length * T' / T``, a fraction in general, which is cut to a whole number where frames are counted.

Source: Graves et al. 2006, connectionist temporal classification.
"""

# B batch, T' frames of the output, K tokens, L longest target

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.base import Batch, Forward

BLANK = 0
"""Number of the token that stands for none; targets are padded with it."""


def output_lengths(lengths_B: Tensor, frames: int, output_frames: int) -> Tensor:
    """Return the lengths in frames of the output, float64: ``lengths * T' / T``."""
    return lengths_B.double() * output_frames / frames


def ctc_loss(forward: Forward, batch: Batch, *, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run a batch forwards.

    Args:
        forward: From inputs (B, ..., T) to scores (B, T', K), normalised or not.
        batch: Targets (B, L) int64, padded with the blank; ``context`` has ``lengths`` (B,) in frames of the inputs,
            and ``target_lengths`` (B,).
        tokens: K.

    Returns:
        Negative log-likelihood of each example in nats (not divided by its length), scores (B, T', K), whole lengths
        (B,) of the outputs.

    Raises:
        UserError: ``forward`` returned another shape, or fewer frames than an example's target needs.
    """
    scores = _checked(forward(batch.inputs), len(batch), tokens)
    device = scores.device
    whole = output_lengths(batch.context["lengths"], batch.inputs.shape[-1], scores.shape[1]).long().to(device)
    targets, target_lengths = batch.targets.to(device), batch.context["target_lengths"].to(device)
    # A repeated token needs a blank in between.
    twice = ((targets[:, 1:] == targets[:, :-1]) & (targets[:, 1:] != BLANK)).sum(1)
    if bool((whole < target_lengths + twice).any()):
        worst = int((whole - target_lengths - twice).argmin())
        raise UserError(
            "network output",
            Shown(f"{int(whole[worst])} frames for an example with {int(target_lengths[worst])} tokens"),
            allowed="at least one frame for each token, and one between equal ones",
            hint="Lower the task's hop_ms, or the network's stride.",
        )
    log_probabilities = scores.float().log_softmax(-1).transpose(0, 1)
    losses = functional.ctc_loss(log_probabilities, targets, whole, target_lengths, blank=BLANK, reduction="none")
    return losses, scores, whole


def greedy_decoded(scores_BTK: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """Return for each example the most likely token of every frame, repetitions merged and blanks left out."""
    best = scores_BTK.detach().argmax(-1)
    inside = torch.arange(best.shape[1], device=best.device) < lengths_B.unsqueeze(1)
    changed = torch.cat([torch.ones_like(best[:, :1], dtype=torch.bool), best[:, 1:] != best[:, :-1]], 1)
    kept = inside & changed & (best != BLANK)
    return [row[keep].tolist() for row, keep in zip(best.cpu(), kept.cpu(), strict=True)]


def edit_distance(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Return the fewest insertions, deletions and substitutions that make one of the other."""
    row = list(range(len(wanted) + 1))
    for number, token in enumerate(found, start=1):
        diagonal, row[0] = row[0], number
        for place, other in enumerate(wanted, start=1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (token != other))
            diagonal, row[place] = row[place], best
    return row[-1]


def wanted_tokens(batch: Batch) -> list[list[int]]:
    """Return the targets without their padding."""
    lengths = batch.context["target_lengths"].tolist()
    return [row[:length] for row, length in zip(batch.targets.tolist(), lengths, strict=True)]


@torch.no_grad()
def ctc_scores(forward: Forward, batches: Iterable[Batch], *, tokens: int) -> dict[str, float | int]:
    """Return the share of examples decoded without an error, token errors per token, mean loss, number of examples.

    Raises:
        UserError: As ``ctc_loss``.
    """
    right = errors = spoken = examples = 0
    total = 0.0
    for batch in batches:
        losses, scores, lengths = ctc_loss(forward, batch, tokens=tokens)
        total += float(losses.double().sum())
        for found, wanted in zip(greedy_decoded(scores, lengths), wanted_tokens(batch), strict=True):
            distance = edit_distance(found, wanted)
            right += distance == 0
            errors += distance
            spoken += len(wanted)
        examples += len(batch)
    return {
        "accuracy": right / examples,
        "loss": total / examples,
        "token_error_rate": errors / spoken,
        "examples": examples,
    }


def _checked(output: Tensor, batch: int, tokens: int) -> Tensor:
    fits = isinstance(output, Tensor) and output.dim() == 3 and (len(output), output.shape[2]) == (batch, tokens)
    if not fits:
        given = str(tuple(output.shape)) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        allowed = f"scores of shape ({batch}, frames, {tokens}), one column per token"
        raise UserError("network output", Shown(given), allowed=allowed)
    return output

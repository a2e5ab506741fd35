"""Architecture steps of ProxylessNAS: by the gradient of sampled gates, or by REINFORCE; both with a cost to keep down.

Source: Cai, Zhu, Han, "ProxylessNAS", arXiv 1812.00332, sections 3.2 and 3.3; details as in the released code.
"""

# E edges, O candidates

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.supernet.expected import ExpectedCost
from archsmith.supernet.gates import BinaryGates, involved_probabilities
from archsmith.supernet.relaxed import RelaxedSupernet, Tensors, batch_statistics
from archsmith.train.bilevel import StepContext, random_batch
from archsmith.train.sampled import SampledAlternation, named_stream, sampled_loss

Form = Literal["multiplicative", "additive"]


@dataclass(frozen=True, kw_only=True)
class CostTerm:
    """How an expected cost enters the loss of the logits.

    "multiplicative": ``scale * loss * (log cost / log reference)^exponent``, the released default; "additive":
    ``loss + weight * (cost - reference) / reference``. The reference is a scale and no limit: both forms go on pressing
    below it.

    Attributes:
        reference: Cost that others are compared with, in the unit of ``cost``.
        form: See above.
        scale: Of the multiplicative form.
        exponent: Of the multiplicative form.
        weight: Of the additive form.

    Raises:
        UserError: A reference that is not positive, or, in the multiplicative form, not above 1: its logarithm divides.
    """

    reference: float
    form: Form = "multiplicative"
    scale: float = 0.2
    exponent: float = 0.3
    weight: float = 0.1

    def __post_init__(self) -> None:
        if not self.reference > 0:
            raise UserError("reference", self.reference, allowed="a cost above 0")
        if self.form == "multiplicative" and not self.reference > 1:
            raise UserError(
                "reference",
                self.reference,
                allowed="a cost above 1 in the multiplicative form, which divides by its logarithm",
                hint="Take the additive form.",
            )

    def __call__(self, loss: Tensor, cost: Tensor) -> Tensor:
        """Return what the logits minimise.

        Raises:
            UserError: A cost that the multiplicative form does not know: not above 1.
        """
        if self.form == "additive":
            return loss + self.weight * (cost - self.reference) / self.reference
        if not float(cost.detach()) > 1:
            raise UserError("cost", float(cost.detach()), allowed="above 1", hint="Take the additive form.")
        return self.scale * loss * (cost.log() / torch.tensor(self.reference).log()) ** self.exponent


class GatedAlternation(SampledAlternation):
    """Logits learn from the gates of one sample, and from the expected cost.

    The supernet's relaxation is ``BinaryGates``. In mode "two" the expected cost is that of the pair, whose
    probabilities are renormalised; behind the step the pair gets back the probability that it had together.

    Args:
        cost: Expected cost by mixing weights; None for the loss alone.
        term: How it enters the loss.
        resting: Candidates that stand for nothing at all. An edge that sampled one of them is not updated.
        logits_every: See ``SampledAlternation``.
    """

    def __init__(
        self,
        *,
        cost: ExpectedCost | None = None,
        term: CostTerm | None = None,
        resting: Sequence[str] = ("zero",),
        logits_every: int = 5,
    ) -> None:
        super().__init__(logits_every=logits_every, first="weights")
        self.cost, self.term, self.resting = cost, term, tuple(resting)

    def logit_loss(self, context: StepContext, loss: Tensor, logits: Tensors, mixing: Tensors) -> Tensor:
        """Return the loss with the expected cost of the candidates that the sample involves."""
        if self.cost is None or self.term is None:
            return loss
        probabilities = context.supernet.probabilities(logits)
        for group in context.supernet.options:
            if mixing[group].requires_grad:
                present_EO = probabilities[group].detach() > 0
                masked_EO = logits[group].masked_fill(~present_EO, -torch.inf)
                probabilities[group] = involved_probabilities(masked_EO, mixing[group])
        return self.term(loss, self.cost(probabilities))

    def logit_gradients(self, context: StepContext, gradients: dict[str, Tensor], mixing: Tensors) -> dict[str, Tensor]:
        """Return the gradients, zero on edges whose open candidate rests."""
        result = dict(gradients)
        for group, edges in context.supernet.options.items():
            opened = mixing[group].detach().argmax(dim=-1).tolist()
            rests = torch.tensor([edge[index] in self.resting for edge, index in zip(edges, opened, strict=True)])
            result[group] = gradients[group].masked_fill(rests.to(gradients[group].device).unsqueeze(-1), 0.0)
        return result

    def moved_(self, context: StepContext, before: Tensors, mixing: Tensors) -> None:
        """Give every pair the probability that it had together."""
        relaxation = context.supernet.relaxation
        assert isinstance(relaxation, BinaryGates)
        for group in context.supernet.options:
            relaxation.settle_(context.supernet.logits[group].data, before[group], mixing[group])


class Reinforced(SampledAlternation):
    """Logits learn by REINFORCE: sampled networks, each with a reward, against a moving baseline.

    The reward of a network is ``accuracy * (reference / cost)^exponent`` on one batch of the images for the logits, and
    the gradient is the mean over networks of ``(reward - baseline) * grad(-sum log p(chosen))``. The cost needs no
    gradient: it may be a measurement of the network itself.

    Args:
        cost_of: Cost of a sampled network, from the supernet and the one-hot mixing weights; None for accuracy alone.
        reference: Cost of reward = accuracy.
        exponent: How much the cost counts.
        samples: Networks for each step on the logits.
        baseline: "published" moves it to ``b + decay * (mean - b)``, as the released code does, which nearly copies the
            newest mean; "average" to ``decay * b + (1 - decay) * mean``. The first is the first mean.
        decay: See ``baseline``.
        logits_every: See ``SampledAlternation``.
    """

    def __init__(
        self,
        *,
        cost_of: Callable[[RelaxedSupernet, Tensors], float] | None = None,
        reference: float = 1.0,
        exponent: float = 0.1,
        samples: int = 10,
        baseline: Literal["published", "average"] = "published",
        decay: float = 0.99,
        logits_every: int = 5,
    ) -> None:
        super().__init__(logits_every=logits_every, first="weights")
        if samples < 1:
            raise UserError("samples", samples, allowed="an integer from 1")
        self.cost_of, self.reference, self.exponent = cost_of, reference, exponent
        self.samples, self.share = samples, decay if baseline == "published" else 1 - decay
        self.baseline: float | None = None

    def move_logits(self, context: StepContext) -> None:
        """Take one step on the logits by the rewards of sampled networks."""
        supernet = context.supernet
        logits = {name: tensor.detach().requires_grad_() for name, tensor in supernet.logits.items()}
        batch = random_batch(context.step, *context.where)
        probabilities = supernet.probabilities(logits)
        rewards, surprises = [], []
        for number in range(self.samples):
            mixing = supernet.mixing(context.fixed_logits(), named_stream(context, "network", number))
            with torch.no_grad(), batch_statistics(supernet):
                _, metrics = sampled_loss(context, context.step.logit_task, batch, mixing, "logits", constant=True)
            cost = None if self.cost_of is None else self.cost_of(supernet, mixing)
            rewards.append(reward(float(metrics["accuracy"]), cost, self.reference, self.exponent))
            surprises.append(surprise(probabilities, mixing, supernet.options))
        mean = sum(rewards) / len(rewards)
        self.baseline = mean if self.baseline is None else self.baseline + self.share * (mean - self.baseline)
        weighted = [(own - self.baseline) * value for own, value in zip(rewards, surprises, strict=True)]
        loss = torch.stack(weighted).mean()
        found = torch.autograd.grad(loss, list(logits.values()), allow_unused=True)
        context.move_logits(
            {
                name: torch.zeros_like(tensor) if gradient is None else gradient
                for (name, tensor), gradient in zip(logits.items(), found, strict=True)
            }
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the baseline."""
        return {}, {"baseline": self.baseline}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue with a baseline."""
        self.baseline = state["baseline"]


def reward(accuracy: float, cost: float | None, reference: float, exponent: float) -> float:
    """Return ``accuracy * (reference / cost)^exponent``; the accuracy alone without a cost."""
    return accuracy if cost is None else accuracy * (reference / cost) ** exponent


def surprise(probabilities: Tensors, mixing: Tensors, groups: Mapping[str, Any]) -> Tensor:
    """Return ``-sum log p`` of the candidates that one-hot mixing weights chose."""
    chosen = torch.cat([(probabilities[group] * mixing[group].detach()).sum(dim=-1) for group in groups])
    return -chosen[chosen > 0].log().sum()

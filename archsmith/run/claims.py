"""The numbers of a finished network, established again: counts, memory, latency, accuracy.

Each function returns the detail of a row that is ok, and raises ``Failed`` or ``NotChecked`` otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.cost.backends import Target
from archsmith.cost.latency import Latency, claim, measure_latency
from archsmith.run.checks import Failed, NotChecked
from archsmith.tasks.base import Task

RECORDED = {"macs": "macs", "params": "params", "memory": "memory_bytes"}
"""Exact costs: name in budgets to name among the recorded costs."""

_ACCURACY_TOLERANCE = 1e-6
_TIE = 1e-5


def check_cost(cost: str, found: int, costs: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """Compare a recounted cost exactly with what is recorded and with its limit.

    Args:
        cost: ``"macs"``, ``"params"`` or ``"memory"``.
        found: What the rebuilt network has.
        costs: Recorded costs; ``RECORDED`` has their names.
        limits: Absolute limits by cost.
    """
    what = "bytes of weights and activations" if cost == "memory" else cost
    recorded, limit = costs.get(RECORDED[cost]), limits.get(cost)
    if recorded is not None and recorded != found:
        raise Failed(f"recounted {found:,} {what}, recorded {recorded:,}")
    if limit is not None and found > limit:
        raise Failed(f"recounted {found:,} {what}, above the limit {limit:,}")
    return f"{found:,} {what}" + (f", limit {limit:,}" if limit is not None else "")


def check_latency(
    network: nn.Module, onnx: Path, example: Tensor, recorded: object, limits: Mapping[str, float]
) -> str:
    """Measure the latency again and judge it by the rule for claims; without a limit it is only reported.

    Args:
        network: The rebuilt network, for backend torch.
        onnx: ``model.onnx``, for ONNX Runtime.
        example: One input; repeated to the batch of the claim.
        recorded: The recorded ``Latency.to_dict()``, or None when nothing is claimed.
        limits: ``latency`` in milliseconds per batch and ``throughput`` in examples per second.
    """
    limited = [cost for cost in ("latency", "throughput") if cost in limits]
    if not isinstance(recorded, Mapping):
        if limited:
            raise Failed(f"a limit on {' and '.join(limited)} was set, but no latency is recorded")
        found = measure_latency(network, example, threads=torch.get_num_threads())
        return f"{_shown(found)} in torch at batch 1; nothing was claimed"
    then = Latency.from_dict(recorded)
    terms = then.provenance
    place = "cpu"
    if terms.device != "cpu":
        if not torch.cuda.is_available() or torch.cuda.get_device_name() != terms.device:
            raise NotChecked(f"{then.median_ms:.3g} ms was measured on {terms.device}, which is not here")
        place = "cuda"
    batch = example.expand(terms.input_shapes[0][0], *example.shape[1:]).contiguous()
    on_torch = terms.backend == "torch"
    target: Target = network if on_torch else onnx
    try:
        now = measure_latency(
            target,
            batch,
            backend="torch" if on_torch else "onnxruntime",
            precision="bf16" if terms.precision == "bf16" else "fp32",
            device=place,
            threads=terms.threads,
        )
    except UserError as error:
        raise NotChecked(f"it cannot be measured here: {error}") from error
    text = f"{_shown(now)} now, {_shown(then)} recorded, {terms.backend}, threads {terms.threads}, batch {len(batch)}"
    if not limited:
        return f"{text}; no limit was set"
    if now.provenance.cpu != terms.cpu:
        raise NotChecked(f"{text}; recorded on {terms.cpu}, this is {now.provenance.cpu}")
    bounds = {"latency": limits.get("latency"), "throughput": len(batch) * 1e3 / limits.get("throughput", float("inf"))}
    allowed = min(float(bound) for cost in limited if (bound := bounds[cost]) is not None)
    verdict = claim(now, allowed)
    if verdict == "violated":
        raise Failed(
            f"{text}; the 95 % interval begins at {now.interval_ms[0]:.4g} ms, above the limit {allowed:.4g} ms"
        )
    if verdict == "not verifiable now":
        raise NotChecked(
            f"{text}; too unsteady to be verified now, IQR is {now.iqr_ms / now.median_ms:.0%} of the median"
        )
    return f"{text}; limit {allowed:.4g} ms holds"


def _shown(latency: Latency) -> str:
    return f"{latency.median_ms:.4g} ms"


def check_accuracy(network: nn.Module, task: Task, split: str, recorded: float) -> str:
    """Evaluate again and compare; the same weights on the same data give the same number of correct examples.

    One example more or less is accepted only where the two best logits of some example are equal within rounding: the
    memory format and the thread count change the order of additions, and with it the winner of such a tie.

    Args:
        network: The rebuilt network in eval mode.
        task: The task of the run.
        split: Part to evaluate.
        recorded: Recorded accuracy in [0, 1].
    """
    ties = 0

    def forward(inputs: Tensor) -> Tensor:
        nonlocal ties
        logits: Tensor = network(inputs)
        best = logits.topk(2, dim=-1).values
        ties += int((best[..., 0] - best[..., 1] <= _TIE * logits.abs().amax(dim=-1).clamp(min=1)).sum())
        return logits

    with torch.no_grad():
        found = task.evaluate(forward, split)
    accuracy, examples = float(found["accuracy"]), int(found["examples"])
    difference = abs(accuracy - recorded)
    if difference <= _ACCURACY_TOLERANCE:
        return f"{accuracy:.6f} on {examples} examples, as recorded"
    text = f"evaluated {accuracy:.6f} on {examples} examples, recorded {recorded:.6f}"
    if ties and difference <= 1 / examples + _ACCURACY_TOLERANCE:
        return f"{text}: one example, and {ties} have two best logits that are equal within rounding"
    raise Failed(text)

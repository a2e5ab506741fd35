"""Global distillation: an assembled child is trained end to end towards its parent's hidden states and logits.

Source: Puzzle, arXiv 2411.19146, Sec. 5: cosines of every layer plus KL, no language-model loss. The optimiser is not
given there: AdamW with a cosine schedule, the parent in evaluation mode.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError, UserError
from archsmith.core.files import write_atomic
from archsmith.core.rng import numpy_stream
from archsmith.families.slot_statistics import run_batch
from archsmith.train.activation_cache import Batch, recorded, token_mask
from archsmith.train.local_distill import gkd_loss
from archsmith.train.schedules import annealed


@dataclass(frozen=True)
class Uptraining:
    """How an assembled child is trained.

    Attributes:
        steps: Optimiser steps, each on one batch; 0 for none.
        lr: Peak learning rate, reached after a tenth of the steps and annealed to 0.
        weight_decay: Decoupled weight decay.
        clip_norm: Largest norm of a step's gradient; 0 for no limit.
        checkpoint_every: Steps between checkpoints.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    steps: int = 300
    lr: float = 2e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("checkpoint_every", 1), ("weight_decay", 0), ("clip_norm", 0)):
            if not math.inf > getattr(self, name) >= least:
                raise UserError(name, getattr(self, name), allowed=f"a number from {least}")
        if not math.inf > self.lr > 0:
            raise UserError("lr", self.lr, allowed="a number above 0")


def uptrain(
    child: nn.Module,
    parent: nn.Module,
    layer_paths: Sequence[str],
    batches: Sequence[Batch],
    settings: Uptraining,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> bool:
    """Train ``child`` in place; return whether all steps were made.

    Args:
        child: Same class and layers as the parent.
        parent: Never changed.
        layer_paths: Module path of every layer of both.
        batches: Training batches; their order is a function of seed and pass.
        settings: How.
        seed: Of the order.
        checkpoint: File that training goes on from, and is written to now and then and when it stops.
        should_stop: Asked before each step.
        on_step: Told the number of steps made and the loss.

    Raises:
        ArchsmithError: The loss is not finite.
    """
    child.eval()  # without dropout, like the parent
    named = dict(child.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(named.values(), settings.lr, weight_decay=settings.weight_decay)
    first = _restore(checkpoint, named, optimizer)
    warmup = max(1, settings.steps // 10)
    for step in range(first, settings.steps):
        if should_stop():
            _keep(checkpoint, named, optimizer, step)
            return False
        for group in optimizer.param_groups:
            group["lr"] = annealed(step, peak=settings.lr, total=settings.steps, warmup=warmup, shape="cosine")
        turn, place = divmod(step, len(batches))
        batch = batches[int(numpy_stream(seed, "uptrain", turn).permutation(len(batches))[place])]
        loss = distance(child, parent, layer_paths, batch)
        if not math.isfinite(value := loss.item()):
            raise ArchsmithError(f"The loss of the uptraining is {value} at step {step}; lower lr.")
        loss.backward()
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(named.values(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, value)
        if (step + 1) % settings.checkpoint_every == 0:
            _keep(checkpoint, named, optimizer, step + 1)
    for parameter in named.values():
        parameter.requires_grad_(False)
    return True


def distance(child: nn.Module, parent: nn.Module, layer_paths: Sequence[str], batch: Batch) -> Tensor:
    """Return the loss of one batch; logits take part where both models return them."""
    with torch.no_grad(), recorded(parent, layer_paths) as wanted:
        parent_output = run_batch(parent, batch)
    with recorded(child, layer_paths) as own:
        output = run_batch(child, batch)
    order = range(len(layer_paths))
    return gkd_loss(
        [own[i].output for i in order],
        [wanted[i].output for i in order],
        _logits(output),
        _logits(parent_output),
        mask=token_mask(batch),
    )


def _logits(output: object) -> Tensor | None:
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None


def _keep(path: Path | None, named: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, step: int) -> None:
    if path is None:
        return
    tensors = {f"weight/{name}": parameter.detach().clone() for name, parameter in named.items()}
    for name, parameter in named.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                tensors[f"{key}/{name}"] = optimizer.state[parameter][key]
    write_atomic(path, save({k: t.contiguous() for k, t in tensors.items()}, {"facts": json.dumps({"step": step})}))


def _restore(path: Path | None, named: dict[str, nn.Parameter], optimizer: torch.optim.AdamW) -> int:
    if path is None or not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file, torch.no_grad():
        step = int(json.loads(file.metadata()["facts"])["step"])
        keys = set(file.keys())
        for name, parameter in named.items():
            parameter.copy_(file.get_tensor(f"weight/{name}"))
            if f"exp_avg/{name}" in keys:
                moments = {key: file.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step

"""AtomNAS without shrinking, as the paper writes it: one loss with every term in it, one optimiser line by line."""

import torch
from torch import nn
from torch.nn import functional as F

from archsmith.core.rng import seed_of
from archsmith.methods.atomnas import Settings
from archsmith.tasks.base import Task


def train(
    network: nn.Module, task: Task, settings: Settings, seed: int, steps: int, weights: dict[str, float]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return parameters and their averages after ``steps`` steps of the first epoch, linear rate without warm-up."""
    network.train()
    params = dict(network.named_parameters())
    v, b = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    ema = {name: p.detach().clone() for name, p in params.items()}
    decayed = [n for n, p in params.items() if p.dim() == 4 or n.startswith("classifier")]
    per_epoch = task.steps_per_epoch(settings.batch_size)
    batches = task.batches("train", batch_size=settings.batch_size, seed=seed_of(seed, "order"), epoch=0)
    for t, batch in zip(range(steps), batches, strict=False):
        lr = settings.lr * (1 - t / (settings.epochs * per_epoch))
        rho = settings.rho * min(1.0, t / (settings.warmup_epochs * per_epoch))
        probabilities = network(batch.inputs).log_softmax(1)
        targets = 0.9 * F.one_hot(batch.targets, task.num_classes) + 0.1 / task.num_classes
        loss = -(targets * probabilities).sum(1).mean()
        loss = loss + 0.5 * settings.weight_decay * sum((params[n] ** 2).sum() for n in decayed)
        loss = loss + rho * sum(c * params[f"{group}.norm.weight"].abs().sum() for group, c in weights.items())
        gradients = torch.autograd.grad(loss, list(params.values()))
        d = min(settings.ema_decay, (2 + t) / (11 + t))
        with torch.no_grad():
            for (name, p), g in zip(params.items(), gradients, strict=True):
                v[name] = 0.9 * v[name] + 0.1 * g**2
                b[name] = 0.9 * b[name] + g / torch.sqrt(v[name] + 1e-3)
                p -= lr * b[name]
                ema[name] = d * ema[name] + (1 - d) * p
    return {name: p.detach() for name, p in params.items()}, ema

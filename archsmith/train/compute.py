"""How a training step is computed: in which parts, on which device, in which precision, compiled or not.

A batch is cut into contiguous parts, and each part is a small batch of its own: own batch statistics, own streams of
augmentation and dropout. The gradient is the mean over the parts, and so are the running statistics. Where the parts
are computed does not matter: one after another in one process (``micro_batches``), or each in a process of its own
(``Workers``). So N processes do what one process does with N micro-batches, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.base import Batch, Forward
from archsmith.train.workers import Workers

Precision = Literal["float32", "bf16"]
P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How training steps are computed; the default is the plain step of one process.

    Args:
        workers: The processes that share every batch.
        micro_batches: Parts that each process computes one after another (gradient accumulation).
        device: Where the network and its optimiser live. Batches are augmented on the CPU and moved.
        precision: "bf16" runs the training forward under ``torch.autocast``: convolutions and matrix products in
            bfloat16, while weights, scales, their penalty, the loss and the optimiser stay float32. Recalibration and
            validation always are float32, as the exported network is.
        compile: Backend of ``torch.compile`` for the training forward ("inductor"), or None for eager.
    """

    workers: Workers = field(default_factory=Workers)
    micro_batches: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    precision: Precision = "float32"
    compile: str | None = None

    @property
    def parts(self) -> int:
        """Parts of every batch, all processes together."""
        return self.workers.count * self.micro_batches

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a batch that cannot be cut into parts of equal size, at least two examples each.

        Raises:
            UserError: So it is.
        """
        if batch_size % self.parts or batch_size < 2 * self.parts:
            raise UserError(
                "batch_size",
                batch_size,
                allowed=f"a multiple of {self.parts}, at least {2 * self.parts}",
                hint=f"Every batch is cut into {self.workers.count} (processes) x {self.micro_batches} (micro-batches) "
                "parts of at least two examples.",
            )

    def forward(self, network: nn.Module) -> Forward:
        """Return what runs ``network`` while training; call it again after every cut.

        With ``compile`` all that was compiled before is forgotten: a cut replaces tensors inside the same modules, and
        code compiled for the old shapes would only fill the cache until torch silently falls back to eager.
        """
        inner: Forward = network
        if self.compile is not None:
            torch.compiler.reset()
            # Inductor's own random numbers would give dropout other masks than the seeds of (epoch, step) name.
            options: dict[str, Any] | None = {"fallback_random": True} if self.compile == "inductor" else None
            inner = torch.compile(network, backend=self.compile, dynamic=False, options=options)
        if self.precision == "float32" and self.device.type == "cpu":
            return inner

        def run(inputs: Tensor) -> Tensor:
            inputs = inputs.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                outputs = inner(inputs)
            return outputs.float()

        return run

    def evaluating(self, network: nn.Module) -> Forward:
        """Return what runs ``network`` outside of training: float32, eager, on the device."""
        return lambda inputs: network(inputs.to(self.device))

    def over_parts(
        self, network: nn.Module, count: int, run: Callable[[slice, tuple[int, ...]], P], *, together: bool = True
    ) -> list[P]:
        """Call ``run`` for every part of this process; buffers of ``network`` end as the means over the parts.

        Each part begins with the buffers as they were, as a process that computes only this part would.

        Args:
            network: Its running statistics change in ``run``.
            count: Examples of the whole batch.
            run: Called with the part's slice of the batch and the names that set its random streams apart from those of
                other parts: none when the whole batch is one part.
            together: Average the buffers over the processes too.

        Returns:
            What ``run`` returned, part by part.
        """
        size = count // self.parts
        first = self.workers.rank * self.micro_batches
        numbers = range(first, first + self.micro_batches)
        parts = [(slice(n * size, (n + 1) * size), (n,)) for n in numbers]
        if self.parts == 1:
            return [run(slice(0, count), ())]
        buffers = list(network.buffers())
        with torch.no_grad():
            before = [buffer.clone() for buffer in buffers]
            sums = [torch.zeros_like(buffer) for buffer in buffers]
        results = []
        for part in parts:
            with torch.no_grad():
                for buffer, old in zip(buffers, before, strict=True):
                    buffer.copy_(old)
            results.append(run(*part))
            with torch.no_grad():
                for total, buffer in zip(sums, buffers, strict=True):
                    total.add_(buffer)
        with torch.no_grad():
            for buffer, total in zip(buffers, sums, strict=True):
                if buffer.is_floating_point():
                    buffer.copy_(total / self.micro_batches)
        if together:
            self.workers.mean_([buffer for buffer in buffers if buffer.is_floating_point()])
        return results

    @torch.no_grad()
    def combine_(self, network: nn.Module, figures: list[dict[str, float]]) -> dict[str, float]:
        """Turn the summed gradients of this process's parts into the means over all parts; return the mean figures.

        The running statistics are averaged over the processes in the same exchange.

        Args:
            network: After the backward pass of every part.
            figures: Numbers of each part of this process, the same names everywhere.
        """
        if self.parts == 1:
            return figures[0]
        names = list(figures[0])
        means = torch.tensor([sum(part[name] for part in figures) for name in names], dtype=torch.float64)
        means /= self.micro_batches
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if self.micro_batches > 1:
            torch._foreach_div_(gradients, self.micro_batches)
        buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self.workers.mean_([*gradients, *buffers, means])
        return dict(zip(names, means.tolist(), strict=True))

    def random_devices(self) -> list[torch.device]:
        """Return the devices whose random state a training step draws from, besides the CPU."""
        return [] if self.device.type == "cpu" else [self.device]

    def seed_(self, seed: int) -> None:
        """Seed what ``random_devices`` and the CPU draw from.

        On the CPU its generator alone: ``torch.manual_seed`` also formats a stack trace for a CUDA that may wake later,
        which takes longer than most of what a step does besides the network.
        """
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)


def part_of(batch: Batch, part: slice) -> Batch:
    """Return the examples ``part`` of a batch; tensors in its context that have one row per example are cut alike."""
    if part == slice(0, len(batch)):
        return batch
    context = {
        name: value[part] if isinstance(value, Tensor) and value.dim() and len(value) == len(batch) else value
        for name, value in batch.context.items()
    }
    return Batch(batch.inputs[part], batch.targets[part], MappingProxyType(context))


def resolve_device(name: str) -> Literal["cpu", "cuda"]:
    """Return the kind of device that ``name`` stands for: "auto" is "cuda" where there is one, else "cpu".

    Raises:
        UserError: Another name, or "cuda" without a CUDA device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError("device", name, allowed="auto, cpu, cuda")
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise UserError(
            "device",
            Shown("cuda, but torch finds no CUDA device here"),
            allowed="cpu, or auto, which takes a CUDA device where there is one",
            hint="Install a CUDA build of torch, or run with --device cpu.",
        )
    return "cuda" if name != "cpu" and present else "cpu"

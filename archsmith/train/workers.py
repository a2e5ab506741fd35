"""The processes of one run: how they average, how the first one decides for all, and how they fail together.

Every process holds the whole network and does the same steps. What a step has to exchange is the mean of gradients and
running statistics, one flattened sum over the processes after the backward pass. ``DistributedDataParallel`` would hide
a part of that time behind the backward pass, but it fixes the parameters when it wraps a module: every cut would need a
new wrapper, and surgery would have to reach through it. A sum by hand knows no more than the tensors that are there at
this step.

Before each exchange the processes tell each other what they are about to do and whether one of them failed. So an
exception anywhere ends all of them with its message, and none waits for a partner that is gone.

Lightning Fabric starts the process group (gloo on CPUs, NCCL on CUDA devices), picks the device and does the sums and
broadcasts; no module is wrapped by it.
"""

from __future__ import annotations

import atexit
import logging
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast, final

import torch
from torch import Tensor

from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.core.processes import local_process_count, process_count

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")

_TIMEOUT = timedelta(days=2)
"""Longest time that a process waits for another: it may train baselines or write files meanwhile. A process that died
is noticed at once, because its connection is closed."""


class WorkerFailed(ArchsmithError):
    """Another process of the run failed; holds its message."""


class WorkerLost(ArchsmithError):
    """The connection to another process broke."""


@final
class Workers:
    """This process and the others that compute the same run; alone by default.

    Args:
        fabric: A launched Fabric over all processes, or None for a single one. ``open_workers`` makes it.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        main: Whether this is the process that decides, and that alone writes files.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.count = 1 if fabric is None else fabric.world_size
        self.main = self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in place.

        Args:
            tensors: Floating point tensors, the same shapes in the same order everywhere. They travel as one vector for
                each dtype and device. Every process ends with the same bits.
        """
        if self._fabric is None or not tensors:
            return
        self._meet("a mean", *(tuple(tensor.shape) for tensor in tensors))
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        for members in kinds.values():
            flat = torch.cat([member.reshape(-1) for member in members])
            flat = self._sum(flat).div_(self.count)
            for member, values in zip(members, flat.split([member.numel() for member in members]), strict=True):
                member.copy_(values.view_as(member))

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in at least one process."""
        if self._fabric is None:
            return flag
        return bool(self._meet("a wish", value=int(flag)).any())

    def share(self, value: T) -> T:
        """Return the value that the main process has; what others give is ignored."""
        if self._fabric is None:
            return value
        if self.main:
            pickle.dumps(value)  # what cannot be sent has to fail before the others wait for it
        self._meet("a message")
        return self._broadcast(value, 0)

    def from_main(self, make: Callable[[], T]) -> T:
        """Return ``make()`` of the main process; elsewhere ``make`` is not called."""
        return self.share(make() if self.main else cast(T, None))

    def require_equal(self, what: str, content: bytes) -> None:
        """Assert that ``content`` is the same in all processes.

        Raises:
            RuntimeError: It is not: a defect of archsmith or of the machine, no wrong input.
        """
        if self._fabric is None:
            return
        found = self._meet(what, value=zlib.crc32(content))
        if len(set(found.tolist())) > 1:
            raise _Disagreement(f"the processes disagree on {what}: digests {found.tolist()}.")

    def finish(self) -> None:
        """Wait until every process has come to its end."""
        if self._fabric is not None:
            self._meet("the end")

    def tell(self, error: Exception) -> None:
        """Let the others know that this process failed; called once, as the last thing of all."""
        if self._fabric is None:
            return
        try:
            first = int(self._gather(torch.tensor([1, 0, 0]))[:, 0].argmax())
            self._broadcast(_text(error), first)
        except WorkerLost:
            pass  # nobody is left to be told

    def _meet(self, what: str, *details: object, value: int = 0) -> Tensor:
        """Exchange (failed, what comes next, value); return the values (count,), or raise what another one failed with.

        Raises:
            WorkerFailed: Another process failed.
            WorkerLost: Another process is gone.
            RuntimeError: The processes are not at the same place.
        """
        code = zlib.crc32(repr((what, details)).encode())
        found = self._gather(torch.tensor([0, code, value]))
        if bool(found[:, 0].any()):
            first = int(found[:, 0].argmax())
            raise WorkerFailed(f"process {first} of {self.count} failed: {self._broadcast('', first)}")
        if len(set(found[:, 1].tolist())) > 1:
            raise _Disagreement(f"process {self.rank} came to {what}, another one to something else.")
        return found[:, 2]

    def _gather(self, row: Tensor) -> Tensor:
        """Return every process's row (3,) as (count, 3), through a sum: each fills its own line."""
        table = torch.zeros(self.count, len(row), dtype=torch.int64)
        table[self.rank] = row
        return self._sum(table.to(self._device)).cpu()

    @property
    def _device(self) -> torch.device:
        assert self._fabric is not None
        return self._fabric.device

    def _sum(self, tensor: Tensor) -> Tensor:
        assert self._fabric is not None
        with _connected():
            return cast(Tensor, self._fabric.all_reduce(tensor, reduce_op="sum"))

    def _broadcast(self, value: T, source: int) -> T:
        assert self._fabric is not None
        with _connected():
            return self._fabric.broadcast(value, src=source)


class _Disagreement(RuntimeError):
    """All processes raise it at the same place: there is nobody to be told."""


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise WorkerLost(f"the connection to another process of the run broke ({reason}).") from error


_open: list[Workers] = []
"""The workers that this process belongs to, while a block of ``open_workers`` is entered."""

_launched: dict[str, Any] = {}
"""The Fabric of this process by kind of device; a process group is made once in the life of a process."""


@contextmanager
def open_workers(device: str = "cpu") -> Iterator[Workers]:
    """Yield the workers of this process: those that ``torchrun`` started, or this one alone.

    An exception that leaves the block is told to the other processes, which raise ``WorkerFailed`` at their next
    exchange; it gets the attribute ``told``. At its normal end the block waits for all. A block inside another one
    yields the same workers and leaves the rest to the outer one.

    Args:
        device: "cpu" or "cuda": what the processes exchange tensors of.

    Raises:
        UserError: More processes on this machine than it has CUDA devices.
    """
    if _open or process_count() == 1:
        yield _open[0] if _open else Workers()
        return
    workers = Workers(_fabric(device))
    _open.append(workers)
    try:
        yield workers
        workers.finish()
    except (WorkerFailed, WorkerLost) as error:
        error.told = True
        raise
    except _Disagreement:
        raise
    except Exception as error:
        workers.tell(error)
        if isinstance(error, ArchsmithError):
            error.told = True
        raise
    finally:
        _open.remove(workers)


def _fabric(device: str) -> Fabric:
    if device not in _launched:
        # Imported here: it takes more than a second, and a process that is alone does not need it.
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        local = local_process_count()
        if device == "cuda" and local > torch.cuda.device_count():
            raise UserError(
                "--nproc-per-node",
                local,
                allowed=f"at most {torch.cuda.device_count()}, the CUDA devices of this machine",
            )
        for name in ("distributed", "rank_zero"):
            logging.getLogger(f"lightning_fabric.utilities.{name}").setLevel(logging.WARNING)
        fabric = Fabric(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=local,
            num_nodes=process_count() // local,
            strategy=DDPStrategy(timeout=_TIMEOUT),  # its process group and collectives; no module is given to it
        )
        fabric.launch()
        atexit.register(_leave)
        _launched[device] = fabric
    return cast("Fabric", _launched[device])


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ArchsmithError) else f"{type(error).__name__}: {error}"


def refuse_unrepeatable(resume_note: str, count: int) -> None:
    """Refuse a task whose order archsmith cannot repeat when several processes must see the same batches.

    Raises:
        UserError: ``count`` is above 1 and the task has a ``resume_note``.
    """
    if count > 1 and resume_note:
        raise UserError(
            "task",
            Shown("a training loader whose order archsmith cannot seed"),
            allowed="with several processes: a torch sampler over a dataset with __getitem__",
            hint="Every process draws the same batches and takes its part of each.",
        )

"""Ray as an executor: candidate evaluation on a cluster, each with the resources it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from archsmith.core.errors import MissingExtra, UserError
from archsmith.run.study import WorkerLost

P = ParamSpec("P")
T = TypeVar("T")


class RayExecutor(Executor):
    """Runs calls as Ray tasks: ``run_study(..., executor=RayExecutor(num_gpus=1), workers=8)``.

    Connects to the cluster of ``ray.init`` if the program has called it, else to ``address``. Calls are retried by the
    study, not by Ray, so that the journal knows of each attempt: a node or worker process that dies raises
    ``WorkerLost``.

    Args:
        num_cpus: Cores that one evaluation occupies.
        num_gpus: GPUs, parts allowed.
        memory_bytes: Memory, for Ray's scheduling; None for no claim.
        resources: Custom resources by name.
        address: Of the cluster: ``"auto"`` for the running one, None to start one on this machine.
        runtime_env: Ray's description of what workers need (working directory, packages), passed on.

    Raises:
        UserError: A negative resource.
        MissingExtra: The extra ``ray`` is not installed.
    """

    def __init__(
        self,
        *,
        num_cpus: float = 1,
        num_gpus: float = 0,
        memory_bytes: int | None = None,
        resources: Mapping[str, float] | None = None,
        address: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        claims = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory_bytes": memory_bytes or 0, **(resources or {})}
        for name, amount in claims.items():
            if not amount >= 0:
                raise UserError(name, amount, allowed="0 or more")
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("ray", "ray", "evaluation on a Ray cluster") from error
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": 0}
        if memory_bytes is not None:
            options["memory"] = memory_bytes
        if resources:
            options["resources"] = dict(resources)
        if runtime_env:
            options["runtime_env"] = dict(runtime_env)
        self._call = ray.remote(_call).options(**options)
        self._stored: dict[int, tuple[Any, Any]] = {}  # by id; the object is kept, so that its id stays its own

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start ``fn(*args, **kwargs)`` on the cluster.

        The first argument (the evaluator of a study) is sent to the cluster once, not with every call.
        """
        head, rest = args[:1], args[1:]
        sent = [self._put(value) for value in head]
        reference = self._call.remote(fn, *sent, *rest, **kwargs)
        future: _RayFuture[T] = _RayFuture(self._ray, reference)
        reference.future().add_done_callback(future.take)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster if this executor has joined it."""
        self._stored.clear()
        if self._ours and self._ray.is_initialized():
            self._ray.shutdown()

    def _put(self, value: Any) -> Any:
        if id(value) not in self._stored:
            self._stored[id(value)] = (value, self._ray.put(value))
        return self._stored[id(value)][1]


def _call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


class _RayFuture(Future[T]):
    """A future whose cancelling ends the task, and which tells a dead worker from a failed call."""

    def __init__(self, ray: Any, reference: Any) -> None:
        super().__init__()
        self._ray, self._reference = ray, reference

    def take(self, inner: Future[Any]) -> None:
        """Take over what Ray's own future has come to."""
        if not self.set_running_or_notify_cancel():
            return
        errors = self._ray.exceptions
        error = inner.exception()
        if error is None:
            self.set_result(inner.result())
        elif isinstance(error, errors.RayTaskError):  # raised by the call itself
            self.set_exception(error.cause if isinstance(error.cause, Exception) else error)
        elif isinstance(error, errors.RayError):
            self.set_exception(WorkerLost(" ".join(f"{type(error).__name__}: {error}".split())[:300]))
        else:
            self.set_exception(error)

    def cancel(self) -> bool:
        """End the task, wherever it runs."""
        self._ray.cancel(self._reference, force=True)
        return super().cancel()

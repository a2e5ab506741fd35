"""Runs a function in processes that believe torchrun started them: forked, so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import lightning_fabric  # imported here once instead of in every forked process
import torch

from archsmith.train.workers import Workers, open_workers

assert lightning_fabric


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(function: Callable[..., Any], rank: int, count: int, port: int, queue: Any) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        with open_workers() as workers:
            result: Any = function(workers)
        queue.put((rank, pickle.dumps(result), None))  # not as tensors, whose memory would end with this process
    except Exception as error:
        queue.put((rank, pickle.dumps(f"{type(error).__name__}: {error}"), traceback.format_exc()))


def outcomes(function: Callable[[Workers], Any], count: int = 2) -> list[tuple[Any, str | None]]:
    """Return (result, None) or (error as text, traceback) of each process, by rank."""
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), free_port()
    processes = [context.Process(target=_enter, args=(function, n, count, port, queue)) for n in range(count)]
    for process in processes:
        process.start()
    try:
        sent = [queue.get(timeout=100) for _ in processes]
        for process in processes:
            process.join(20)
            assert not process.is_alive()
    finally:
        for process in processes:
            process.kill()
    found = {rank: (pickle.loads(result), trace) for rank, result, trace in sent}  # noqa: S301
    return [found[rank] for rank in range(count)]


def in_processes(function: Callable[[Workers], Any], count: int = 2) -> list[Any]:
    """Return what the function returned in each process, by rank; fail when one raised."""
    results = outcomes(function, count)
    for _, trace in results:
        assert trace is None, trace
    return [result for result, _ in results]

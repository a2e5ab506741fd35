"""One decision for all ranks of a plain torch.distributed loop."""

from __future__ import annotations

import torch
from two_processes import in_processes

from archsmith.train.agree import from_first_rank
from archsmith.train.workers import Workers


def test_alone_it_is_just_the_call() -> None:
    assert from_first_rank(lambda: 7) == 7


def test_rank_0_decides_and_its_failure_is_everyones() -> None:
    def work(workers: Workers) -> object:
        called = []

        def make() -> torch.Tensor:
            called.append(workers.rank)
            return torch.tensor([workers.rank])

        decided = from_first_rank(make).tolist()

        def fail() -> None:
            raise ValueError("no gradient")

        try:
            from_first_rank(fail)
        except Exception as error:
            return decided, called, f"{type(error).__name__}: {error}"

    first, second = in_processes(work)
    assert first == ([0], [0], "ValueError: no gradient")
    assert second == ([0], [], "RuntimeError: rank 0 failed: ValueError: no gradient")

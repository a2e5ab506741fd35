"""Exchanges between real processes over gloo."""

import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from two_processes import _enter, free_port, in_processes, outcomes

from archsmith.core.errors import UserError
from archsmith.core.processes import local_process_count, process_count, process_rank
from archsmith.train.workers import Workers, open_workers, refuse_unrepeatable


def test_a_single_process_is_alone():
    assert (process_rank(), process_count(), local_process_count()) == (0, 1, 1)
    with open_workers() as workers:
        assert (workers.rank, workers.count, workers.main) == (0, 1, True)
        tensor = torch.arange(3.0)
        workers.mean_([tensor])
        assert tensor.tolist() == [0.0, 1.0, 2.0]
        assert workers.any(True) and not workers.any(False)
        assert workers.share("x") == workers.from_main(lambda: "x") == "x"
        workers.require_equal("anything", b"")


def exchange(workers):
    n = float(workers.rank)
    strided = torch.full((2, 3, 2, 2), n).contiguous(memory_format=torch.channels_last)
    strided[0, 1] += 1
    parameter = torch.nn.Parameter(torch.tensor([1.0, 10.0 * n]))
    double = torch.tensor(n, dtype=torch.float64)
    workers.mean_([strided, parameter, double])
    workers.mean_([])
    workers.require_equal("what is equal", b"same")
    return {
        "strided": (strided[0, 1].tolist(), strided[1, 2].tolist(), strided.stride()),
        "parameter": parameter.tolist(),
        "double": double.item(),
        "any": [workers.any(False), workers.any(workers.rank == 1), workers.any(True)],
        "share": workers.share({"rank": workers.rank}),
        "from_main": workers.from_main(lambda: [workers.rank]),
        "me": (workers.rank, workers.count, workers.main),
    }


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_average_and_agree(count):
    results = in_processes(exchange, count)
    half = (count - 1) / 2
    stride = torch.empty(2, 3, 2, 2).contiguous(memory_format=torch.channels_last).stride()
    for rank, found in enumerate(results):
        assert found.pop("me") == (rank, count, rank == 0)
        assert found == {
            "strided": ([[half + 1] * 2] * 2, [[half] * 2] * 2, stride),
            "parameter": [1.0, 10 * half],
            "double": half,
            "any": [False, True, True],
            "share": {"rank": 0},
            "from_main": [0],
        }


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_ends_all_with_its_message(failing):
    def work(workers):
        workers.mean_([torch.zeros(1)])
        if workers.rank == failing:
            raise UserError("lr", -1, allowed="a number above 0")
        workers.mean_([torch.zeros(1)])

    found = outcomes(work)
    assert found[failing][0] == "UserError: lr: got -1; allowed: a number above 0."
    assert (
        found[1 - failing][0] == f"WorkerFailed: process {failing} of 2 failed: lr: got -1; allowed: a number above 0."
    )


def test_a_failure_after_the_last_exchange_and_two_at_once_are_told_too():
    def late(workers):
        if workers.rank == 1:
            raise KeyError("late")

    def both(workers):
        raise ValueError(f"of {workers.rank}")

    assert [text for text, _ in outcomes(late)] == [
        "WorkerFailed: process 1 of 2 failed: KeyError: 'late'",
        "KeyError: 'late'",
    ]
    assert [text for text, _ in outcomes(both)] == ["ValueError: of 0", "ValueError: of 1"]


def test_what_cannot_be_sent_fails_everywhere():
    found = outcomes(lambda workers: workers.from_main(lambda: lambda: 0))
    assert "pickle" in found[0][0]
    assert found[1][0].startswith("WorkerFailed: process 0 of 2 failed")


def test_different_masks_or_different_places_are_noticed():
    masks = outcomes(lambda workers: workers.require_equal("the masks of a cut", bytes([workers.rank])))
    assert all("the processes disagree on the masks of a cut" in text for text, _ in masks)
    places = outcomes(lambda workers: workers.share(0) if workers.main else workers.mean_([torch.zeros(1)]))
    assert all("another one to something else" in text for text, _ in places)
    shapes = outcomes(lambda workers: workers.mean_([torch.zeros(2 + workers.rank)]))
    assert all("another one to something else" in text for text, _ in shapes)


def test_a_process_that_vanishes_ends_the_others():
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), free_port()

    def vanish(workers: Workers):
        workers.mean_([torch.zeros(1)])
        if workers.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        workers.mean_([torch.zeros(1)])

    processes = [context.Process(target=_enter, args=(vanish, n, 2, port, queue)) for n in range(2)]
    for process in processes:
        process.start()
    rank, text, _ = queue.get(timeout=60)
    assert rank == 0
    assert pickle.loads(text).startswith("WorkerLost: the connection to another process of the run broke")  # noqa: S301
    for process in processes:
        process.join(60)


def test_an_order_that_cannot_be_repeated_is_refused():
    refuse_unrepeatable("", 2)
    refuse_unrepeatable("resumes at epoch starts", 1)
    with pytest.raises(UserError, match=r"task: got a training loader .*with several processes: a torch sampler"):
        refuse_unrepeatable("resumes at epoch starts", 2)

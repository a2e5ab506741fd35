"""Cuts inside ``DistributedDataParallel``: two real processes against one."""

import copy

import pytest
import torch
from cut_samples import REMOVED, Block, batches, block_groups, steps
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_processes

from archsmith.atoms.plan import plan_cut
from archsmith.atoms.transaction import apply_
from archsmith.atoms.wrappers import rewrap
from archsmith.core.errors import ArchsmithError, UserError
from archsmith.train.workers import Workers


class Quiet(Block):
    """Without batch statistics, so that two halves of a batch give the whole's gradient."""

    def forward(self, x):
        self.bn1.eval()
        self.bn2.eval()
        return super().forward(x)


def start():
    torch.manual_seed(0)
    model = Quiet().double()
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def train_in_two(workers: Workers):
    model, optimizer = start()
    data = [(x[workers.rank :: 2], y[workers.rank :: 2]) for x, y in batches(10)]
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    wrapper.register_comm_hook(None, allreduce_hook)
    steps(wrapper, optimizer, data[:5])
    outcome = apply_(wrapper, plan_cut(block_groups(), REMOVED, model), optimizers=[optimizer])
    with pytest.raises(
        UserError, match=r"a DistributedDataParallel wrapper older than the last cut; .*rewrap\(model\)"
    ):
        wrapper(data[0][0].double())
    renewed = rewrap(wrapper)  # the old one is still alive
    assert isinstance(renewed, DistributedDataParallel) and renewed.find_unused_parameters and renewed is not wrapper
    assert renewed._comm_hooks == wrapper._comm_hooks != []
    steps(renewed, optimizer, data[5:])
    return {name: value.tolist() for name, value in model.state_dict().items()}, outcome.notes


def test_two_processes_cut_and_train_like_one():
    (first, notes), (second, _) = in_processes(train_in_two)
    assert notes == ("a DistributedDataParallel wrapper must be renewed: model = rewrap(model)",)
    assert first == second
    model, optimizer = start()
    steps(model, optimizer, batches(10)[:5])
    apply_(model, plan_cut(block_groups(), REMOVED, model), optimizers=[optimizer])
    steps(model, optimizer, batches(10)[5:])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(first[name], dtype=value.dtype), value, rtol=0, atol=1e-12, msg=name)


def cut_differently(workers: Workers):
    model, _ = start()
    wrapper = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="no"):
        apply_(wrapper, plan_cut(block_groups(), REMOVED, model), verify=fail)
    wrapper(batches(1)[0][0].double())  # a cut that was taken back forbids nothing
    apply_(wrapper, plan_cut(block_groups(), {"a": [workers.rank]}, model))
    rewrap(wrapper)


def fail(model):
    raise RuntimeError("no")


def test_processes_that_cut_different_units_are_stopped():
    def caught(workers):
        try:
            cut_differently(workers)
        except ArchsmithError as error:
            return str(error)

    for text in in_processes(caught):
        assert text.startswith("processes [1] cut other units than process 0: every process must make the same cuts")


def test_other_modules_are_returned_as_they_are():
    model, _ = start()
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert rewrap(model) is model and rewrap(compiled) is compiled

import hashlib

import pytest
import torch
from darts_runs import small_family, small_task

from archsmith.core.errors import UserError
from archsmith.families.darts_supernet import DartsSupernet
from archsmith.supernet.mixed import GumbelSoftmax
from archsmith.train.bilevel import Bilevel, BilevelStep, bilevel_epoch, halves
from archsmith.train.distill import distillation, voted
from archsmith.train.loop import Position
from archsmith.train.taught import Taught, Teaching


class Run:
    """A supernet with its optimisers that can be trained step by step."""

    def __init__(self, updater, *, relaxation=None, logit_lr=0.1, seed=5):
        first, second = halves(small_task(), 3)
        self.supernet: DartsSupernet = small_family(nodes=1, operations=("skip_connect", "dil_conv_3x3")).supernet(
            seed=0, relaxation=relaxation
        )
        self.step = BilevelStep(weight_task=first, logit_task=second, batch_size=4, seed=seed)
        self.optimizer = torch.optim.SGD(self.supernet.weights().values(), 0.1, 0.9, weight_decay=1e-3)
        self.adam = torch.optim.Adam(self.supernet.logits.parameters(), logit_lr)
        self.updater, self.position = updater, Position()
        updater.begin_(self.supernet, self.optimizer, fresh=True)
        self.hashes = []

    def go(self, steps):
        """Train this many steps; ``hashes`` get the state before each."""
        left = [steps]

        def on_step(position, loss):
            left[0] -= 1

        for _ in range(steps):
            if self.position.step >= self.step.weight_task.steps_per_epoch(4):
                self.position.epoch, self.position.step = self.position.epoch + 1, 0
            self.hashes.append(digest(dict(self.supernet.network.named_parameters()), dict(self.supernet.logits)))
            bilevel_epoch(
                self.supernet,
                self.optimizer,
                self.adam,
                self.step,
                self.position,
                rate=0.05,
                updater=self.updater,
                should_stop=lambda: True,
            )
        return self

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.supernet.state_dict().items()}


def digest(weights, logits):
    made = hashlib.sha256()
    for name, tensor in (*sorted(weights.items()), *sorted(logits.items())):
        made.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("changes", [{"teachers": 0}, {"weight": 0.0}, {"ramp_steps": 1e300}])
@pytest.mark.parametrize("order", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_without_teachers_or_weight_it_is_darts_bit_for_bit(changes, order):
    plain = Run(Bilevel(order)).go(5)
    taught = Run(Taught(order, Teaching(**changes))).go(5)
    assert same(plain.tensors(), taught.tensors())
    assert not same(plain.tensors(), Run(Taught(order, Teaching(weight=5.0))).go(5).tensors())


def test_teachers_draw_no_random_numbers():
    random = torch.get_rng_state()
    Run(Taught("first", Teaching()), relaxation=GumbelSoftmax()).go(3)
    assert torch.equal(torch.get_rng_state(), random)
    again, other = (Run(Taught("first", Teaching()), relaxation=GumbelSoftmax()).go(3) for _ in range(2))
    assert same(again.tensors(), other.tensors())


def test_the_queue_holds_the_states_before_the_last_steps():
    run = Run(Taught("first", Teaching(teachers=3))).go(5)
    queue = run.updater.queue
    assert [each.step for each in queue] == [2, 3, 4]
    assert [digest(each.weights, each.logits) for each in queue] == run.hashes[2:5]
    assert len(set(run.hashes)) == 5


def test_teachers_of_every_other_step_and_of_epochs():
    every = Run(Taught("first", Teaching(every=2))).go(6).updater.queue
    assert [each.step for each in every] == [0, 2, 4]
    run = Run(Taught("first", Teaching(unit="epoch")))
    assert run.step.weight_task.steps_per_epoch(4) == 4
    assert [each.step for each in run.go(9).updater.queue] == [0, 4, 8]


def test_the_first_step_has_no_teacher_and_the_second_one():
    plain, taught = Run(Bilevel("first")).go(1), Run(Taught("first", Teaching(weight=5.0))).go(1)
    assert same(plain.tensors(), taught.tensors()) and taught.position.sums["distillation"] == 0.0
    assert not same(plain.go(1).tensors(), taught.go(1).tensors())
    assert taught.position.sums["distillation"] > 0.0


def test_the_term_is_the_one_of_the_formula():
    """The loss that moves the weights, computed again by hand from what the queue held."""
    run = Run(Taught("first", Teaching(teachers=2, weight=0.7, temperature=3.0)), logit_lr=0.0).go(3)
    queue = [(dict(each.weights), dict(each.logits)) for each in run.updater.queue]
    seen, before = [], run.tensors()
    handle = run.supernet.network.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    figures = run.position.sums["distillation"]
    run.go(1)
    handle.remove()
    inputs = seen[1]  # the logits' batch came first
    assert len(seen) == 4 and torch.equal(seen[2], inputs) and torch.equal(seen[3], inputs)
    supernet = Run(Bilevel("first")).supernet
    supernet.load_state_dict(before)
    supernet.train()
    with torch.no_grad():
        answers = [supernet.functional(inputs, *teacher) for teacher in queue]
        expected = 0.7 * distillation(supernet(inputs), voted(answers, 3.0), 3.0)
    assert run.position.sums["distillation"] - figures == pytest.approx(expected.item(), rel=1e-5)


def test_the_weight_rises():
    terms = []
    for ramp in (0.0, 8.0):
        run = Run(Taught("first", Teaching(weight=1e-6, ramp_steps=ramp)))
        terms.append([])
        for _ in range(10):
            before = run.position.sums.get("distillation", 0.0)
            run.go(1)
            terms[-1].append(run.position.sums["distillation"] - before)
    ratios = [rising / full for full, rising in zip(*terms, strict=True) if full]
    assert ratios == pytest.approx([min(1.0, step / 8) for step in range(1, 10)], rel=0.02)


def test_running_statistics_are_those_of_the_student_alone():
    plain, taught = (
        Run(updater, logit_lr=0.0).go(2) for updater in (Bilevel("first"), Taught("first", Teaching(weight=1e-12)))
    )
    counts = [
        [int(buffer) for name, buffer in run.supernet.named_buffers() if name.endswith("num_batches_tracked")]
        for run in (plain, taught)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("order", ["first", "second"])
def test_logits_learn_from_the_vote_only_when_they_shall(order):
    def logits(**changes):
        updater = Taught(order, Teaching(weight=5.0, **changes))
        run = Run(updater).go(1)
        seen = []
        moved = type(run.adam).step

        def step(adam, *args):
            seen.extend(tensor.grad.clone() for tensor in run.supernet.logits.values())
            return moved(adam)

        run.adam.step = lambda *args: step(run.adam)
        run.go(1)
        return seen

    plain = Run(Bilevel(order)).go(1)
    kept = []
    moved = plain.adam.step
    plain.adam.step = lambda *args: (
        kept.extend(tensor.grad.clone() for tensor in plain.supernet.logits.values()),
        moved(),
    )
    plain.go(1)
    off, on = logits(), logits(logits_too=True)
    assert all(torch.equal(one, other) for one, other in zip(off, kept, strict=True))
    assert not any(torch.allclose(one, other) for one, other in zip(on, kept, strict=True))


def test_it_continues_bit_for_bit():
    whole = Run(Taught("first", Teaching())).go(6)
    halted = Run(Taught("first", Teaching())).go(4)
    tensors, values = halted.updater.state()
    again = Run(Taught("first", Teaching()))
    again.supernet.load_state_dict(halted.tensors())
    again.optimizer.load_state_dict(halted.optimizer.state_dict())
    again.adam.load_state_dict(halted.adam.state_dict())
    again.position = halted.position
    again.updater.load({name: tensor.clone() for name, tensor in tensors.items()}, values)
    assert same(again.go(2).tensors(), whole.tensors())
    assert [each.step for each in again.updater.queue] == [3, 4, 5]


def test_negative_teachers_are_refused():
    with pytest.raises(UserError, match="teachers: got -1; allowed: an integer from 0"):
        Taught("first", Teaching(teachers=-1))


def test_the_term_does_not_reach_the_teachers():
    run = Run(Taught("first", Teaching(weight=5.0))).go(3)
    assert all(not tensor.requires_grad for each in run.updater.queue for tensor in each.weights.values())
    assert all(tensor.grad_fn is None for each in run.updater.queue for tensor in each.logits.values())
    assert not any(module._forward_hooks for module in run.supernet.modules())

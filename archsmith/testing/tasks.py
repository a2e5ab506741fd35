"""The laws of every ``Task``: inherit ``TaskContract`` in a test file and give it a task.

Example:
    >>> class TestMyTask(TaskContract):
    ...     @pytest.fixture
    ...     def make_task(self):
    ...         return lambda: MyTask()
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.tasks.base import Batch, Task

MakeTask = Callable[[], Task]


class TaskContract:
    """Tests that every task must pass; override ``make_task``, and ``batch_size`` where 16 does not suit.

    Tasks whose inputs are no float32 override ``input_dtype``, those whose outputs are no (B, K) logits ``weight``,
    ``forward``, ``outputs``, ``literal_scores`` and ``target_axes``.
    """

    target_axes = 1
    input_dtype = torch.float32

    @pytest.fixture
    def make_task(self) -> MakeTask:
        """Return a function that makes the task afresh each time."""
        raise NotImplementedError("override the fixture make_task")

    @pytest.fixture
    def task(self, make_task: MakeTask) -> Task:
        """Return one task."""
        return make_task()

    @pytest.fixture
    def batch_size(self) -> int:
        """Return a batch size that gives at least two training batches."""
        return 16

    def weight(self, task: Task) -> Tensor:
        """Return a fixed parameter of ``forward``, made without touching the global random stream."""
        features = 1
        for size in task.input_shape:
            features *= size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(features, task.num_classes, generator=generator) * features**-0.5

    def forward(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a network for the task: linear in ``weight``."""
        return lambda inputs: inputs.flatten(1) @ weight

    def outputs(self, batch: int, task: Task) -> tuple[int, ...]:
        """Return the shape of outputs with as many columns as the task has classes."""
        return (batch, task.num_classes)

    def literal_scores(self, task: Task, forward: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return accuracy and mean loss of the validation part, computed in the plainest way."""
        inputs, targets = _joined(task.batches("valid", batch_size=7))
        logits = forward(inputs).double()
        loss = (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).mean()
        return {"accuracy": float((logits.argmax(1) == targets).double().mean()), "loss": float(loss)}

    def test_it_describes_itself(self, task: Task) -> None:
        """Names, shapes and normalisation are plain values that fit each other."""
        channels = 0 if task.kind == "text" else task.input_shape[0]
        assert len(task.input_shape) == (1 if task.kind == "text" else 3) and min(task.input_shape) >= 1
        assert task.num_classes == len(task.class_names) == len(set(task.class_names)) >= 2
        assert task.metric == "accuracy"
        assert task.splits[:2] == ("train", "valid")
        assert len(task.normalisation["mean"]) == len(task.normalisation["std"]) == channels
        assert all(std > 0 for std in task.normalisation["std"])
        assert isinstance(task.resume_note, str)

    def test_digest_is_a_function_of_the_data(self, make_task: MakeTask) -> None:
        """Made twice, the task has the same digest."""
        first, second = make_task().digest, make_task().digest
        assert first == second
        assert re.fullmatch("[0-9a-f]{64}", first)

    def test_train_batches_are_whole_and_counted(self, task: Task, batch_size: int) -> None:
        """An epoch has ``steps_per_epoch`` batches, all of the same size, and leaves out less than one batch."""
        batches = list(task.batches("train", batch_size=batch_size))
        steps = task.steps_per_epoch(batch_size)
        assert len(batches) == steps >= 2
        assert 0 <= task.size("train") - steps * batch_size < batch_size
        for batch in batches:
            assert batch.inputs.shape == (batch_size, *task.input_shape)
            assert batch.inputs.dtype == self.input_dtype
            assert len(batch) == len(batch.targets) == batch_size and batch.targets.dim() == self.target_axes
            assert batch.targets.dtype == torch.int64
            assert 0 <= int(batch.targets.min()) <= int(batch.targets.max()) < task.num_classes

    @pytest.mark.parametrize("which", [1, 2])
    def test_other_parts_are_complete_and_in_order(self, task: Task, batch_size: int, which: int) -> None:
        """Valid and test give all examples, the same whatever the seed, the epoch and the batch size."""
        if which >= len(task.splits):
            pytest.skip("the task has no test part")
        split = task.splits[which]
        inputs, targets = _joined(task.batches(split, batch_size=batch_size))
        other_inputs, other_targets = _joined(task.batches(split, batch_size=batch_size + 1, seed=5, epoch=3))
        assert len(targets) == task.size(split)
        assert torch.equal(inputs, other_inputs) and torch.equal(targets, other_targets)

    def test_order_depends_on_seed_and_epoch(self, task: Task, batch_size: int) -> None:
        """The same seed and epoch give the same batches; others give other ones."""

        def epoch(seed: int, number: int) -> Tensor:
            return _joined(task.batches("train", batch_size=batch_size, seed=seed, epoch=number))[0]

        reference = epoch(0, 0)
        assert torch.equal(reference, epoch(0, 0))
        assert not torch.equal(reference, epoch(0, 1))
        assert not torch.equal(reference, epoch(1, 0))

    def test_an_epoch_resumes_in_its_middle(self, make_task: MakeTask, batch_size: int) -> None:
        """A fresh task that starts at step k gives bit for bit what the first one gives after k batches."""
        task = make_task()
        if task.resume_note:
            pytest.skip(task.resume_note)
        whole = list(task.batches("train", batch_size=batch_size, seed=3, epoch=2))
        for start in (0, 1, len(whole) - 1, len(whole)):
            rest = list(make_task().batches("train", batch_size=batch_size, seed=3, epoch=2, start=start))
            assert len(rest) == len(whole) - start
            for expected, found in zip(whole[start:], rest, strict=True):
                assert torch.equal(expected.inputs, found.inputs) and torch.equal(expected.targets, found.targets)

    def test_loss_is_differentiable_and_deterministic(self, task: Task, batch_size: int) -> None:
        """The same generator state gives the same loss; gradients reach the network; metrics are detached scalars."""
        batch = next(iter(task.batches("train", batch_size=batch_size)))
        weight = self.weight(task).requires_grad_()
        losses = []
        for _ in range(2):
            loss, metrics = task.loss(self.forward(weight), batch, torch.Generator().manual_seed(7))
            losses.append(loss)
        assert losses[0].shape == () and torch.equal(*losses)
        assert 0.0 <= float(metrics["accuracy"]) <= 1.0
        assert not metrics["accuracy"].requires_grad
        (gradient,) = torch.autograd.grad(losses[0], weight)
        assert torch.isfinite(gradient).all() and float(gradient.abs().max()) > 0

    def test_draws_do_not_depend_on_the_content(self, task: Task, batch_size: int) -> None:
        """Two batches of one shape move the generator alike."""
        states = []
        for batch in list(task.batches("train", batch_size=batch_size))[:2]:
            generator = torch.Generator().manual_seed(1)
            task.loss(self.forward(self.weight(task)), batch, generator)
            states.append(generator.get_state())
        blank = Batch(torch.zeros_like(batch.inputs), torch.zeros_like(batch.targets), batch.context)
        generator = torch.Generator().manual_seed(1)
        task.loss(self.forward(self.weight(task)), blank, generator)
        assert torch.equal(states[0], states[1]) and torch.equal(states[0], generator.get_state())

    def test_global_random_stream_is_left_alone(self, task: Task, batch_size: int) -> None:
        """Neither the batches nor the loss nor the evaluation move torch's global stream."""
        before = torch.get_rng_state()
        for batch in task.batches("train", batch_size=batch_size):
            task.loss(self.forward(self.weight(task)), batch, torch.Generator().manual_seed(0))
        task.evaluate(self.forward(self.weight(task)), "valid")
        assert torch.equal(before, torch.get_rng_state())

    def test_evaluate_equals_the_literal_computation(self, task: Task, batch_size: int) -> None:
        """Accuracy and mean loss over all examples, no gradients, the same for every batch size."""
        seen_gradients = []
        weight = self.weight(task).requires_grad_()

        def forward(inputs: Tensor) -> Tensor:
            seen_gradients.append(torch.is_grad_enabled())
            return self.forward(weight)(inputs)

        expected = self.literal_scores(task, self.forward(weight.detach()))
        scores = task.evaluate(forward, "valid", batch_size=batch_size)
        other = task.evaluate(forward, "valid", batch_size=7)
        assert scores["examples"] == task.size("valid")
        assert scores["accuracy"] == other["accuracy"] == expected["accuracy"]
        assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert other["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert not any(seen_gradients)

    def test_examples_are_the_head_of_a_part(self, task: Task, batch_size: int) -> None:
        """``examples`` gives what ``batches`` gives."""
        split = task.splits[-1]
        inputs, _ = _joined(task.batches(split, batch_size=batch_size))
        n = min(5, task.size(split))
        assert torch.equal(task.examples(n, split), inputs[:n])

    def test_plain_inputs_have_the_shape_and_the_type_of_examples(self, task: Task) -> None:
        """What counts and times a network is what the network gets."""
        real, plain = task.examples(1, task.splits[-1]), task.plain_inputs(3)
        assert plain.shape == (3, *real.shape[1:]) and plain.dtype == real.dtype

    def test_wrong_output_shape_is_named(self, task: Task, batch_size: int) -> None:
        """A network with another number of classes is refused with both shapes."""
        batch = next(iter(task.batches("train", batch_size=batch_size)))
        right = self.outputs(batch_size, task)
        wrong = (*right[:-1], right[-1] + 1)
        with pytest.raises(
            UserError, match=rf"network output: got {re.escape(str(wrong))}.*{re.escape(str(right[-1]))}\)"
        ):
            task.loss(lambda x: x.new_zeros(wrong), batch, torch.Generator())

    def test_wrong_arguments_are_named_at_the_call(self, task: Task, batch_size: int) -> None:
        """Split, batch size, start and n out of range."""
        with pytest.raises(UserError, match="split: got 'training'; allowed: train, valid"):
            task.batches("training", batch_size=batch_size)
        with pytest.raises(UserError, match="split: got 'dev'"):
            task.size("dev")
        with pytest.raises(UserError, match="batch_size: got 0; allowed: a whole number from 1"):
            task.batches("train", batch_size=0)
        with pytest.raises(UserError, match=f"batch_size: got {10**9}; allowed: "):
            task.steps_per_epoch(10**9)
        with pytest.raises(UserError, match="start: got -1"):
            task.batches("train", batch_size=batch_size, start=-1)
        with pytest.raises(UserError, match="start: got"):
            task.batches("train", batch_size=batch_size, start=task.steps_per_epoch(batch_size) + 1)
        with pytest.raises(UserError, match="n: got 0; allowed: a whole number from 1"):
            task.examples(0, task.splits[-1])
        with pytest.raises(UserError, match="n: got"):
            task.examples(task.size("valid") + 1, "valid")


def _joined(batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    pairs = [(batch.inputs, batch.targets) for batch in batches]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

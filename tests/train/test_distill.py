import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.train.distill import distillation, ramp, soft_cross_entropy, voted

CASES = json.loads((Path(__file__).parents[1] / "golden" / "sd-darts.json").read_text())["cases"]
KD = [case for case in CASES if case["name"].startswith("kd:")]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", KD, ids=lambda case: case["name"])
def test_votes_losses_and_gradients_are_those_derived(case):
    given, expected = case["input"], case["expected"]
    close = {"rtol": 0, "atol": case["tolerance"]["value"]}
    student = double(given["student_logits"]).requires_grad_()
    teachers, tau, lam = double(given["teacher_logits"]), given["tau"], given["lam"]
    vote = voted(teachers, tau)
    torch.testing.assert_close(vote, double(expected["teacher_soft_vote"]), **close)
    torch.testing.assert_close(voted(teachers, tau, "majority"), double(expected["teacher_majority_vote"]), **close)
    torch.testing.assert_close((student / tau).softmax(-1).detach(), double(expected["student_soft"]), **close)
    entropy, term = functional.cross_entropy(student, torch.tensor(given["targets"])), distillation(student, vote, tau)
    assert entropy.item() == pytest.approx(expected["ce"], rel=0, abs=1e-9)
    assert term.item() / tau**2 == pytest.approx(expected["kl"], rel=0, abs=1e-9)
    total = entropy + lam * term
    assert total.item() == pytest.approx(expected["total"], rel=0, abs=1e-9)
    (gradient,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(gradient, double(expected["grad_student_logits"]), **close)


def test_the_gradient_has_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    vote = voted(torch.randn(3, 5, 4, dtype=torch.float64, generator=generator), 2.5)
    (gradient,) = torch.autograd.grad(distillation(student, vote, 2.5), student)
    torch.testing.assert_close(gradient, 2.5 * ((student / 2.5).softmax(-1) - vote).detach() / 5)


def test_a_teacher_that_is_the_student_teaches_nothing():
    student = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    term = distillation(student, voted([student], 2.0), 2.0)
    (gradient,) = torch.autograd.grad(term, student)
    assert term.item() == pytest.approx(0, abs=1e-15) and gradient.abs().max() < 1e-15


@pytest.mark.parametrize("how", ["soft", "majority"])
def test_equal_teachers_are_one_and_their_order_does_not_matter(how):
    teachers = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(voted([teachers[0]] * 4, 2.0, how), voted(teachers[:1], 2.0, how))
    torch.testing.assert_close(voted(teachers.flip(0), 2.0, how), voted(teachers, 2.0, how))


def test_probabilities_are_averaged_not_logits():
    teachers = double([[[4.0, 0.0]], [[0.0, 0.0]]])
    assert not torch.allclose(voted(teachers, 1.0), teachers.mean(0).softmax(-1))
    assert voted(teachers, 1.0)[0, 0].item() == pytest.approx((torch.sigmoid(double(4.0)).item() + 0.5) / 2)


def test_no_gradient_reaches_the_teachers():
    teachers = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert not voted(teachers, 2.0).requires_grad
    vote = teachers.softmax(-1).mean(0)
    assert not distillation(torch.zeros(3, 4), vote, 2.0).requires_grad


@pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
def test_near_the_teacher_it_is_a_quadratic_of_the_change(tau):
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(1, 6, dtype=torch.float64, generator=generator)
    change = torch.randn(1, 6, dtype=torch.float64, generator=generator)
    change = 1e-3 * change / change.norm()
    p = (z / tau).softmax(-1)[0]
    fisher = torch.diag(p) - torch.outer(p, p)
    law = (change @ fisher @ change.T).item() / 2
    assert distillation(z + change, voted([z], tau), tau).item() == pytest.approx(law, rel=0.01)


def test_a_ramp():
    assert [ramp(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert ramp(0, 0) == 1.0


def test_what_makes_no_sense_is_refused():
    two = torch.zeros(1, 2, 3)
    with pytest.raises(UserError, match="teachers: got 0; allowed: at least one"):
        voted([], 1.0)
    with pytest.raises(UserError, match="temperature: got 0; allowed: a number above 0"):
        voted(two, 0)
    with pytest.raises(UserError, match="vote: got 'mean'; allowed: soft, majority"):
        voted(two, 1.0, "mean")
    with pytest.raises(UserError, match=r"vote: got \(2, 3\); allowed: the student's shape \(2, 4\)"):
        distillation(torch.zeros(2, 4), torch.zeros(2, 3), 1.0)
    with pytest.raises(UserError, match="temperature"):
        distillation(torch.zeros(2, 3), torch.zeros(2, 3), -1.0)


def test_in_place_distillation_is_as_published():
    cases = json.loads((Path(__file__).parents[1] / "golden" / "bignas.json").read_text())["cases"]
    expected = next(case["expected"] for case in cases if case["name"] == "inplace-distillation-loss")
    grid = 5 * torch.arange(4, dtype=torch.float64)[:, None] + torch.arange(5, dtype=torch.float64)
    student = (2 * torch.sin(0.7 * grid + 0.3)).requires_grad_()
    teacher = (2 * torch.sin(1.1 * grid + 0.9)).requires_grad_()
    loss = soft_cross_entropy(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(expected["soft_ce_student_vs_teacher"], abs=1e-8)
    assert student.grad is not None
    assert student.grad[0, 0].item() == pytest.approx(expected["grad_00"], abs=1e-8)
    assert student.grad[-1, -1].item() == pytest.approx(expected["grad_last"], abs=1e-8)
    assert teacher.grad is None
    targets = torch.arange(4) % 5
    hard = functional.cross_entropy(teacher, targets, label_smoothing=0.1)
    assert hard.item() == pytest.approx(expected["smoothed_ce_teacher_logits"], abs=1e-8)


def test_the_least_of_in_place_distillation_is_the_teachers_entropy():
    teacher = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probabilities = teacher.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert entropy > 0.5
    torch.testing.assert_close(soft_cross_entropy(teacher, teacher), entropy)
    other = teacher + 0.1 * torch.randn(teacher.shape, dtype=torch.float64)
    assert soft_cross_entropy(other, teacher) > entropy
    with pytest.raises(UserError, match=r"teacher: got \(6, 4\); allowed: the student's shape \(6, 5\)"):
        soft_cross_entropy(teacher, teacher[:, :4])

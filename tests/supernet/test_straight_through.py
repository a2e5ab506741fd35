import pytest
import torch
from st_nas_cases import cases
from torch import nn

from archsmith.core.errors import UserError
from archsmith.supernet import GumbelSoftmax, MixedOp, Relaxation, Softmax, StraightThrough
from archsmith.supernet.mixed import straight_through

DRAWS = 10_000
CHI_SQUARE_3 = 16.27  # 0.999 quantile with three degrees of freedom


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor), dtype=torch.float64))

    def forward(self, x):
        return self.factor * x


class Deep(nn.Module):
    """Saves much for the backward pass: what a candidate's internals cost."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 5 * width), nn.Sigmoid(), nn.Linear(5 * width, width), nn.Tanh())

    def forward(self, x):
        return self.layers(x)


def sampled(logits, drawn):
    """Return a one-hot row for a sample that is given, with the gradient of the softmax."""
    return straight_through(torch.tensor([drawn]), logits.softmax(-1).unsqueeze(0))[0]


def expected_gradient(outputs, loss, estimator):
    """Return an estimator's mean over all samples, weighted by their probabilities."""
    probabilities, total = torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for drawn in range(3):
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        value = loss(estimator(outputs, logits, drawn))
        total += probabilities[drawn] * torch.autograd.grad(value, logits)[0]
    return total


def through(outputs, logits, drawn):
    mixed = MixedOp({str(value): Times(value) for value in outputs}, StraightThrough())
    return mixed(torch.ones((), dtype=torch.float64), sampled(logits, drawn))


def test_in_expectation_a_linear_loss_has_its_exact_gradient_from_every_sample():
    (case,) = cases("st/expectation, linear loss")
    for drawn in range(3):
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        through(case["input"]["o"], logits, drawn).backward()
        assert logits.grad.tolist() == pytest.approx(case["expected"]["st"], abs=case["tolerance"])
    exact = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (exact.softmax(-1) * torch.tensor(case["input"]["o"])).sum().backward()
    assert exact.grad.tolist() == pytest.approx(case["expected"]["true"], abs=case["tolerance"])


def test_in_expectation_a_quadratic_loss_has_the_gradient_of_the_mixture():
    (case,) = cases("st/expectation, quadratic loss")
    outputs, expected, tolerance = case["input"]["o"], case["expected"], case["tolerance"]
    found = expected_gradient(outputs, lambda y: y**2 / 2, through)
    assert found.tolist() == pytest.approx(expected["st_expected"], abs=tolerance)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    values = torch.tensor(outputs, dtype=torch.float64)
    ((logits.softmax(-1) * values).sum() ** 2 / 2).backward()
    assert logits.grad.tolist() == pytest.approx(expected["darts_mixture_gradient"], abs=tolerance)
    logits.grad = None
    (logits.softmax(-1) * values**2 / 2).sum().backward()
    assert logits.grad.tolist() == pytest.approx(expected["true_gradient_of_E[L]"], abs=tolerance)
    assert found.tolist() != pytest.approx(logits.grad.tolist(), abs=1e-3)


def test_closed_form_of_the_gradient():
    (case,) = cases("st/closed form")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mixed = MixedOp({str(k): Deep(6).double() for k in range(4)}, StraightThrough())
    logits = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    for drawn in range(4):
        logits.grad = None
        (mixed(x, sampled(logits, drawn)) * upstream).sum().backward()
        p = logits.detach().softmax(-1)
        s = torch.stack([(upstream * candidate(x)).sum() for candidate in mixed.candidates.values()]).detach()
        torch.testing.assert_close(logits.grad, p * (s - (p * s).sum()), rtol=0, atol=case["tolerance"])
        assert float(logits.grad.sum()) == pytest.approx(0.0, abs=case["tolerance"])


def test_forwards_it_is_the_sampled_candidate_bit_for_bit_whatever_the_others_give():
    class Broken(nn.Module):
        def forward(self, x):
            return x * torch.nan

    torch.manual_seed(0)
    mixed = MixedOp({"one": Deep(6), "two": Deep(6), "broken": Broken()}, StraightThrough())
    x, logits = torch.randn(3, 6), torch.randn(3, requires_grad=True)
    assert torch.equal(mixed(x, sampled(logits, 1)), mixed.candidates["two"](x))


def test_only_the_sampled_candidate_gets_a_gradient_and_so_does_the_input_along_its_path():
    torch.manual_seed(0)
    mixed = MixedOp({"one": Deep(6), "two": Deep(6)}, StraightThrough())
    x = torch.randn(3, 6, requires_grad=True)
    mixed(x, sampled(torch.randn(2, requires_grad=True), 1)).square().sum().backward()
    found = {name: parameter.grad for name, parameter in mixed.candidates["two"].named_parameters()}
    assert all(parameter.grad is None for parameter in mixed.candidates["one"].parameters())
    reached = x.grad.clone()
    mixed.zero_grad(), setattr(x, "grad", None)
    mixed.candidates["two"](x).square().sum().backward()
    assert torch.equal(x.grad, reached)
    for name, parameter in mixed.candidates["two"].named_parameters():
        assert torch.equal(parameter.grad, found[name])


def saved_elements(run):
    """Return how many elements of activations autograd keeps for the backward pass, the scalars of choices aside."""
    counts = []

    def pack(tensor):
        counts.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(counts)


def test_memory_is_one_path_and_the_outputs():
    torch.manual_seed(0)
    width, batch = 6, 8
    x = torch.randn(batch, width, requires_grad=True)
    output = batch * width
    one_path = saved_elements(lambda: Deep(width)(x))
    for count in (2, 4, 8):
        mixed = MixedOp({str(k): Deep(width) for k in range(count)}, StraightThrough())
        row = sampled(torch.zeros(count, requires_grad=True), count - 1)
        assert saved_elements(lambda mixed=mixed, row=row: mixed(x, row)) == one_path + count * output
        soft = torch.zeros(count, requires_grad=True).softmax(-1)
        mixed = MixedOp(dict(mixed.candidates), Softmax())
        all_paths = saved_elements(lambda mixed=mixed, row=soft: mixed(x, row))
        # Each path, its output for the gradient of its weight, and the weight itself.
        assert all_paths == count * (one_path + output + 1)


def test_without_a_gradient_for_the_choice_one_candidate_runs():
    mixed, ran = MixedOp({"one": Times(1.0), "two": Times(2.0)}, StraightThrough()), []
    for name, candidate in mixed.candidates.items():
        candidate.register_forward_hook(lambda *_, name=name: ran.append(name))
    x, logits = torch.ones(2, dtype=torch.float64), torch.zeros(2, requires_grad=True)
    assert mixed(x, [0.0, 1.0]).tolist() == mixed(x, sampled(logits, 1).detach()).tolist() == [2.0, 2.0]
    with torch.no_grad():
        mixed(x, sampled(logits, 1))
    assert ran == ["two", "two", "two"]
    mixed(x, sampled(logits, 1))
    assert sorted(ran[3:]) == ["one", "two"]


def test_rows_that_are_no_sample_are_mixtures():
    mixed = MixedOp({"one": Times(1.0), "two": Times(2.0)}, StraightThrough())
    weights = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    mixed(torch.ones((), dtype=torch.float64), weights).backward()
    assert weights.grad.tolist() == [1.0, 2.0]


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.5, -0.5, 1.0, 0.0])
    drawn = StraightThrough().weights(logits.expand(DRAWS, 4), torch.Generator().manual_seed(3)).sum(0)
    expected = logits.softmax(-1) * DRAWS
    assert float(((drawn - expected) ** 2 / expected).sum()) < CHI_SQUARE_3


def test_probabilities_are_no_sample():
    logits = torch.tensor([[0.5, -0.5, 1.0]])
    for relaxation in (StraightThrough(), GumbelSoftmax(0.3), Softmax()):
        assert isinstance(relaxation, Relaxation)
        assert torch.equal(relaxation.probabilities(logits), logits.softmax(-1))


def test_a_candidate_that_changes_the_shape_is_named():
    mixed = MixedOp({"same": nn.Identity(), "wider": nn.Linear(2, 3)}, StraightThrough())
    with pytest.raises(UserError, match=r"'wider': \(1, 3\).*all give the same shape"):
        mixed(torch.ones(1, 2), sampled(torch.zeros(2, requires_grad=True), 0))


@pytest.mark.parametrize("seed", range(5))
def test_the_useful_candidate_is_found(seed):
    """The node holds a useful convolution, nothing and noise; the logits learn from the samples."""

    class Nothing(nn.Module):
        def forward(self, x):
            return x * 0.0

    class Noise(nn.Module):
        def forward(self, x):
            return torch.randn(x.shape, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(4, 4, 3, generator=generator)
    torch.manual_seed(seed)
    useful = nn.Conv1d(4, 4, 3, padding=1, bias=False)
    mixed = MixedOp({"useful": useful, "zero": Nothing(), "noise": Noise()}, StraightThrough())
    logits = torch.zeros(1, 3, requires_grad=True)
    weights, choice = torch.optim.Adam(useful.parameters(), 1e-2), torch.optim.Adam([logits], 2e-2)
    relaxation = StraightThrough()
    for _ in range(300):
        for optimizer, row in ((choice, True), (weights, False)):
            x = torch.randn(8, 4, 10, generator=generator)
            wanted = torch.nn.functional.conv1d(x, target, padding=1)
            drawn = relaxation.weights(logits if row else logits.detach(), generator)[0]
            optimizer.zero_grad(), useful.zero_grad()
            loss = (mixed(x, drawn) - wanted).square().mean()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
    assert float(logits.detach().softmax(-1)[0, 0]) > 0.9

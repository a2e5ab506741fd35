import pytest
import torch
from darts_runs import small_family, small_task
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.supernet.relaxed import batch_statistics
from archsmith.train.landscape import discretisation_gap, hessian_product, sharpness, top_eigenvalue


def quadratic(matrix):
    """Return ``x H x / 2 + x[0]`` over two tensors that together are ``x``."""

    def loss(tensors):
        x = torch.cat([tensors["a"].flatten(), tensors["b"]])
        return x @ matrix @ x / 2 + x[0]

    return loss


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


POINT = {"a": torch.ones(2, 2, dtype=torch.float64), "b": torch.full((2,), 0.5, dtype=torch.float64)}


@pytest.mark.parametrize("how", ["exact", "difference"])
@pytest.mark.parametrize(
    ("eigenvalues", "largest"),
    [([5.0, 1, 0.5, 0, -1, -2], 5.0), ([3.0, 1, 0.5, 0, -1, -9], 3.0), ([-1.0, -2, -3, -4, -5, -9], -1.0)],
)
def test_the_largest_eigenvalue_also_below_larger_negative_ones(how, eigenvalues, largest):
    loss = quadratic(symmetric(eigenvalues))
    found = top_eigenvalue(loss, POINT, how=how, tolerance=1e-9)
    assert found == pytest.approx(largest, rel=1e-5)


def test_a_linear_loss_has_no_curvature():
    assert top_eigenvalue(lambda tensors: tensors["a"].sum() * 3, POINT) == 0.0
    assert top_eigenvalue(lambda tensors: tensors["a"].sum() * 3, POINT, how="difference") == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("how", ["exact", "difference"])
def test_products_are_those_of_the_whole_hessian(how):
    def loss(tensors):
        return (tensors["a"].sin() * tensors["b"].exp().sum()).sum() + (tensors["b"] ** 4).sum()

    flat = torch.cat([POINT["a"].flatten(), POINT["b"]])
    hessian = torch.autograd.functional.hessian(lambda x: loss({"a": x[:4].reshape(2, 2), "b": x[4:]}), flat)
    vector = torch.arange(6, dtype=torch.float64) / 6
    found = hessian_product(loss, POINT, {"a": vector[:4].reshape(2, 2), "b": vector[4:]}, how)
    joined = torch.cat([found["a"].flatten(), found["b"]])
    torch.testing.assert_close(joined, hessian @ vector, rtol=1e-3 if how == "difference" else 1e-10, atol=1e-10)


def test_an_unknown_product_is_refused():
    with pytest.raises(UserError, match="how: got 'fd'; allowed: exact, difference"):
        hessian_product(lambda tensors: tensors["a"].sum(), POINT, POINT, "fd")


def test_sharpness_of_a_parabola_has_a_closed_form():
    matrix = symmetric([4.0, 2, 1, 1, 0.5, 0.1])
    loss = quadratic(matrix)
    x = torch.cat([POINT["a"].flatten(), POINT["b"]])
    gradient = matrix @ x
    gradient[0] += 1
    unit = gradient / gradient.norm()
    law = 0.05 * gradient.norm() + 0.05**2 * unit @ matrix @ unit / 2
    assert sharpness(loss, POINT) == pytest.approx(law.item(), rel=1e-9)
    assert sharpness(lambda tensors: tensors["a"].sum() * 0, POINT) == 0.0


def test_the_curvature_over_the_logits_of_a_supernet():
    supernet = small_family(nodes=1).supernet(seed=0).double()
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    weights = {name: weight.detach() for name, weight in supernet.weights().items()}
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}

    def loss(logits):
        return functional.cross_entropy(supernet.functional(x, weights, logits), y)

    logits = {name: tensor.detach() for name, tensor in supernet.logits.items()}
    sizes = [tensor.numel() for tensor in logits.values()]

    def of_flat(flat):
        parts = flat.split(sizes)
        return loss({name: part.reshape(logits[name].shape) for name, part in zip(logits, parts, strict=True)})

    with batch_statistics(supernet):
        found = top_eigenvalue(loss, logits, tolerance=1e-6)
        flat = torch.cat([tensor.flatten() for tensor in logits.values()])
        whole = torch.autograd.functional.hessian(of_flat, flat)
        assert found == pytest.approx(torch.linalg.eigvalsh(whole)[-1].item(), rel=1e-4)
        assert sharpness(lambda moved: loss_of_weights(supernet, x, y, moved), weights) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())


def loss_of_weights(supernet, x, y, weights):
    return functional.cross_entropy(supernet.functional(x, weights), y)


def test_the_gap_is_between_the_mixture_and_its_decision():
    supernet, task = small_family().supernet(seed=0).train(), small_task(96)
    with torch.no_grad():
        supernet.logits["normal"].normal_(0, 1, generator=torch.Generator().manual_seed(5))
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    architecture = supernet.derive()
    gap = discretisation_gap(supernet, architecture, task)
    assert gap.value == gap.mixed - gap.decided
    assert supernet.active is None and supernet.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    decided = supernet.path(architecture)
    with torch.no_grad():  # a mixture that is the path already loses nothing
        for name, mixing in decided.items():
            supernet.logits[name].copy_(torch.where(mixing > 0, 0.0, -1e4))
    empty = [(mixing.sum(-1) == 0).nonzero().flatten() for mixing in decided.values()]
    for name, rows in zip(decided, empty, strict=True):
        with torch.no_grad():
            supernet.logits[name][rows] = -1e4
            supernet.logits[name][rows, supernet.options[name][0].index("none")] = 0.0
    same = discretisation_gap(supernet, architecture, task)
    assert same.value == 0.0 and same.mixed == gap.decided

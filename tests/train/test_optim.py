import pytest
import torch
from mobile_samples import fact, small_family
from torch import nn

from archsmith.train.optim import RMSprop, RowAdam, decay_groups


def test_the_published_sequence():
    given, expected = fact("rmsprop_eps_inside")
    w = nn.Parameter(torch.tensor(given["w0"], dtype=torch.float64))
    optimizer = RMSprop([w], given["lr"], alpha=given["alpha"], momentum=given["momentum"], eps=given["eps"])
    for gradient, values in zip(given["grads"], expected, strict=True):
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        assert w.tolist() == pytest.approx(values, abs=1e-12)


def test_many_parameters_equal_the_formula_for_each():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (2, 4), (2, 1, 3, 3), ()]
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    w = [p.detach().clone() for p in params]
    v, b = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w]
    optimizer = RMSprop(params, 0.05, alpha=0.8, momentum=0.7, eps=1e-2, weight_decay=0.1)
    for step in range(5):
        for i, p in enumerate(params):
            p.grad = None if (step + i) % 4 == 0 else torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.grad is None:
                continue  # without a gradient nothing moves
            g = p.grad + 0.1 * w[i]
            v[i] = 0.8 * v[i] + 0.2 * g**2
            b[i] = 0.7 * b[i] + g / (v[i] + 1e-2).sqrt()
            w[i] = w[i] - 0.05 * b[i]
        gradients = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step()
        for p, gradient, expected in zip(params, gradients, w, strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
            assert gradient is None or torch.equal(p.grad, gradient)  # weight decay is not left in the gradient


def test_epsilon_is_inside_the_root():
    small, torchs = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    ours, theirs = RMSprop([small], 1.0, momentum=0.0), torch.optim.RMSprop([torchs], 1.0, alpha=0.9, eps=1e-3)
    for w, optimizer in ((small, ours), (torchs, theirs)):
        w.grad = torch.full_like(w, 1e-4)
        optimizer.step()
    assert small.item() == pytest.approx(-1e-4 / (1e-9 + 1e-3) ** 0.5)
    assert abs(torchs.item()) > 25 * abs(small.item())


def test_the_closure_gives_the_loss():
    w = nn.Parameter(torch.ones(2))
    optimizer = RMSprop([w], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert (w < 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr: got -1.0; allowed: a number >= 0"),
        ({"alpha": -0.1}, "alpha: got -0.1"),
        ({"momentum": float("nan")}, "momentum: got nan"),
        ({"weight_decay": -1}, "weight_decay: got -1"),
        ({"eps": 0.0}, "eps: got 0.0; allowed: a number > 0"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RMSprop([nn.Parameter(torch.ones(1))], **({"lr": 0.1} | arguments))


def test_gates_and_shifts_never_decay():
    network = small_family(squeeze_ratio=0.5).build(small_family().largest())
    decayed, free = decay_groups(network, 1e-5)
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-5, 0.0)
    names = {id(p): name for name, p in network.named_parameters()}
    for p in decayed["params"]:
        name = names[id(p)]
        assert p.dim() > 1 or name == "classifier.bias", name
    for p in free["params"]:
        assert p.dim() == 1
        assert names[id(p)] != "classifier.bias"
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    order = list(names)
    for group in (decayed, free):
        assert [id(p) for p in group["params"]] == [i for i in order if i in {id(p) for p in group["params"]}]


def test_shared_parameters_are_listed_once_and_empty_groups_left_out():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    layers[1].weight = layers[0].weight
    (group,) = decay_groups(layers, 0.1)
    assert len(group["params"]) == 3
    (group,) = decay_groups(nn.BatchNorm1d(3), 0.1)
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
def test_rows_of_adam_are_parameters_of_their_own(betas):
    """A row without a gradient is torch's Adam with a gradient of None: neither moved, nor counted, nor decayed."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    together, apart = nn.Parameter(start.clone()), [nn.Parameter(row.clone()) for row in start]
    ours = RowAdam([together], 0.1, betas=betas)
    theirs = torch.optim.Adam(apart, 0.1, betas=betas)
    for _ in range(12):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        gradient[torch.rand(3, generator=generator) < 0.5] = 0.0
        together.grad = gradient
        for row, own in zip(apart, gradient, strict=True):
            row.grad = own.clone() if bool(own.any()) else None
        ours.step()
        theirs.step()
        torch.testing.assert_close(together.detach(), torch.stack([row.detach() for row in apart]), rtol=1e-12, atol=0)
    before = together.detach().clone()
    together.grad = torch.zeros_like(together)
    ours.step()
    assert torch.equal(together, before)


def test_rows_of_a_vector_and_bad_values():
    vector = nn.Parameter(torch.ones(3))
    optimizer = RowAdam([vector], 0.5)
    vector.grad = torch.tensor([1.0, 0.0, -2.0])
    optimizer.step()
    torch.testing.assert_close(vector.detach(), torch.tensor([0.5, 1.0, 1.5]))
    for options, text in (({"lr": -1.0}, "lr: got -1.0"), ({"lr": 1.0, "betas": (1.0, 0.9)}, "betas: got")):
        with pytest.raises(ValueError, match=text):
            RowAdam([vector], **options)
    with pytest.raises(ValueError, match="eps: got 0"):
        RowAdam([vector], 0.1, eps=0)

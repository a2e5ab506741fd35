import copy

import pytest
import torch
from torch import nn

from archsmith.atoms.absorb import Absorber
from archsmith.atoms.finding import find
from archsmith.atoms.plan import plan_cut
from archsmith.atoms.transaction import apply_


class Branch(nn.Module):
    """Convolution, normalisation, activation, and a consumer of some kind."""

    def __init__(self, consumer, after=None, activation=torch.relu):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.consumer = consumer
        self.after = after or nn.Identity()
        self.activation = activation
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
                nn.init.normal_(m.running_mean)
                nn.init.uniform_(m.running_var, 0.5, 2)
                nn.init.normal_(m.bias)
        with torch.no_grad():
            self.norm.weight[[1, 4]] = 0
            self.norm.bias[[1, 4]] = torch.tensor([1.0, 0.7])

    def forward(self, x):
        x = self.activation(self.norm(self.conv(x)))
        if isinstance(self.consumer, nn.Linear):
            x = x.flatten(1)
        return self.after(self.consumer(x))


X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
EXACT = {
    "1x1 with a bias": lambda: (nn.Conv2d(6, 5, 1),),
    "unpadded 3x3 with a bias": lambda: (nn.Conv2d(6, 5, 3),),
    "1x1 into a normalisation": lambda: (nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)),
    "strided": lambda: (nn.Conv2d(6, 5, 2, stride=2, bias=False), nn.BatchNorm2d(5)),
    "linear behind a flatten": lambda: (nn.Linear(150, 5),),
    "linear into a normalisation": lambda: (nn.Linear(150, 5, bias=False), nn.BatchNorm1d(5)),
    "grouped": lambda: (nn.Conv2d(6, 4, 1, groups=2),),
}


def removal(model):
    """The units of the first convolution whose scale is zero; a grouped consumer ties them to (1, 4)."""
    atoms = find(model, X.to(model.conv.weight.dtype))
    group = next(g for g in atoms.groups if any(p.tensor == "norm.weight" for p in g.places))
    (place,) = [p for p in group.places if p.tensor == "norm.weight"]
    units = [unit for unit, owned in enumerate(place.index.tolist()) if set(owned) <= {1, 4}]
    assert units
    return plan_cut(atoms.groups, {group.name: units}, model)


@pytest.mark.parametrize("activation", [torch.relu, nn.functional.silu], ids=["relu", "silu"])
@pytest.mark.parametrize("kind", EXACT)
def test_the_evaluation_output_is_preserved(kind, activation):
    torch.manual_seed(0)
    model = Branch(*EXACT[kind](), activation=activation).double().eval()
    twin = copy.deepcopy(model)
    cut = removal(model)
    plain = apply_(twin, cut, probe=X.double())
    absorber = Absorber(model, cut, X.double())
    outcome = apply_(model, cut, probe=X.double(), absorb=absorber)
    assert plain.gap > 1e-3, "the constant matters"
    assert outcome.gap < 1e-12 and outcome.notes == ()
    (name,) = outcome.absorbed
    assert name in ("consumer.bias", "after.running_mean")


@pytest.mark.parametrize(
    "consumer",
    [lambda: nn.Conv2d(6, 5, 3, padding=1), lambda: nn.ConvTranspose2d(6, 5, 2, stride=2)],
    ids=["padded", "transposed"],
)
def test_what_is_not_the_same_everywhere_leaves_a_gap_that_is_reported(consumer):
    """At padded borders, and where every position of the output sees another part of the kernel."""
    torch.manual_seed(0)
    model = Branch(consumer()).eval()
    twin, whole, cut = copy.deepcopy(model), copy.deepcopy(model), removal(model)
    apply_(twin, cut)
    assert apply_(model, cut, probe=X, absorb=Absorber(model, cut, X)).gap > 1e-3
    with torch.no_grad():
        without, with_ = ((m(X) - whole(X)).square().mean() for m in (twin, model))
    assert with_ < 0.8 * without


def test_averages_and_tables_absorb_their_own_constants():
    torch.manual_seed(0)
    model = Branch(nn.Conv2d(6, 5, 1)).double().eval()
    average = copy.deepcopy(model)
    with torch.no_grad():
        average.norm.bias += 1
        average.consumer.weight *= 2
    before = average(X.double())
    table = {name: tensor.detach().clone() for name, tensor in average.state_dict().items()}
    cut = removal(model)
    apply_(model, cut, averages=[average], tables=[table], absorb=Absorber(model, cut, X.double()))
    torch.testing.assert_close(average(X.double()), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table["consumer.bias"], average.consumer.bias.detach(), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(table["consumer.bias"], model.consumer.bias)


def test_living_units_are_left_alone_or_absorbed_by_their_mean():
    torch.manual_seed(0)
    model = Branch(nn.Conv2d(6, 5, 1)).eval()
    with torch.no_grad():
        model.norm.bias[[0, 3]] = 2
    atoms = find(model, X)
    group = next(g for g in atoms.groups if any(p.tensor == "norm.weight" for p in g.places))
    cut = plan_cut(atoms.groups, {group.name: [0, 3]}, model)
    gaps = []
    for settings in (None, {}, {"means": True}):
        twin = copy.deepcopy(model)
        absorber = None if settings is None else Absorber(twin, cut, X, **settings)
        outcome = apply_(twin, cut, absorb=absorber)
        gaps.append(float((twin(X) - model(X)).detach().square().mean()))
        assert outcome.absorbed == (("consumer.bias",) if settings else ())
    assert gaps[0] == gaps[1] > 2 * gaps[2]


def test_constants_without_a_place_are_said():
    class Twice(Branch):
        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)))
            return self.consumer(x) + self.consumer(2 * x)

    for model, text in (
        (Branch(nn.Conv2d(6, 5, 1, bias=False)), "'consumer' stay out: it has no bias and no normalisation follows"),
        (Twice(nn.Conv2d(6, 5, 1)), "'consumer' stay out: the layer is used 2 times"),
    ):
        model.eval()
        cut = removal(model)
        outcome = apply_(model, cut, absorb=Absorber(model, cut, X), probe=X)
        assert outcome.notes == (f"constants of removed inputs of {text}",) * (1 + isinstance(model, Twice))
        assert outcome.gap > 1e-3 and outcome.absorbed == ()


def test_conv1d_of_transformers():
    class Transposed(nn.Module):
        """A product with the weight (inputs, outputs), as in GPT-2."""

        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.weight = nn.Parameter(torch.randn(6, 5))
            self.bias = nn.Parameter(torch.randn(5))

        def forward(self, x):
            return torch.addmm(self.bias, torch.relu(self.first(x)), self.weight)

    model, x = Transposed().eval(), torch.randn(7, 4)
    with torch.no_grad():
        model.first.weight[2] = 0
        model.first.bias[2] = 1.5
    atoms = find(model, x)
    cut = plan_cut(atoms.groups, {atoms.groups[0].name: [2]}, model)
    outcome = apply_(model, cut, absorb=Absorber(model, cut, x), probe=x)
    assert outcome.gap < 1e-6 and outcome.absorbed == ("bias",)

import dataclasses

import numpy as np
import pytest
import torch
from cut_samples import Block, batches
from torch import nn
from torch.nn import functional as F

from archsmith.atoms.doubles import in_double
from archsmith.atoms.finding import find
from archsmith.atoms.numbers import check_numbers, randomised, relative
from archsmith.atoms.plan import CutRefused, plan_cut
from archsmith.atoms.units import TensorCut


class Attention(nn.Module):
    """Attention without an explicit scale, in a residual stream under a normalisation that computes in float32."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight
        self.heads = 3

    def forward(self, ids):
        x = self.embed(ids)
        h = self.norm(x.to(torch.float32)).to(x.dtype)
        q, k, v = self.qkv(h).view(*ids.shape, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x)


IDS = torch.arange(10).view(2, 5)


def found():
    torch.manual_seed(0)
    model = Attention()
    return find(model, IDS), model


def test_right_cuts_pass_to_the_last_digits():
    atoms, model = found()
    seen = set()
    for group in atoms.groups:
        cut = plan_cut(atoms.groups, {group.name: [group.size // 2]}, model)
        if "qkv.weight" in cut.tensors and 1 not in cut.tensors["qkv.weight"].axes:
            rows = len(cut.tensors["qkv.weight"].axes[0])
            if rows == 24:  # a whole head
                cut = dataclasses.replace(cut, attributes={"heads": 2})
        gaps = check_numbers(atoms.labelled, model, cut, IDS)
        seen.add(group.name)
        assert gaps.outputs < 1e-12 and gaps.gradients < 1e-10, group.name
    assert len(seen) >= 2
    assert model.heads == 3 and model.embed.weight.dtype == torch.float32


def test_a_stale_attribute_and_a_wrong_position_are_caught():
    atoms, model = found()
    heads = next(g for g in atoms.groups if g.size == 3)
    stale = plan_cut(atoms.groups, {heads.name: [0]}, model)
    with pytest.raises(CutRefused, match=rf"'{heads.name}': the cut model"):
        check_numbers(atoms.labelled, model, stale, IDS)  # three heads of other widths: shapes fit, numbers do not
    right = dataclasses.replace(stale, attributes={"heads": 2})
    check_numbers(atoms.labelled, model, right, IDS)
    kept = right.tensors["out.weight"].axes[1]
    wrong = {**right.tensors, "out.weight": TensorCut({1: np.array([0, *kept[1:]])})}
    with pytest.raises(CutRefused, match="the cut model's output differs from the masked original by"):
        check_numbers(atoms.labelled, model, dataclasses.replace(right, tensors=wrong), IDS)
    less = {name: cut for name, cut in right.tensors.items() if name != "out.weight"}
    with pytest.raises(CutRefused, match="the cut model does not run: RuntimeError: mat1 and mat2"):
        check_numbers(atoms.labelled, model, dataclasses.replace(right, tensors=less), IDS)


@pytest.mark.parametrize("tensor", ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "depth.bias"])
def test_neutral_values_hide_nothing(tensor):
    """A fresh normalisation is ones and zeros: the check must see which of them were kept all the same."""
    model, x = Block(), batches(1)[0][0]
    nn.init.zeros_(model.depth.bias)
    atoms = find(model, x)
    group = next(g for g in atoms.groups if any(p.tensor == "conv1.weight" for p in g.places))
    cut = plan_cut(atoms.groups, {group.name: [3]}, model)
    check_numbers(atoms.labelled, model, cut, x)
    kept = cut.tensors[tensor].axes[0].copy()
    kept[2] = 3
    wrong = dataclasses.replace(cut, tensors={**cut.tensors, tensor: TensorCut({0: kept})})
    with pytest.raises(CutRefused, match="differs from the masked original by"):
        check_numbers(atoms.labelled, model, wrong, x)


def test_a_gradient_alone_can_differ():
    """The output of a detached branch is right, its gradient is not that of the original."""

    class Detached(Block):
        cut_off = 8

        def forward(self, x):
            return (
                super().forward(x) if self.bn1.num_features == self.cut_off else super().forward(x.detach() * 1).sin()
            )

    class Stopped(Block):
        def forward(self, x):
            y = super().forward(x)
            return y if self.bn1.num_features == 8 else y.detach() + 0 * y

    for kind, text in ((Detached, "output differs"), (Stopped, r"the gradient of '.*' differs")):
        model, x = kind(), batches(1)[0][0]
        atoms = find(model, x)
        group = next(g for g in atoms.groups if any(p.tensor == "conv1.weight" for p in g.places))
        with pytest.raises(CutRefused, match=text):
            check_numbers(atoms.labelled, model, plan_cut(atoms.groups, {group.name: [3]}, model), x)


def test_all_is_double_inside():
    with in_double():
        x = torch.ones(3).to(torch.float16)
        assert x.dtype == torch.float64 and torch.arange(3.0).dtype == torch.float64
        assert torch.arange(3).dtype == torch.int64 and x.half().float().dtype == torch.float64
        a = torch.tensor([1 / 3], dtype=torch.float64, requires_grad=True)
        (a.float() * 3).sum().backward()
    assert a.grad.dtype == torch.float64 and torch.get_default_dtype() == torch.float32
    assert torch.ones(1).dtype == torch.float32


def test_random_numbers_on_top():
    model = Block()
    values = randomised(model, 0)
    assert values["bn1.running_var"].min() > 0 and values["bn1.weight"].unique().numel() == 8
    assert values["bn1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(v, w) for v, w in zip(values.values(), randomised(model, 0).values(), strict=True))
    assert not torch.equal(values["fc.bias"], randomised(model, 1)["fc.bias"])


def test_relative_differences():
    a = torch.tensor([1.0, 2.0, float("inf")])
    assert relative(a, a) == 0
    assert relative(torch.tensor([1.0, 2.2, float("inf")]), a) == pytest.approx(0.1)
    assert relative(torch.tensor([1.0, 2.0, -float("inf")]), a) == float("inf")
    assert relative(torch.tensor([1.0, float("nan"), float("inf")]), a) == float("inf")
    assert relative(torch.zeros(2), torch.zeros(2)) == 0 and relative(torch.ones(2), torch.zeros(2), floor=4) == 0.25

"""One operator at a time: the masked original on everything equals the operator itself on what lives."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archsmith.atoms.masked import RULES, MaskedInterpreter
from archsmith.atoms.trace import export

GONE = [1, 4]  # of six positions


class Called(nn.Module):
    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs):
        return self.function(*inputs, *self.buffers())


def flags(size, gone):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[gone] = True
    return mask


def masked(function, operands, axes):
    """Run ``function`` masked; ``axes`` says for each operand on which axes the positions ``GONE`` are dead."""
    names = [f"t{i}" for i in range(len(operands))]
    model = Called(lambda dummy, *tensors: function(*tensors), **dict(zip(names, operands, strict=True)))
    program = export(model, (torch.zeros(1),), None)
    by_name = dict(zip(names, axes, strict=True))

    def dead(node):
        own = by_name.get(program.tensor_names.get(node.name), ())
        return {axis: flags(node.meta["val"].shape[axis], GONE) for axis in own}

    tensors = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in model.named_buffers()
    }
    interpreter = MaskedInterpreter(program.graph_module, program.tensor_names, program.constants, dead, tensors)
    return interpreter.run_on([torch.zeros(1)]), tensors


def without(tensor, axes):
    for axis in axes:
        tensor = tensor.index_select(axis, torch.tensor([i for i in range(tensor.shape[axis]) if i not in GONE]))
    return tensor


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


X = normal(3, 6, 4)
WIDE = normal(3, 6, 6)
CASES = {
    "linear": (F.linear, [normal(3, 6), normal(5, 6), normal(5)], [(1,), (1,), ()], ()),
    "linear out": (F.linear, [normal(3, 6), normal(6, 6), normal(6)], [(1,), (0, 1), (0,)], (1,)),
    "matmul": (torch.matmul, [normal(2, 3, 6), normal(2, 6, 4)], [(2,), (1,)], ()),
    "addmm": (torch.addmm, [normal(4), normal(3, 6), normal(6, 4)], [(), (1,), (0,)], ()),
    "einsum": (lambda a, b: torch.einsum("bij,jk->bik", a, b), [normal(2, 3, 6), normal(6, 4)], [(2,), (0,)], ()),
    "conv2d": (F.conv2d, [normal(2, 6, 4, 4), normal(5, 6, 3, 3)], [(1,), (1,)], ()),
    "conv_transpose2d": (F.conv_transpose2d, [normal(2, 6, 4, 4), normal(6, 5, 3, 3)], [(1,), (0,)], ()),
    "depthwise": (
        lambda x, w: F.conv2d(x, w, groups=w.shape[0]),
        [normal(2, 6, 4, 4), normal(6, 1, 3, 3)],
        [(1,), (0,)],
        (1,),
    ),
    "bilinear": (F.bilinear, [normal(3, 6), normal(3, 4), normal(5, 6, 4)], [(1,), (), (1,)], ()),
    "sum": (lambda x: x.sum(1), [X], [(1,)], ()),
    "sum of the rest": (lambda x: x.sum(2), [X], [(1,)], (1,)),
    "sum of all": (lambda x: x.sum(), [X], [(1,)], ()),
    "mean": (lambda x: x.mean(1), [X], [(1,)], ()),
    "mean of two axes": (lambda x: x.mean((0, 1), keepdim=True), [X], [(1,)], ()),
    "mean of all": (lambda x: x.mean(), [X], [(1,)], ()),
    "mean over the other of two": (lambda x: x.mean(1), [WIDE], [(1, 2)], (1,)),
    "var": (lambda x: x.var(1), [X], [(1,)], ()),
    "var biased": (lambda x: x.var(1, correction=0, keepdim=True), [X], [(1,)], ()),
    "std": (lambda x: x.std(1), [X], [(1,)], ()),
    "var_mean": (lambda x: torch.var_mean(x, 1, correction=0), [X], [(1,)], ()),
    "std_mean": (lambda x: torch.std_mean(x, (1, 2)), [X], [(1,)], ()),
    "prod": (lambda x: x.prod(1), [X], [(1,)], ()),
    "amax": (lambda x: x.amax(1), [X], [(1,)], ()),
    "amin": (lambda x: x.amin((0, 1)), [X], [(1,)], ()),
    "max": (lambda x: x.max(1).values, [X], [(1,)], ()),
    "min": (lambda x: x.min(1).values, [X], [(1,)], ()),
    "max of two": (torch.maximum, [X, X.flip(0)], [(1,), (1,)], (1,)),
    "logsumexp": (lambda x: x.logsumexp(1), [X], [(1,)], ()),
    "softmax": (lambda x: x.softmax(1), [X], [(1,)], (1,)),
    "softmax beside": (lambda x: x.softmax(2), [WIDE], [(1, 2)], (1, 2)),
    "log_softmax": (lambda x: x.log_softmax(1), [X], [(1,)], (1,)),
    "cumsum": (lambda x: x.cumsum(1), [X], [(1,)], (1,)),
    "norm": (lambda x: x.norm(dim=1), [X], [(1,)], ()),
    "vector norm": (lambda x: torch.linalg.vector_norm(x, dim=1), [X], [(1,)], ()),
    "smallest norm": (lambda x: torch.linalg.vector_norm(x, -math.inf, dim=1), [X], [(1,)], ()),
    "normalize": (lambda x: F.normalize(x, dim=1), [X], [(1,)], (1,)),
    "cosine_similarity": (lambda a, b: F.cosine_similarity(a, b, 1), [X, X.flip(0)], [(1,), (1,)], ()),
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        [normal(3, 6), normal(6), normal(6)],
        [(1,), (0,), (0,)],
        (1,),
    ),
    "layer_norm bare": (lambda x: F.layer_norm(x, x.shape[1:]), [X], [(1,)], (1,)),
    "rms_norm": (lambda x, w: F.rms_norm(x, x.shape[-1:], w), [normal(3, 6), normal(6)], [(1,), (0,)], (1,)),
    "batch_norm": (
        lambda x, m, v, w, b: F.batch_norm(x, m.detach(), v.detach(), w, b),
        [X, normal(6), normal(6).abs(), normal(6), normal(6)],
        [(1,), (0,), (0,), (0,), (0,)],
        (1,),
    ),
    "group_norm columns": (
        lambda x, w, b: F.group_norm(x, 1, w, b),
        [normal(2, 6, 3), normal(6), normal(6)],
        [(1,), (0,), (0,)],
        (1,),
    ),
    "group_norm balanced": (  # positions 1 and 4 are one column of two groups
        lambda x, w, b: F.group_norm(x, 2, w, b),
        [normal(2, 6, 3), normal(6), normal(6)],
        [(1,), (0,), (0,)],
        (1,),
    ),
    "attention features": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        [normal(2, 3, 5, 6), normal(2, 3, 4, 6), normal(2, 3, 4, 6)],
        [(3,), (3,), (3,)],
        (3,),
    ),
    "attention scaled": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3, is_causal=True),
        [normal(2, 3, 5, 6), normal(2, 3, 5, 6), normal(2, 3, 5, 4)],
        [(3,), (3,), ()],
        (),
    ),
    "attention keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        [normal(2, 3, 5, 4), normal(2, 3, 6, 4), normal(2, 3, 6, 4)],
        [(), (2,), (2,)],
        (),
    ),
    "attention keys with a bias": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        [normal(2, 3, 5, 4), normal(2, 3, 6, 4), normal(2, 3, 6, 4), normal(5, 6)],
        [(), (2,), (2,), (1,)],
        (),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_masked_operator_equals_the_operator_on_the_living(name):
    function, operands, axes, out = CASES[name]
    found, tensors = masked(function, operands, axes)
    small = [without(t, a).clone().requires_grad_() for t, a in zip(operands, axes, strict=True)]
    expected = function(*small)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    found = found if len(found) == len(expected) else found[: len(expected)]
    weights = [normal(*e.shape) if e.dim() else torch.ones((), dtype=torch.float64) for e in expected]
    total = 0
    for f, e, w in zip(found, expected, weights, strict=True):
        f = without(f, out)
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
        total = total + (f * w).sum()
    total.backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for mine, theirs, dead in zip(tensors.values(), small, axes, strict=True):
        if theirs.grad is None:
            assert mine.grad is None or not mine.grad.any()
            continue
        torch.testing.assert_close(without(mine.grad, dead), theirs.grad, rtol=1e-10, atol=1e-12)
        for axis in dead:  # nothing flows into what is dead: every NaN there would
            assert not mine.grad.index_select(axis, torch.tensor(GONE)).any()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_units(kind):
    torch.manual_seed(0)
    big, small = (kind(4, n, num_layers=2, bidirectional=True, batch_first=True).double() for n in (6, 4))
    gates = big.weight_hh_l0.shape[0] // 6
    living = torch.tensor([0, 2, 3, 5])
    rows = torch.cat([living + 6 * g for g in range(gates)])
    both = torch.cat([living, living + 6])
    for name, p in small.named_parameters():
        value = getattr(big, name)[rows]
        if name.startswith("weight_hh"):
            value = value[:, living]
        elif name.startswith("weight_ih_l1"):
            value = value[:, both]
        p.data = value.detach().clone()
    program = export(big, (normal(2, 5, 4),), None)

    def dead(node):
        name = program.tensor_names.get(node.name)
        if name is None:
            return {}
        own = {0: flags(6, GONE).repeat(gates)}
        if name.startswith("weight_hh"):
            own[1] = flags(6, GONE)
        elif name.startswith("weight_ih_l1"):
            own[1] = flags(6, GONE).repeat(2)
        return own

    tensors = dict(big.named_parameters())
    interpreter = MaskedInterpreter(program.graph_module, program.tensor_names, program.constants, dead, tensors)
    output = interpreter.run_on([normal(2, 5, 4)])[0]
    expected = small(normal(2, 5, 4))[0]
    torch.testing.assert_close(output[..., both], expected, rtol=1e-12, atol=1e-12)


def test_operators_without_a_masked_form_are_said():
    with pytest.raises(NotImplementedError, match=r"aten.topk.default over an axis that loses positions has no masked"):
        masked(lambda x: x.topk(2, dim=1).values, [X], [(1,)])
    found, _ = masked(lambda x: x.topk(2, dim=2).values, [X], [(1,)])
    assert torch.equal(found[0], X.topk(2, dim=2).values)
    assert {"layer_norm", "mean", "linear", "lstm"} <= RULES.keys()

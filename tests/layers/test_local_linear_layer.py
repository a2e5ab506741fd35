"""Local linear attention: published values, softmax and regression as limits, both forms against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import GradcheckError

from archsmith.layers.local_linear_attention import local_linear_attention, local_linear_fit

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "local-linear-attention.json").read_text())["cases"]
}
EXACT = {"rtol": 1e-30, "delta_eps": 0.0}
FORMS = {
    "naive": {"blockwise": False},
    "blockwise": {"blockwise": True},
    "blockwise, small tiles": {"tile": (3, 2)},
    "blockwise, Jacobi": {"jacobi": True, "tile": (2, 5)},
    "blockwise, weights computed anew": {"keep_weights": False, "tile": (4, 3)},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def filled(text: str, shape: list[int]) -> torch.Tensor:
    """Return F(k, s) of the oracle with a head axis."""
    k, s = (float(x) for x in text.strip("F()").split(","))
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (s * torch.sin(0.7 * i + 0.013 * i * i + k)).reshape(shape).unsqueeze(1)


def case_a() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = CASES["A_forward_and_grad"]["input"]
    return tuple(filled(given[name], given["shape"]) for name in "qkv")


def drawn(*shape: int, count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(count)]


def softmax(q, k, v, scale):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


@forms
@pytest.mark.parametrize("name", ["A_forward_and_grad", "B_forward", "C_forward_d8"])
def test_published_values(name, form):
    given, expected = CASES[name]["input"], CASES[name]["expected"]
    q, k, v = (filled(given[each], given["shape"]) for each in "qkv")
    fit = local_linear_fit(q, k, v, ridge=given["ridge"], scale=given["scale"], **EXACT, **form)
    middle = given["shape"][1] // 2
    found = {
        "o_last": fit.output[0, 0, -1],
        "o_mid": fit.output[0, 0, middle],
        "o_sum": fit.output.sum(),
        "o_sum_sq": fit.output.square().sum(),
        "rho_last": fit.rho[0, 0, -1],
        "denom_last": fit.delta[0, 0, -1],
        "omega_last": fit.omega[0, 0, -1],
    }
    assert found.keys() == expected.keys() - {"true_grads"}
    for key, value in found.items():
        assert torch.allclose(value, torch.tensor(expected[key], dtype=torch.float64), rtol=0, atol=1e-9), key


@forms
@pytest.mark.parametrize("stop_ridge", [False, True])
def test_published_gradients(form, stop_ridge):
    q, k, v = (x.requires_grad_() for x in case_a())
    output = local_linear_attention(q, k, v, ridge=0.1, scale=0.5, stop_ridge=stop_ridge, **EXACT, **form)
    output.backward(filled("F(4,1)", [1, 8, 4]))
    full = CASES["A_forward_and_grad"]["expected"]["true_grads"]
    expected = {**full, **(CASES["A_reference_backward"]["expected"] if stop_ridge else {})}
    for key, value in {"q_last": q.grad[0, 0, -1], "k_2": k.grad[0, 0, 2], "v_2": v.grad[0, 0, 2]}.items():
        assert torch.allclose(value, torch.tensor(expected[key], dtype=torch.float64), rtol=0, atol=1e-9), key


def test_published_values_in_float32():
    given, expected = (CASES["C_forward_d8"][key] for key in ("input", "expected"))
    q, k, v = (filled(given[each], given["shape"]).float() for each in "qkv")
    output = local_linear_attention(q, k, v, ridge=given["ridge"], scale=given["scale"])
    assert output.dtype == torch.float32
    assert torch.allclose(output[0, 0, -1], torch.tensor(expected["o_last"]), rtol=0, atol=1e-4)


def test_truncated_conjugate_gradients():
    q, k, v = case_a()
    exact = local_linear_attention(q, k, v, ridge=0.1, scale=0.5, blockwise=False, delta_eps=0.0)
    expected = CASES["A_cg_truncation"]["expected"]
    for iterations, error in enumerate(expected, start=1):
        found = local_linear_attention(q, k, v, ridge=0.1, scale=0.5, iterations=iterations, **EXACT)
        worst = float((found - exact).abs().max())
        assert worst < 1e-12 if isinstance(error, str) else worst == pytest.approx(error, abs=1e-8)


@forms
def test_a_large_ridge_is_softmax_attention(form):
    q, k, v = case_a()
    ridges = [1.0, 100.0, 1e4, 1e6]
    for ridge, error in zip(ridges, CASES["A_softmax_limit"]["expected"], strict=True):
        found = local_linear_attention(q, k, v, ridge=ridge, scale=0.5, **EXACT, **form)
        assert float((found - softmax(q, k, v, 0.5)).abs().max()) == pytest.approx(error, abs=1e-9)


@forms
def test_the_weights_of_the_values_sum_to_one(form):
    q, k, v = case_a()
    options = {"ridge": 0.1, "scale": 0.5, **EXACT, **form}
    ones = local_linear_attention(q, k, torch.ones_like(v), **options)
    assert torch.allclose(ones, torch.ones_like(v), rtol=0, atol=1e-12)
    weights = local_linear_attention(q, k, torch.eye(8, dtype=torch.float64)[None, None], **options)
    assert float(weights.min()) < -0.01, "a local line extrapolates"
    output = local_linear_attention(q, k, v, **options)
    assert torch.allclose(local_linear_attention(q, k, v + 3.5, **options), output + 3.5, atol=1e-11)
    both = local_linear_attention(q, k, 2 * v - 3 * v.flip(2), **options)
    assert torch.allclose(both, 2 * output - 3 * local_linear_attention(q, k, v.flip(2), **options), atol=1e-11)


@forms
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_an_affine_map_is_read_off_exactly(form, scale):
    q, k, a = (0.5 * x for x in drawn(1, 2, 12, 4))
    v = k @ a[:, :, :4] + 0.7
    found = local_linear_attention(q, k, v, ridge=1e-10, scale=scale, **EXACT, **form)
    wanted = q @ a[:, :, :4] + 0.7
    assert torch.allclose(found[:, :, 5:], wanted[:, :, 5:], rtol=0, atol=1e-7)
    assert not torch.allclose(softmax(q, k, v, scale)[:, :, 5:], wanted[:, :, 5:], atol=0.1)


def test_without_scores_it_is_ordinary_least_squares():
    q, k, v = drawn(1, 1, 20, 3)
    found = local_linear_attention(q, k, v, ridge=1e-13, scale=0.0, causal=False, blockwise=False, delta_eps=0.0)
    design = torch.cat([torch.ones_like(k[0, 0, :, :1]), k[0, 0]], 1)
    coefficients = torch.linalg.lstsq(design, v[0, 0]).solution
    wanted = torch.cat([torch.ones_like(q[0, 0, :, :1]), q[0, 0]], 1) @ coefficients
    assert torch.allclose(found[0, 0], wanted, rtol=0, atol=1e-10)


@forms
def test_causal_rows_do_not_see_later_keys(form):
    q, k, v = drawn(1, 1, 9, 4)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 6:] += 100.0
    changed_v[:, :, 6:] -= 100.0
    before, after = (local_linear_attention(q, *kv, ridge=0.3, **form) for kv in ((k, v), (changed_k, changed_v)))
    assert torch.equal(before[:, :, :6], after[:, :, :6]) and not torch.equal(before[:, :, 6:], after[:, :, 6:])
    assert torch.allclose(before[:, :, 0], v[:, :, 0], atol=1e-9), "one key: its value"


@forms
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_are_as_if_they_were_not_there(form, causal):
    q, k, v = (x.requires_grad_() for x in drawn(2, 2, 7, 4))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    output = local_linear_attention(q, k, v, ridge=0.2, causal=causal, mask=mask, **form)
    short = local_linear_attention(q[1:, :, :4], k[1:, :, :4], v[1:, :, :4], ridge=0.2, causal=causal, **form)
    assert torch.allclose(output[1:, :, :4], short, atol=1e-9)
    whole = local_linear_attention(
        q, k, v, ridge=0.2, causal=causal, mask=mask[:, None, None].expand(2, 2, 7, 7), **form
    )
    assert torch.allclose(output, whole, atol=1e-12)
    output.square().sum().backward()
    assert not k.grad[1, :, 4:].any() and not v.grad[1, :, 4:].any() and k.grad[1, :, :4].all()


@forms
def test_a_query_that_sees_nothing_returns_zeros(form):
    q, k, v = (x.requires_grad_() for x in drawn(2, 1, 5, 4))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False  # padded in front: causal rows 0 and 1 see nothing
    output = local_linear_attention(q, k, v, ridge=0.2, mask=mask, **form)
    assert not output[0, :, :2].any() and output.isfinite().all() and output[0, :, 2:].any()
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    none = local_linear_attention(q, k, v, ridge=0.2, mask=torch.zeros_like(mask), causal=False, **form)
    assert not none.any()


@pytest.mark.parametrize("tile", [(1, 1), (2, 7), (5, 3), (16, 16), (100, 100)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("jacobi", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_blockwise_equals_naive_for_every_tile(tile, causal, jacobi, groups):
    tensors = [x.requires_grad_() for x in drawn(2, 2, 16, 6)]
    (weight,) = drawn(2, 2, 16, 6, count=1, seed=1)
    found = []
    for form in ({"blockwise": False}, {"tile": tile, "jacobi": jacobi, "keep_weights": groups == 1}):
        output = local_linear_attention(*tensors, ridge=0.3, causal=causal, groups=groups, rtol=1e-30, **form)
        found.append([output, *torch.autograd.grad((output * weight).sum(), tensors)])
    for naive, blockwise in zip(*found, strict=True):
        # Between groups delta can be near zero or negative: outputs and gradients are then large, hence relative
        assert float((naive - blockwise).abs().max()) < 1e-12 * max(1.0, float(naive.abs().max()))


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("channels", [16, 64])
def test_blockwise_equals_naive_by_default(channels, ridge):
    q, k, v = drawn(1, 2, 150, channels)
    naive = local_linear_attention(q, k, v, ridge=ridge, blockwise=False)
    assert float((local_linear_attention(q, k, v, ridge=ridge) - naive).abs().max()) < 1e-5
    # In float32 the naive form is itself away from the solution: the blockwise one may not be further.
    single = [x.float() for x in (q, k, v)]
    away = [
        float((local_linear_attention(*single, ridge=ridge, blockwise=form).double() - naive).abs().max())
        for form in (False, True)
    ]
    assert away[1] < max(1e-5, 1.2 * away[0]), away


def test_the_published_stopping_rule_is_further_away():
    q, k, v = drawn(1, 2, 150, 16)
    naive = local_linear_attention(q, k, v, blockwise=False)
    published = local_linear_attention(q, k, v, rtol=1e-12, iterations=32)
    assert 1e-5 < float((published - naive).abs().max()) < 1e-2


def test_blockwise_equals_naive_in_float32():
    inputs = [x.float() for x in drawn(1, 2, 150, 16)]
    naive, blockwise = (local_linear_attention(*inputs, ridge=10.0, blockwise=form) for form in (False, True))
    assert float((naive - blockwise).abs().max()) < 1e-5


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("stop_ridge", [False, True])
@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 5)])
def test_gradients_by_finite_differences(blockwise, stop_ridge, shape):
    q, k, v = (x.requires_grad_() for x in drawn(1, 2, 5, 4))
    ridge = torch.full(shape, 0.4, dtype=torch.float64).requires_grad_()

    def call(*tensors):
        q, k, v, ridge = tensors
        options = {"rtol": 1e-30, "tile": (2, 3), "blockwise": blockwise, "stop_ridge": stop_ridge}
        return local_linear_attention(q, k, v, ridge=ridge, **options)

    if not stop_ridge:
        assert torch.autograd.gradcheck(call, (q, k, v, ridge))
        return
    # The other gradient is that of the form with omega detached, and not the whole one.
    by_autograd = torch.autograd.grad(
        local_linear_attention(q, k, v, ridge=ridge, blockwise=False, stop_ridge=True).square().sum(), (q, k, v, ridge)
    )
    found = torch.autograd.grad(call(q, k, v, ridge).square().sum(), (q, k, v, ridge))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(by_autograd, found, strict=True))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(call, (q, k, v, ridge))


def test_ridges_of_heads_and_of_positions():
    q, k, v = drawn(2, 2, 6, 4)
    per_head = local_linear_attention(q, k, v, ridge=torch.tensor([0.1, 5.0]), tile=(4, 4))
    for head, ridge in enumerate((0.1, 5.0)):
        assert torch.allclose(per_head[:, head], local_linear_attention(q, k, v, ridge=ridge)[:, head], atol=1e-9)
    ridges = torch.rand(2, 1, 6, dtype=torch.float64) + 0.1
    per_token = local_linear_attention(q, k, v, ridge=ridges, tile=(4, 4))
    alone = local_linear_attention(q, k, v, ridge=float(ridges[1, 0, 3]), tile=(4, 4))
    assert torch.allclose(per_token[1, :, 3], alone[1, :, 3], atol=1e-9)
    assert not torch.allclose(per_token[1, :, 4], alone[1, :, 4], atol=1e-4)


def test_the_ridge_does_not_depend_on_the_shift():
    q, k, v = drawn(1, 1, 8, 4)
    # All scores 1000 larger: the same weights, if only the shift takes it up.
    extra_q, extra_k = torch.full_like(q[..., :1], 100.0), torch.full_like(k[..., :1], 100.0)
    wide = local_linear_attention(
        torch.cat([q, extra_q], -1), torch.cat([k, extra_k], -1), v, ridge=0.5, scale=0.5, causal=False
    )
    assert torch.allclose(wide, local_linear_attention(q, k, v, ridge=0.5, scale=0.5, causal=False), atol=1e-6)


def test_groups_cut_the_matrix_into_blocks():
    q, k, v = drawn(1, 1, 9, 6)
    whole, halves = (local_linear_fit(q, k, v, ridge=0.2, groups=groups, rtol=1e-30) for groups in (1, 2))
    assert not torch.allclose(whole.output, halves.output, atol=1e-3)
    w = torch.softmax(6**-0.5 * q[0, 0, -1] @ k[0, 0].T, 0)
    z = k[0, 0] - q[0, 0, -1]
    rho = []
    for block in (z[:, :3], z[:, 3:]):
        sigma = block.T @ (w[:, None] * block) + 0.2 * torch.eye(3, dtype=torch.float64)
        rho.append(torch.linalg.solve(sigma, (w[:, None] * block).sum(0)))
    assert torch.allclose(halves.rho[0, 0, -1], torch.cat(rho), atol=1e-9)


def test_fewer_keys_heads_and_queries_at_the_end():
    q, k, v = drawn(1, 4, 8, 4)
    shared = local_linear_attention(q, k[:, :2], v[:, :2], ridge=0.2)
    repeated = local_linear_attention(q, k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]], ridge=0.2)
    assert torch.equal(shared, repeated)
    for form in FORMS.values():
        last = local_linear_attention(q[:, :, -3:], k, v, ridge=0.2, **form)
        assert torch.allclose(last, local_linear_attention(q, k, v, ridge=0.2, **form)[:, :, -3:], atol=1e-9)


def test_half_precision_is_computed_in_float32():
    q, k, v = drawn(1, 2, 20, 8, dtype=torch.float32)
    half = [x.bfloat16() for x in (q, k, v)]
    found = local_linear_attention(*half, ridge=0.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, local_linear_attention(*(x.float() for x in half), ridge=0.5).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(local_linear_attention(q, k, v), local_linear_attention(q, k, v).float())


def test_the_blockwise_form_saves_no_matrix():
    saved = []
    q, k, v = (x.requires_grad_() for x in drawn(1, 2, 64, 8, dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        local_linear_attention(q, k, v, tile=(16, 16))
    # q, k, v, o and rho have a row of 8 for each of 128 queries; delta, shift and omega one number; and the ridge
    assert sorted(saved) == [1, 128, 128, 128, *[1024] * 5]
    many = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: many.append(t.numel()) or t, lambda t: t):
        local_linear_attention(q, k, v, blockwise=False)
    assert max(many) >= 2 * 64 * 64


def test_it_can_be_exported():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return local_linear_attention(q, k, v, ridge=0.3, iterations=6)

    inputs = tuple(drawn(1, 2, 7, 4, dtype=torch.float32))
    program = torch.export.export(Attention(), inputs, strict=False)
    assert torch.allclose(program.module()(*inputs), Attention()(*inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q \(2, 3, 4\)"),
        ({"k": torch.zeros(1, 3, 5, 4)}, "heads of k dividing"),
        ({"v": torch.zeros(1, 2, 6, 4)}, "equal length"),
        ({"q": torch.zeros(1, 2, 6, 4)}, "at least as many keys as queries"),
        ({"ridge": -0.1}, r"ridge: got -0.1; allowed: a finite number of at least 0"),
        ({"ridge": torch.zeros(3)}, r"ridge: got a tensor of shape \(3,\)"),
        ({"groups": 3}, "groups: got 3; allowed: a divisor of the 4 channels"),
        ({"iterations": 0}, "iterations 0"),
        ({"tile": (0, 4)}, "tile"),
        ({"mask": torch.ones(1, 5)}, "mask: got torch.float32"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, r"shape \(1, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    q, k, v = drawn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=text):
        local_linear_attention(**{"q": q, "k": k, "v": v, **change})

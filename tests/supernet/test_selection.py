import pytest
import torch
from darts_recipe import alpha, cases

from archsmith.core.errors import UserError
from archsmith.families.darts_space import DARTS_OPERATIONS, edges_of
from archsmith.supernet.selection import magnitude

OPTIONS = (DARTS_OPERATIONS,) * 14


def chosen(logits):
    return [list(edge) for edge in magnitude(logits.softmax(-1), OPTIONS, edges_of(4))]


@pytest.mark.parametrize("case", cases("genotype:"), ids=lambda case: case["name"])
def test_published_rule(case):
    if case["name"] == "genotype:none_dominant":
        logits = 0.1 * alpha()
        logits[:, 0] += 5.0
        assert chosen(logits) == case["expected"]["normal"]
        return
    logits = alpha(scale=float(case["name"].rpartition("scale")[2]))
    assert chosen(logits) == case["expected"]["normal"]
    assert chosen(logits.flip(-1)) == case["expected"]["reduce"]


def test_ties_keep_the_lower_index():
    assert chosen(torch.zeros(14, 8)) == [["max_pool_3x3", source] for _ in range(4) for source in (0, 1)]


def test_a_constant_added_to_a_row_changes_nothing():
    shifts = torch.arange(14.0).unsqueeze(-1)
    assert chosen(alpha() + shifts) == chosen(alpha())


def test_edges_may_have_options_of_their_own():
    strength = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    options = (("none", "skip_connect"), ("a", "b", "c"))
    assert magnitude(strength, options, ((0, 2), (1, 2))) == (("c", 1), ("skip_connect", 0))
    assert magnitude(strength, options, ((0, 2), (1, 2)), never=(), per_node=1) == (("none", 0),)


def test_what_has_no_answer_is_refused():
    with pytest.raises(UserError, match="strength: got 'NaN'"):
        magnitude(torch.full((2, 2), torch.nan), (("a", "b"),) * 2, ((0, 2), (1, 2)))
    with pytest.raises(UserError, match="an operation other than none"):
        magnitude(torch.ones(2, 1), (("none",),) * 2, ((0, 2), (1, 2)))

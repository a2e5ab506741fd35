import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mobile_samples import fact

from archsmith.atoms.groups import AtomBlock, AtomGroup, Atoms, Slot
from archsmith.atoms.score import alive, cost_of, fit_budget, mask_by_macs_budget, protect


def atoms_of(*blocks):
    """Return atoms; a block is ``(minimum, (size, macs), (size, macs), ...)`` and groups are called ``<block>/<i>``."""
    groups, owners = [], []
    for b, (minimum, *sizes) in enumerate(blocks):
        names = [f"{b}/{i}" for i in range(len(sizes))]
        for name, (size, macs) in zip(names, sizes, strict=True):
            groups.append(AtomGroup(name, str(b), size, name, (Slot(name, 0),), {"macs": macs, "params": 1}))
        owners.append(AtomBlock(str(b), tuple(names), minimum, f"{b}.norm", 1e-3))
    return Atoms(tuple(groups), tuple(owners))


def tensors(**values):
    return {name.removeprefix("g").replace("_", "/"): torch.tensor(v) for name, v in values.items()}


@st.composite
def scored_atoms(draw, largest=4):
    """Small atoms, scores without ties, and a mask of what is still considered."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = [(int(rng.integers(1, largest + 1)), int(rng.integers(1, 50))) for _ in range(int(rng.integers(1, 3)))]
        blocks.append((int(rng.integers(0, 2)), *sizes))
    atoms = atoms_of(*blocks)
    values = iter(rng.permutation(len(atoms)) + 1.0)
    scores = {g.name: torch.tensor([next(values) * rng.choice([-1, 1]) for _ in range(g.size)]) for g in atoms}
    return atoms, scores


def living(atoms, keep, block):
    return sum(int(keep[name].sum()) for name in block.groups)


# --------------------------------------------------------------------- the dead test


def test_an_atom_is_dead_when_weights_and_average_are():
    scales = {"a": torch.tensor([0.5, 1e-3, -1e-3, 1e-3, 2e-3])}
    average = {"a": torch.tensor([1e-3, 0.5, 1e-3, -1e-3, -2e-3])}
    assert alive(scales, average, 1e-3)["a"].tolist() == [True, True, False, False, True]
    assert alive(scales, average, 1e-3, average_alone=True)["a"].tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("case", range(3))
def test_the_published_mask_by_macs(case):
    given, expected = fact("mask_by_macs_budget")
    scales = [torch.tensor(values, dtype=torch.float64) for values in given["scales"]]
    keep, threshold, pruned = mask_by_macs_budget(scales, given["macs_per_atom"], given["macs_to_prune"][case])
    assert [mask.tolist() for mask in keep] == expected[case]["alive"]
    assert threshold == pytest.approx(expected[case]["threshold"], abs=1e-9)
    assert pruned == pytest.approx(expected[case]["pruned_macs"], abs=1e-9)


def test_the_published_mask_takes_everything_when_that_is_not_enough():
    keep, _, pruned = mask_by_macs_budget([torch.tensor([0.1, -0.2])], [10], 1000)
    assert keep[0].tolist() == [False, False]
    assert pruned == 20


# --------------------------------------------------------------------- protection


def test_a_block_without_residual_keeps_its_largest_atoms():
    atoms = atoms_of((1, (2, 1), (2, 1)), (0, (2, 1)), (3, (2, 1), (2, 1)))
    scores = tensors(g0_0=[0.1, 0.2], g0_1=[-0.9, 0.3], g1_0=[0.5, 0.6], g2_0=[0.1, 0.7], g2_1=[0.8, 0.2])
    none = {name: torch.zeros(2, dtype=torch.bool) for name in scores}
    keep = protect(atoms, none, scores)
    assert keep["0/1"].tolist() == [True, False] and not keep["0/0"].any()
    assert not keep["1/0"].any()  # a residual carries the signal
    assert living(atoms, keep, atoms.blocks[2]) == 3
    assert not any(mask.any() for mask in none.values())  # the wish is not changed


@given(scored_atoms(largest=9), st.integers(1, 4), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_protection_only_adds_the_largest_and_holds_its_rules(sample, divisor, bits):
    atoms, scores = sample
    rng = np.random.default_rng(bits)
    wish = {g.name: torch.from_numpy(rng.random(g.size) < 0.4) for g in atoms}
    keep = protect(atoms, wish, scores, divisor=divisor)
    for group in atoms:
        mask, wanted, score = keep[group.name], wish[group.name], scores[group.name].abs()
        assert not (wanted & ~mask).any()
        back, gone = score[mask & ~wanted], score[~mask]
        assert not len(back) or not len(gone) or back.min() > gone.max()
        width = int(mask.sum())
        assert width % divisor == 0 or width == group.size
    for block in atoms.blocks:
        assert living(atoms, keep, block) >= block.minimum
    again = protect(atoms, keep, scores, divisor=divisor)
    assert all(torch.equal(again[name], keep[name]) for name in keep)


def test_a_group_smaller_than_the_divisor_stays_whole():
    atoms = atoms_of((0, (3, 1), (7, 1)))
    scores = tensors(g0_0=[0.3, 0.2, 0.1], g0_1=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    wish = {"0/0": torch.tensor([True, False, False]), "0/1": torch.tensor([False] * 4 + [True] * 3)}
    keep = protect(atoms, wish, scores, divisor=4)
    assert keep["0/0"].all()
    assert keep["0/1"].tolist() == [False] * 3 + [True] * 4


# --------------------------------------------------------------------- the budget


def literal_fit(atoms, scores, fits):
    """Remove the smallest score whose block allows it, one at a time, until it fits."""
    keep = {g.name: torch.ones(g.size, dtype=torch.bool) for g in atoms}
    while not fits(keep):
        left = {name: living(atoms, keep, block) for block in atoms.blocks for name in block.groups}
        minimum = {name: block.minimum for block in atoms.blocks for name in block.groups}
        candidates = [
            (abs(float(scores[g.name][i])), g.name, i)
            for g in atoms
            for i in range(g.size)
            if keep[g.name][i] and left[g.name] > minimum[g.name]
        ]
        if not candidates:
            return None
        _, name, i = min(candidates)
        keep[name][i] = False
    return keep


@given(scored_atoms(), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_fitting_equals_the_literal_removal_one_by_one(sample, share):
    atoms, scores = sample
    limit = share * atoms.cost("macs")

    def fits(keep):
        return cost_of(atoms, keep, "macs") <= limit

    literal, fitted = literal_fit(atoms, scores, fits), fit_budget(atoms, scores, fits)
    if literal is None:  # the largest of a block may be too dear: then cheaper ones of it stay, if that helps
        assert fitted is None or fits(fitted)
    else:
        assert fitted is not None
        assert all(torch.equal(fitted[name], literal[name]) for name in literal)


def every_mask(atoms, divisor):
    """All allowed masks, up to the choice of units inside a group."""
    choices = [[n for n in range(g.size + 1) if n % divisor == 0 or n == g.size] for g in atoms]
    for widths in itertools.product(*choices):
        keep = {g.name: torch.arange(g.size) < n for g, n in zip(atoms, widths, strict=True)}
        if all(living(atoms, keep, block) >= block.minimum for block in atoms.blocks):
            yield keep


@given(scored_atoms(largest=5), st.integers(1, 3), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_fitting_fails_only_when_no_allowed_mask_fits(sample, divisor, share):
    atoms, scores = sample
    limit = share * atoms.cost("macs")

    def fits(keep):
        return cost_of(atoms, keep, "macs") <= limit

    fitted = fit_budget(atoms, scores, fits, divisor=divisor)
    possible = any(fits(keep) for keep in every_mask(atoms, divisor))
    assert (fitted is not None) == possible
    if fitted is not None:
        assert fits(fitted)
        for group in atoms:
            width = int(fitted[group.name].sum())
            assert width % divisor == 0 or width == group.size
            mask, score = fitted[group.name], scores[group.name].abs()
            assert not mask.any() or mask.all() or score[mask].min() > score[~mask].max()
        for block in atoms.blocks:
            assert living(atoms, fitted, block) >= block.minimum


def test_fitting_considers_only_what_is_kept_and_asks_rarely():
    atoms = atoms_of((0, (64, 1)), (0, (64, 1)))
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(64, generator=generator) for name in ("0/0", "1/0")}
    keep = {"0/0": scores["0/0"] > 0.5, "1/0": torch.ones(64, dtype=torch.bool)}
    calls = []

    def fits(mask):
        calls.append(1)
        return cost_of(atoms, mask, "macs") <= 40

    fitted = fit_budget(atoms, scores, fits, keep=keep)
    assert cost_of(atoms, fitted, "macs") == 40
    assert not (fitted["0/0"] & ~keep["0/0"]).any()
    assert len(calls) <= 10
    assert cost_of(atoms, keep, "macs") > 40  # the given mask is not changed

    def fits_anyway(mask):
        calls.append(1)
        return True

    calls.clear()
    assert fit_budget(atoms, scores, fits_anyway, keep=keep)["0/0"].equal(keep["0/0"])
    assert len(calls) == 1

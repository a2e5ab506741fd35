from __future__ import annotations

import numpy as np
import pytest
from ofa_samples import GOLDEN, SPACE, evaluations, genotypes

from archsmith.core.errors import UserError
from archsmith.space import AllOf, AnyOf, Categorical, Count, Given, Not, Ordinal, ProductSpace, Real, When
from archsmith.space.genotypes import Genotypes
from archsmith.testing.strategies import deep_space, flat_space, rising_space


def tangled() -> ProductSpace:
    """Conditions of several atoms, a condition on a conditional dimension, and a condition that is a negation."""
    return ProductSpace(
        "tangled",
        {
            "a": Categorical(("x", "y", "z")),
            "b": Count(0, 2),
            "c": Given(AllOf((When("a", ["x", "y"]), When("b", [1, 2]))), Ordinal((3, 5))),
            "d": Given(AnyOf((When("c", 5), When("a", "z"))), Categorical((False, True))),
            "e": Given(Not(When("d", True)), Count(1, 3)),
        },
    )


@pytest.mark.parametrize("space", [SPACE, flat_space(), tangled()], ids=lambda space: space.name)
def test_genotypes_and_architectures_are_two_forms_of_one_thing(space: ProductSpace) -> None:
    form = Genotypes(space)
    genes = form.sample(np.random.default_rng(0), 60)
    made = form.architectures(genes)
    for architecture in made:
        assert space.validate(dict(architecture)) == architecture
    np.testing.assert_array_equal(form.genes(made), form.canonical(genes))
    assert form.architectures(form.canonical(genes)) == made
    np.testing.assert_array_equal(form.active(genes), [space.activity(architecture) for architecture in made])
    np.testing.assert_array_equal(form.one_hot(genes), space.encode_many(made, "one-hot"))


def test_genotypes_that_differ_in_inactive_genes_are_one_architecture() -> None:
    form = Genotypes(tangled())
    everything = np.stack(np.meshgrid(*map(np.arange, form.counts_G), indexing="ij"), axis=-1).reshape(-1, 5)
    assert len(everything) == form.size == 3 * 3 * 2 * 2 * 3
    architectures = {architecture.digest for architecture in form.architectures(everything)}
    assert len(np.unique(form.canonical(everything), axis=0)) == len(architectures) == tangled().size


def test_once_for_all_has_the_published_encoding() -> None:
    form = Genotypes(SPACE)
    expected = GOLDEN["encodings"]["ofa_mbv3"]
    assert (len(form), form.length) == (expected["n_variables"], expected["onehot_length"])
    assert form.size == GOLDEN["distinct"]["genotypes"]
    assert np.log10(float(form.size)) == pytest.approx(expected["log10_size"], abs=1e-5)
    assert form.architectures(genotypes()[:20]) == [row[0] for row in evaluations()[:20]]


@pytest.mark.parametrize("name", ["ofa_resnet50", "transformer_wmt", "bert_base_sst2"])
def test_the_other_published_encodings(name: str) -> None:
    expected = GOLDEN["encodings"][name]
    dimensions = {
        f"{kind}/{number}": Categorical(tuple(range(options)))
        for kind, count, options in expected["variables"]
        for number in range(count)
    }
    form = Genotypes(ProductSpace(name, dimensions))
    assert (len(form), form.length) == (expected["n_variables"], expected["onehot_length"])
    assert np.log10(float(form.size)) == pytest.approx(expected["log10_size"], abs=1e-5)


def test_the_plain_encoding_shows_inactive_genes_and_the_masked_one_does_not() -> None:
    form = Genotypes(SPACE)
    genes = form.sample(np.random.default_rng(1), 40)
    plain, masked = form.one_hot(genes, masked=False), form.one_hot(genes)
    assert (plain.sum(axis=1) == 45).all()
    assert (masked.sum(axis=1) == form.active(genes).sum(axis=1)).all()
    assert (masked <= plain).all() and (masked < plain).any()


def test_spaces_without_an_integer_form_are_refused() -> None:
    for space in (deep_space(), rising_space(), ProductSpace("real", {"lr": Real(0, 1)})):
        assert not Genotypes.supports(space)
        with pytest.raises(UserError, match="without constraints"):
            Genotypes(space)

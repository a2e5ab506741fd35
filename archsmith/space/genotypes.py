"""Genotypes: architectures of a product space as rows of integers, so that thousands are bred in one numpy call.

A gene is the number of an option of one dimension; every dimension has a gene, whether it is active or not. Genotypes
that differ only in inactive genes are one architecture: ``canonical`` sets those to 0, ``one_hot`` masks their columns.

Example:
    >>> from archsmith.space import Categorical, Given, Ordinal, ProductSpace, When
    >>> kernel = Given(When("op", "conv"), Ordinal([3, 5]))
    >>> genotypes = Genotypes(ProductSpace("toy", {"op": Categorical(["conv", "pool"]), "op/kernel": kernel}))
    >>> genotypes.canonical(np.array([[0, 1], [1, 1]])).tolist()
    [[0, 1], [1, 0]]
    >>> genotypes.one_hot(np.array([[0, 1], [1, 1]])).tolist()
    [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.architecture import Architecture
from archsmith.space.base import Space
from archsmith.space.conditions import Atom, Condition
from archsmith.space.dimensions import Dimension, Real, Subset
from archsmith.space.options import option_count
from archsmith.space.product import ProductSpace
from archsmith.space.values import Value, strict_key

# N genotypes, G genes, D columns of the one-hot encoding

LISTED = 256
"""Most options of a dimension that is one gene."""


class Genotypes:
    """The integer form of a product space.

    Args:
        space: Dimensions of at most ``LISTED`` options each, under conditions, without constraints.

    Attributes:
        paths: Path of each gene, in the order of the walk.
        counts_G: Options of each gene.
        length: D, the width of the one-hot encoding (the same columns as ``space.encode``).
        size: Number of genotypes, an exact int; the space has as many architectures or fewer.

    Raises:
        UserError: A space that has no such form (``supports`` says which have).
    """

    def __init__(self, space: ProductSpace) -> None:
        if not self.supports(space):
            raise UserError(
                "space",
                getattr(space, "name", space),
                allowed=f"a ProductSpace of dimensions with at most {LISTED} options, without constraints",
                hint="Its own sample, crossover and mutate work on any space.",
            )
        self.space = space
        self.paths = space.paths
        domains = [list(_listed(slot.dimension)) for slot in space.slots]
        self._options = domains
        self._index = [{strict_key(value): at for at, value in enumerate(options)} for options in domains]
        self.counts_G = np.array([len(options) for options in domains], dtype=np.int64)
        self._starts_G = np.concatenate([[0], np.cumsum(self.counts_G)[:-1]]).astype(np.int64)
        self.length = int(self.counts_G.sum())
        self.size = math.prod(len(options) for options in domains)
        self._place = {path: gene for gene, path in enumerate(self.paths)}
        self._tests = {
            atom: np.array([atom.test(value) for value in domains[self._place[atom.path]]])
            for slot in space.slots
            if slot.condition is not None
            for atom in slot.condition.atoms()
        }

    @staticmethod
    def supports(space: Space) -> bool:
        """Return whether a space has the integer form."""
        return (
            isinstance(space, ProductSpace)
            and not space.linear
            and not space.predicates
            and not any(isinstance(slot.dimension, Real | Subset) for slot in space.slots)
            and all(option_count(slot.dimension.domain) <= LISTED for slot in space.slots)
        )

    def __len__(self) -> int:
        """Return G, the number of genes."""
        return len(self.paths)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return ``n`` genotypes of independent uniform genes, int64 of shape (N, G), not canonical."""
        return rng.integers(0, self.counts_G, size=(n, len(self)))

    def active(self, genes_NG: np.ndarray) -> np.ndarray:
        """Return one bool for each gene: whether the other genes leave its decision to be made."""
        active_GN = np.ones((len(self), len(genes_NG)), dtype=bool)
        genes_GN = genes_NG.T
        for gene, slot in enumerate(self.space.slots):
            if slot.condition is not None:
                truth = {atom: self._truth(atom, genes_GN, active_GN) for atom in slot.condition.atoms()}
                active_GN[gene] = _holds(slot.condition, truth, len(genes_NG))
        return active_GN.T

    def _truth(self, atom: Atom, genes_GN: np.ndarray, active_GN: np.ndarray) -> np.ndarray:
        gene = self._place[atom.path]
        return self._tests[atom][genes_GN[gene]] & active_GN[gene]

    def canonical(self, genes_NG: np.ndarray) -> np.ndarray:
        """Return the genotypes with inactive genes set to 0: equal rows are equal architectures, and only those."""
        return np.where(self.active(genes_NG), genes_NG, 0)

    def one_hot(self, genes_NG: np.ndarray, *, masked: bool = True) -> np.ndarray:
        """Return float64 of shape (N, D).

        Args:
            genes_NG: Genotypes.
            masked: Whether columns of inactive genes are zero; then it is the one-hot encoding of the space. Without
                it the encoding shows what makes no difference.
        """
        out = np.zeros((len(genes_NG), self.length))
        shown = self.active(genes_NG) if masked else np.ones(genes_NG.shape, dtype=bool)
        rows, genes = np.nonzero(shown)
        out[rows, self._starts_G[genes] + genes_NG[rows, genes]] = 1.0
        return out

    def architectures(self, genes_NG: np.ndarray) -> list[Architecture]:
        """Return the architectures of genotypes."""
        active, made = self.active(genes_NG), []
        for row, shown in zip(genes_NG.tolist(), active.tolist(), strict=True):
            decisions = {
                path: options[gene]
                for path, options, gene, here in zip(self.paths, self._options, row, shown, strict=True)
                if here
            }
            made.append(Architecture.of_valid(decisions, space=self.space.name, canonical=self.space.canonical))
        return made

    def genes(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return the canonical genotypes of valid architectures, shape (N, G)."""
        found = np.zeros((len(architectures), len(self)), dtype=np.int64)
        for row, architecture in enumerate(architectures):
            for path, value in architecture.decisions.items():
                gene = self._place[path]
                found[row, gene] = self._index[gene][strict_key(value)]
        return found


def _holds(condition: Condition, truth: dict[Atom, np.ndarray], count: int) -> np.ndarray:
    """Return a condition's value for every row; truth tables of its atoms are joined by the condition itself."""
    atoms = list(truth)
    if len(atoms) == 1:
        both = [bool(condition.holds({atoms[0]: value}.__getitem__)) for value in (False, True)]
        return np.where(truth[atoms[0]], both[1], both[0])
    rows = zip(*(truth[atom].tolist() for atom in atoms), strict=True)
    known: dict[tuple[bool, ...], bool] = {}
    out = np.empty(count, dtype=bool)
    for row, values in enumerate(rows):
        if values not in known:
            given = dict(zip(atoms, values, strict=True))
            known[values] = bool(condition.holds(given.__getitem__))
        out[row] = known[values]
    return out


def _listed(dimension: Dimension) -> Sequence[Value]:
    domain = dimension.domain
    assert isinstance(domain, Sequence)
    return domain

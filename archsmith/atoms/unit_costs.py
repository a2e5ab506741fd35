"""What removable units cost, exactly, as polynomials in how many of each group are kept.

A convolution or matrix product with a weight costs ``positions * numel(weight)``, and the elements of a weight are
counted by its axes: positions outside all groups stay, those of a group go with its units. So the cost of a network is
a sum of products of kept sizes, mostly bilinear: channels in times channels out. What one unit costs therefore depends
on how many units of *other* groups are left, and ``marginal`` says it for the present numbers.

Products of two activations (attention scores, mixing) have no weight to read the groups off. Their sizes are observed:
the smallest allowed cut of each group is made on a copy without numbers, and the products are listed again. The same is
done for every product when one combined cut shows that positions depend on units too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from archsmith.atoms.groups import tensors_of
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.units import IntArray, Place, UnitGroup
from archsmith.core.errors import ArchsmithError, Shown, UserError
from archsmith.cost.products import Product, called, products

FloatArray = npt.NDArray[np.float64]

Monomial = tuple[int, ...]
"""Positions of groups, ascending, one for each power: ``(0, 3)`` is ``x_0 * x_3``, x the kept share of a group."""

Polynomial = dict[Monomial, Fraction]
"""Coefficients by monomial; ``()`` is the constant."""

Shrunk = Callable[[Mapping[str, IntArray]], nn.Module]
"""Returns a copy of the network without the given units (positions by group name)."""


def plus(*terms: Polynomial) -> Polynomial:
    """Return the sum of polynomials."""
    total: Polynomial = {}
    for term in terms:
        for monomial, coefficient in term.items():
            total[monomial] = total.get(monomial, Fraction(0)) + coefficient
    return {monomial: value for monomial, value in total.items() if value}


def times(*factors: Polynomial) -> Polynomial:
    """Return the product of polynomials."""
    result: Polynomial = {(): Fraction(1)}
    for factor in factors:
        longer: Polynomial = {}
        for a, x in result.items():
            for b, y in factor.items():
                monomial = tuple(sorted((*a, *b)))
                longer[monomial] = longer.get(monomial, Fraction(0)) + x * y
        result = longer
    return result


def scaled(polynomial: Polynomial, factor: int | Fraction) -> Polynomial:
    """Return ``factor * polynomial``."""
    return {monomial: value * factor for monomial, value in polynomial.items()}


class CompiledPolynomial:
    """A polynomial that is evaluated often, in double precision (exact below 2**53 up to the rounding of shares).

    Args:
        polynomial: What is evaluated.
        sizes: Units of every group at share 1.
    """

    def __init__(self, polynomial: Polynomial, sizes: Sequence[int]) -> None:
        self.sizes = np.asarray(sizes, dtype=np.float64)
        width = max((len(monomial) for monomial in polynomial), default=0) or 1
        one = len(sizes)  # a last share that is always 1 fills short monomials
        self._index = np.array(
            [[*monomial, *[one] * (width - len(monomial))] for monomial in polynomial], dtype=np.int64
        ).reshape(len(polynomial), width)
        self._coefficients = np.array([float(value) for value in polynomial.values()])
        pairs = [
            (row, group, power) for row, monomial in enumerate(polynomial) for group, power in Counter(monomial).items()
        ]
        rows, owners, powers = [p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs]
        self._rows, self._groups, self._powers = (np.array(column, dtype=np.int64) for column in (rows, owners, powers))
        # Each pair's monomial with one power of its group taken out: the derivative, defined at zero units too.
        self._rest = self._index[self._rows].copy() if len(pairs) else np.zeros((0, width), dtype=np.int64)
        for number, (_, group, _) in enumerate(pairs):
            self._rest[number, int(np.argmax(self._rest[number] == group))] = one

    def _values(self, kept: FloatArray) -> FloatArray:
        shares = np.append(kept / self.sizes, 1.0)
        values: FloatArray = self._coefficients * shares[self._index].prod(axis=1)
        return values

    def value(self, kept: FloatArray) -> float:
        """Return the value when ``kept`` units of every group stay."""
        return float(self._values(kept).sum())

    def marginal(self, kept: FloatArray, chunk: FloatArray) -> FloatArray:
        """Return for every group by how much the value falls when ``chunk`` of its units go, the others unchanged."""
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(kept > 0, np.maximum(kept - chunk, 0) / np.maximum(kept, 1), 1.0)
        falls = self._values(kept)[self._rows] * (1.0 - left[self._groups] ** self._powers)
        result: FloatArray = np.bincount(self._groups, weights=falls, minlength=len(kept)).astype(np.float64)
        return result

    def gradient(self, kept: FloatArray) -> FloatArray:
        """Return the derivative in the number of kept units of every group."""
        shares = np.append(kept / self.sizes, 1.0)
        slopes = self._coefficients[self._rows] * self._powers * shares[self._rest].prod(axis=1)
        result: FloatArray = np.bincount(self._groups, weights=slopes, minlength=len(kept)) / self.sizes
        return result


@dataclass(frozen=True)
class ProductCost:
    """One product of the network with its cost in the kept shares.

    Attributes:
        product: The product as it was counted.
        macs: Its MACs.
        read: Elements of its activations read; only where the groups of its weight say how they shrink.
        written: Elements written; likewise.
        elements: Elements of its weight, zero without one.
    """

    product: Product
    macs: Polynomial
    read: Polynomial
    written: Polynomial
    elements: Polynomial


class UnitCosts:
    """Exact MACs and parameters of a network for any numbers of kept units.

    Args:
        model: The network as it is; read only.
        inputs: Example inputs; costs are those of one example.
        groups: All groups.
        shrunk: Makes a copy without given units. Needed where products of activations depend on units, and to check
            that nothing else does; without it only weights count, which is exact for networks of convolutions and
            linear layers.
        call: ``call(model, *inputs)`` where ``model(*inputs)`` is not the way.

    Attributes:
        names: Names of the groups, in order.
        sizes: Units of each.
        products: Every convolution and matrix product.
        refused: Why no unit of a group can go alone, by its name, as far as cuts were tried.
        polynomials: By cost name, "macs" and "params".

    Raises:
        UserError: A place that the model does not have.
        ArchsmithError: An operator without a counting rule ran, or the counts of a probing cut contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        groups: Sequence[UnitGroup],
        *,
        shrunk: Shrunk | None = None,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.names = tuple(group.name for group in groups)
        self.sizes = tuple(group.size for group in groups)
        self._groups = tuple(groups)
        self._position = {name: i for i, name in enumerate(self.names)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
        self._axes = weight_axes(groups, shapes)
        self._inputs, self._call = inputs, call
        self.refused: dict[str, str] = {}
        found, complete = self._products(model)
        if not complete:
            raise ArchsmithError("an operator without a counting rule ran: the MACs of this network are not known.")
        params = plus(*(self._elements(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()))
        self.products = tuple(self._from_weight(product, shapes) for product in found)
        if shrunk is not None and groups and not self._weights_explain(shrunk):
            self.products = tuple(self._probed(found, shrunk, shapes))
            if not self._explains_one_cut(shrunk, after_probing=True):
                raise ArchsmithError("the costs of this network are not products of the numbers of its kept units.")
        macs = plus(*(each.macs for each in self.products))
        self.polynomials: dict[str, Polynomial] = {"macs": macs, "params": params}
        self._compiled = {name: CompiledPolynomial(value, self.sizes) for name, value in self.polynomials.items()}

    def recount(self, model: nn.Module) -> dict[str, int]:
        """Return "macs" and "params" of a network that is called in the same way, counted anew."""
        found, _ = self._products(model)
        return {"macs": sum(each.macs for each in found), "params": sum(p.numel() for p in model.parameters())}

    def of(self, kept: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return exact "macs" and "params" when ``kept`` units of each group stay (all, where a group is not named).

        Exact where whole chunks go (``smallest_chunk``); between them a grouped convolution has no definite size.
        """
        shares = self._shares(kept or {})
        return {name: round(_evaluated(value, shares)) for name, value in self.polynomials.items()}

    def compiled(self, cost: str) -> CompiledPolynomial:
        """Return the polynomial of a cost for fast evaluation."""
        return self._compiled[cost]

    def marginal(self, cost: str, kept: FloatArray, chunk: FloatArray | float = 1.0) -> FloatArray:
        """Return what the next ``chunk`` units of every group cost, when ``kept`` units of each are there."""
        return self._compiled[cost].marginal(kept, np.broadcast_to(np.asarray(chunk, dtype=np.float64), kept.shape))

    def compile(self, polynomial: Polynomial) -> CompiledPolynomial:
        """Return another polynomial over the same groups for fast evaluation."""
        return CompiledPolynomial(polynomial, self.sizes)

    def _products(self, model: nn.Module) -> tuple[list[Product], bool]:
        module, inputs, own_name = called(model, self._inputs, self._call)
        found, complete = products(module, inputs)
        return [replace(p, module=own_name(p.module), weight=own_name(p.weight)) for p in found], complete

    # ------------------------------------------------------------------ from weights

    def _shares(self, kept: Mapping[str, int]) -> list[Fraction]:
        if unknown := sorted(set(kept) - set(self.names)):
            raise UserError("kept", unknown[0], allowed=f"the groups {list(self.names)}")
        return [Fraction(kept.get(name, size), size) for name, size in zip(self.names, self.sizes, strict=True)]

    def _axis(self, tensor: str, axis: int, size: int) -> Polynomial:
        return self._axes.get((tensor, axis), {(): Fraction(size)})

    def _elements(self, tensor: str, shape: tuple[int, ...]) -> Polynomial:
        return times(*(self._axis(tensor, axis, size) for axis, size in enumerate(shape)))

    def _from_weight(self, product: Product, shapes: Mapping[str, tuple[int, ...]]) -> ProductCost:
        """Return the cost of a product whose weight says everything; constant where it has none."""
        shape = shapes.get(product.weight, ())
        if not product.weight:
            return ProductCost(
                product,
                {(): Fraction(product.macs)},
                {(): Fraction(product.read)},
                {(): Fraction(product.written)},
                {},
            )
        elements = self._elements(product.weight, shape)
        outputs, inputs = product.weight_axes
        written = self._axis(product.weight, outputs, shape[outputs])
        read = written if product.kind == "depthwise" else self._axis(product.weight, inputs, shape[inputs])
        read_size = shape[outputs if product.kind == "depthwise" else inputs]
        return ProductCost(
            product,
            scaled(elements, Fraction(product.macs, prod(shape))),
            scaled(read, Fraction(product.read, read_size)),
            scaled(written, Fraction(product.written, shape[outputs])),
            elements,
        )

    # ------------------------------------------------------------------ from probing cuts

    def _weights_explain(self, shrunk: Shrunk) -> bool:
        """Whether every product has a weight, and one cut of all groups costs what the weights say."""
        return all(each.product.weight for each in self.products) and self._explains_one_cut(
            shrunk, after_probing=False
        )

    def _explains_one_cut(self, shrunk: Shrunk, *, after_probing: bool) -> bool:
        removed = {
            group.name: chunk
            for group in self._groups
            if group.name not in self.refused and len(chunk := smallest_chunk(group))
        }
        if not removed:
            return True
        try:
            found, _ = self._products(shrunk(removed))
        except CutRefused:
            return after_probing  # the shrinker counts every cut anew in any case
        kept = {name: self.sizes[self._position[name]] - len(units) for name, units in removed.items()}
        shares = self._shares(kept)
        expected = _evaluated(plus(*(each.macs for each in self.products)), shares)
        return sum(product.macs for product in found) == expected

    def _probed(
        self, found: Sequence[Product], shrunk: Shrunk, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[ProductCost]:
        """Yield the products with the sizes that cuts of one group after another leave them."""
        owned: list[dict[tuple[int, int], Fraction]] = [{} for _ in found]  # by (size, group): lost part at x = 0
        for position, group in enumerate(self._groups):
            chunk = smallest_chunk(group)
            if not len(chunk):
                continue
            try:
                after, _ = self._products(shrunk({group.name: chunk}))
            except CutRefused as error:
                self.refused[group.name] = error.reason
                continue
            if len(after) != len(found):
                raise ArchsmithError(f"a cut of {group.name} changed which products run, not only their sizes.")
            for number, (old, new) in enumerate(zip(found, after, strict=True)):
                for axis, (before, now) in enumerate(zip(old.sizes, new.sizes, strict=True)):
                    if now != before:
                        owned[number][axis, position] = Fraction(before - now, before) * Fraction(
                            group.size, len(chunk)
                        )
        for product, parts in zip(found, owned, strict=True):
            sizes = [self._size(before, axis, parts) for axis, before in enumerate(product.sizes)]
            plain = self._from_weight(product, shapes)
            yield ProductCost(product, times(*sizes), plain.read, plain.written, plain.elements)

    def _size(self, before: int, axis: int, parts: Mapping[tuple[int, int], Fraction]) -> Polynomial:
        """Return one size of a product: joined from slices of groups, or the product of what several groups own."""
        mine = {group: part for (a, group), part in parts.items() if a == axis}
        total = sum(mine.values(), start=Fraction(0))
        if total <= 1:
            slices: list[Polynomial] = [{(group,): before * part} for group, part in mine.items()]
            return plus({(): before * (1 - total)}, *slices)
        if all(part == 1 for part in mine.values()):
            return {tuple(sorted(mine)): Fraction(before)}
        raise ArchsmithError(f"a size of {before} depends on {len(mine)} groups in a way that probing cannot tell.")


def _evaluated(polynomial: Polynomial, shares: Sequence[Fraction]) -> Fraction:
    return sum(
        (
            value * prod((shares[group] for group in monomial), start=Fraction(1))
            for monomial, value in polynomial.items()
        ),
        start=Fraction(0),
    )


def smallest_chunk(group: UnitGroup) -> IntArray:
    """Return the fewest units that may go together from the end of a group, empty when nothing may go.

    A divisor removes so many units that a multiple is left; a balance takes equally many out of every set.
    """
    if group.frozen:
        return np.zeros(0, dtype=np.int64)
    if group.balance:
        sets = [list(each) for each in group.balance]
        chosen: list[int] = []
        for count in range(1, min(len(each) for each in sets) + 1):
            chosen = [unit for each in sets for unit in each[len(each) - count :]]
            if (group.size - len(chosen)) % group.divisor == 0:
                break
    else:
        chosen = list(range(group.size - (group.size % group.divisor or group.divisor), group.size))
    if group.size - len(chosen) < group.minimum:
        return np.zeros(0, dtype=np.int64)
    return np.array(sorted(chosen), dtype=np.int64)


def weight_axes(
    groups: Sequence[UnitGroup], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, int], Polynomial]:
    """Return how many positions of every axis of every tensor stay, as polynomials in the kept shares.

    Positions of an axis fall into classes by the groups that own them: none, one, or several at once (a row of a
    projection belongs to a head and to a pair of its columns); a position stays while all its owners do. Of several
    axes taken jointly the last one shrinks: rows of a grouped convolution keep equally many columns.

    Raises:
        UserError: A tensor, axis or position that is not there.
    """
    owners: dict[tuple[str, int], dict[int, list[int]]] = {}
    joint: dict[tuple[str, int], Polynomial] = {}
    for number, group in enumerate(groups):
        for place in group.places:
            shape = _shape_at(place, group, shapes)
            if len(place.axes) == 1:
                along = owners.setdefault((place.tensor, place.axes[0]), {})
                for row in np.unique(place.index).tolist():
                    along.setdefault(int(row), []).append(number)
            else:
                covered = Fraction(place.index.size, prod(shape[axis] for axis in place.axes))
                last = place.axes[-1]
                before = joint.get((place.tensor, last), {(): Fraction(shape[last])})
                joint[place.tensor, last] = plus(
                    before, {(): -shape[last] * covered}, {(number,): shape[last] * covered}
                )
    result = dict(joint)
    for (tensor, axis), rows in owners.items():
        classes = Counter(tuple(sorted(set(names))) for names in rows.values())
        classes[()] += shapes[tensor][axis] - len(rows)
        result[tensor, axis] = {monomial: Fraction(count) for monomial, count in classes.items() if count}
    return result


def _shape_at(place: Place, group: UnitGroup, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes.get(place.tensor)
    if shape is None:
        raise UserError(
            f"group {group.name}", Shown(f"a place in '{place.tensor}'"), allowed="a parameter or buffer of the model"
        )
    length = prod(shape[axis] for axis in place.axes) if all(axis < len(shape) for axis in place.axes) else 0
    if (
        not length
        or place.index.shape[:1] != (group.size,)
        or bool(place.index.size and int(place.index.max()) >= length)
    ):
        raise UserError(
            f"group {group.name}",
            Shown(f"{place.index.shape[0]} units up to position {place.index.max(initial=-1)} of axes {place.axes}"),
            allowed=f"{group.size} units within '{place.tensor}' of shape {shape}",
            hint="The groups describe another network, or the same one before a cut.",
        )
    return shape

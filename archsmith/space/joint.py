"""Architecture and quantisation policy as one space: decisions of absent layers are not asked for.

``JointSpace`` multiplies a policy onto any product space. Every layer that may be quantised (a *site*) brings the
condition under which it exists, as a predicate over the architecture's decisions; where it does not, its policy has no
place. So two genotypes that differ only in the policy of absent layers are one architecture, with one digest, one
encoding and one evaluation, and a mutation never spends itself on a dead gene.

Source: SimQ-NAS, arXiv 2312.13301 (there: a mask over the genotype, dead genes set to 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import Any, get_args

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.architecture import Architecture, Canonical
from archsmith.space.conditions import AllOf, AnyOf, Condition, When
from archsmith.space.dimensions import Categorical
from archsmith.space.elements import Element, Given, Group
from archsmith.space.product import ProductSpace
from archsmith.space.quantisation import Granularity, LayerPolicy, LayerPrecision, Scheme
from archsmith.space.values import Value

SIDE = "policy"
"""First path segment of the policy's decisions."""

COMBINATIONS = 500
"""Of the decisions that one layer may hang on."""

Sites = Mapping[str, Condition | None]
"""Layer name → when it exists (None: always), in a fixed order."""

Walked = Callable[[Mapping[str, Value]], Collection[str]]


class JointSpace(ProductSpace):
    """A product space with a quantisation policy beside it.

    Args:
        main: The architecture space.
        sites: Layers that may be quantised; conditions speak of the main space's paths.
        precisions: What a layer chooses from, at least one.
        schemes: Of the weights of int8 layers; a single one is no choice.
        granularities: The same.

    The policy of layer ``x`` has the decisions ``policy/x/precision``, and, where that is int8 and there is a choice,
    ``policy/x/scheme`` and ``policy/x/granularity``.

    Attributes:
        architectures: The main space.
        sites: The sites.
        choices: What "precision", "scheme" and "granularity" may be.
        defaults: The first of each.

    Raises:
        UserError: No site, a layer name with a "/", a taken path, or an unknown word.
    """

    def __init__(
        self,
        main: ProductSpace,
        sites: Sites,
        *,
        precisions: Sequence[LayerPrecision] = ("int8", "fp32"),
        schemes: Sequence[Scheme] = ("symmetric",),
        granularities: Sequence[Granularity] = ("per-channel",),
    ) -> None:
        if not sites or any("/" in name for name in sites):
            raise UserError("sites", list(sites)[:8], allowed="at least one layer name, without '/'")
        if any(path.split("/")[0] == SIDE for path in main.paths):
            raise UserError("main", main.name, allowed=f"a space without paths under {SIDE!r}")
        choices = {"precision": precisions, "scheme": schemes, "granularity": granularities}
        for (name, given), words in zip(choices.items(), (LayerPrecision, Scheme, Granularity), strict=True):
            if not given or set(given) - set(get_args(words)) or len(set(given)) != len(given):
                raise UserError(f"{name} choices", given, allowed=f"distinct words of {list(get_args(words))}")
        self.architectures, self.sites = main, dict(sites)
        self.defaults = {name: given[0] for name, given in choices.items()}
        self.choices: dict[str, tuple[Any, ...]] = {name: tuple(given) for name, given in choices.items()}
        elements: dict[str, Element] = {}
        for site, exists in sites.items():
            elements[f"{site}/precision"] = _given(exists, Categorical(tuple(precisions), group="policy/precision"))
            # A layer that does not exist has no precision, and a condition on what is not decided does not hold.
            quantised = When(f"{SIDE}/{site}/precision", "int8")
            for name in ("scheme", "granularity"):
                if len(self.choices[name]) > 1 and "int8" in precisions:
                    dimension = Categorical(self.choices[name], group=f"policy/{name}")
                    elements[f"{site}/{name}"] = Given(quantised, dimension)
        super().__init__(
            f"{main.name}+{SIDE}",
            {**main.root.elements, SIDE: Group(elements)},
            constraints=main.root.constraints,
            canonical=_canonical(main) if main.canonical is not None else None,
        )

    def main_part(self, architecture: Architecture) -> Architecture:
        """Return the architecture without its policy, as one of the main space."""
        own = {path: value for path, value in architecture.items() if not path.startswith(f"{SIDE}/")}
        return Architecture.of_valid(own, space=self.architectures.name, canonical=self.architectures.canonical)

    def policy(self, architecture: Mapping[str, Value]) -> dict[str, LayerPolicy]:
        """Return the policy of every layer that exists."""
        found: dict[str, LayerPolicy] = {}
        for site in self.sites:
            if (precision := architecture.get(f"{SIDE}/{site}/precision")) is not None:
                others = {
                    name: architecture.get(f"{SIDE}/{site}/{name}", self.defaults[name])
                    for name in ("granularity", "scheme")
                }
                found[site] = LayerPolicy(precision, **others)  # type: ignore[arg-type]
        return found

    def with_policy(self, architecture: Architecture, policy: Mapping[str, LayerPolicy] | LayerPolicy) -> Architecture:
        """Return a main architecture with a policy: one for all layers, or by layer; absent layers are left out.

        Raises:
            UserError: A layer that exists has no policy, or one that is not among the choices.
        """
        decisions: dict[str, Value] = dict(architecture)
        for site in self.active_sites(architecture):
            if not isinstance(policy, LayerPolicy) and site not in policy:
                raise UserError("policy", sorted(policy), allowed=f"one for every layer, {site!r} as well")
            each = policy if isinstance(policy, LayerPolicy) else policy[site]
            decisions[f"{SIDE}/{site}/precision"] = each.precision
            for name in ("scheme", "granularity"):
                if f"{SIDE}/{site}/{name}" in self._slot_of and each.precision == "int8":
                    decisions[f"{SIDE}/{site}/{name}"] = getattr(each, name)
        return self.validate(decisions)

    def from_genotype(self, genes: Mapping[str, Value]) -> Architecture:
        """Return the architecture of a full genotype, in which inactive decisions have a value too: those are dropped.

        Raises:
            UserError: A decision is missing or not an option.
        """
        decisions: dict[str, Value] = {}
        for slot in self.slots:
            if slot.condition is None or slot.condition.holds_for(decisions):
                if slot.path not in genes:
                    raise UserError("genotype", slot.path, allowed="a value for every decision")
                decisions[slot.path] = genes[slot.path]
        return self.validate(decisions)

    def active_sites(self, architecture: Mapping[str, Value]) -> list[str]:
        """Return the layers that exist in an architecture."""
        return [site for site, exists in self.sites.items() if exists is None or exists.holds_for(architecture)]

    def mask(self, architecture: Mapping[str, Value]) -> np.ndarray:
        """Return one bool for each site: whether the layer exists."""
        active = set(self.active_sites(architecture))
        return np.array([site in active for site in self.sites], dtype=bool)

    @property
    def log10_genotypes(self) -> float:
        """Decimal logarithm of the number of genotypes, dead genes counted (``size`` counts architectures)."""
        return math.fsum(math.log10(slot.dimension.size) for slot in self.slots)


def sites_of(
    space: ProductSpace, largest: Architecture, layers: Walked, *, bases: int = 4, checks: int = 20, seed: int = 0
) -> dict[str, Condition | None]:
    """Return the layers of a family's networks with the conditions under which they exist.

    Which decisions a layer hangs on is found by changing each of them alone, in the largest and some random
    architectures; all combinations of those decisions then say when it exists. Random architectures check the result.

    Args:
        space: The architecture space.
        largest: The architecture whose layers come first, in its order.
        layers: Names the layers of an architecture's network; they keep their names in smaller ones.
        bases: Random architectures beside the largest.
        checks: Random architectures to check.
        seed: Of all draws.

    Raises:
        UserError: A layer hangs on too many decisions, or on them in a way that was not seen.
    """
    rng = np.random.default_rng(seed)
    options = {path: list(space.dimension(path).domain) for path in space.paths}  # type: ignore[arg-type]
    known: dict[str, frozenset[str]] = {}
    names: dict[str, None] = {}

    def here(decisions: Mapping[str, Value]) -> tuple[Architecture, frozenset[str]]:
        architecture = space.replay(decisions, np.random.default_rng(seed))
        if architecture.digest not in known:
            found = list(layers(architecture))
            names.update(dict.fromkeys(found))
            known[architecture.digest] = frozenset(found)
        return architecture, known[architecture.digest]

    paths: dict[str, set[str]] = {}
    here(largest)
    for base in (largest, *(space.sample(rng) for _ in range(bases))):
        _, present = here(base)
        for path in options:
            if path in base:
                for option in options[path]:
                    for name in present ^ here({**base, path: option})[1]:
                        paths.setdefault(name, set()).add(path)
    sites = {name: _existence(name, sorted(paths.get(name, ())), options, largest, here) for name in list(names)}
    for _ in range(checks):
        architecture = space.sample(rng)
        told = {name for name, exists in sites.items() if exists is None or exists.holds_for(architecture)}
        if told != (found := here(architecture)[1]):
            raise _unclear(sorted(told ^ found)[:4])
    return sites


def _existence(
    name: str,
    paths: list[str],
    options: Mapping[str, list[Value]],
    largest: Architecture,
    here: Callable[[Mapping[str, Value]], tuple[Architecture, frozenset[str]]],
) -> Condition | None:
    """Return when a layer exists: the combinations of the decisions that it hangs on."""
    if not paths:
        return None
    if math.prod(len(options[path]) for path in paths) > COMBINATIONS:
        raise _unclear([name])
    true: dict[tuple[Value, ...], list[Value]] = {}  # values of the last path, by those of the others
    for values in product(*(options[path] for path in paths)):
        architecture, present = here({**largest, **dict(zip(paths, values, strict=True))})
        if name in present and all(
            architecture.get(path, value) == value for path, value in zip(paths, values, strict=True)
        ):
            true.setdefault(values[:-1], []).append(values[-1])
    conditions: list[Condition] = []
    for others, last in true.items():
        parts = [When(path, (value,)) for path, value in zip(paths, others, strict=False)]
        if len(last) < len(options[paths[-1]]):
            parts.append(When(paths[-1], tuple(last)))
        conditions.append(parts[0] if len(parts) == 1 else AllOf(tuple(parts)))
    return conditions[0] if len(conditions) == 1 else AnyOf(tuple(conditions))


def _unclear(names: list[str]) -> UserError:
    return UserError(
        "layers",
        names,
        allowed=f"layers that exist by a few decisions (at most {COMBINATIONS} combinations) and keep their names",
        hint="Give the conditions by hand.",
    )


def _given(condition: Condition | None, dimension: Categorical) -> Element:
    return dimension if condition is None else Given(condition, dimension)


def _canonical(main: ProductSpace) -> Canonical:
    """Return the canonical form: the network's, and the policy's decisions."""

    def canonical(architecture: Architecture) -> dict[str, Any]:
        own = {path: value for path, value in architecture.items() if not path.startswith(f"{SIDE}/")}
        network = Architecture.of_valid(own, space=main.name, canonical=main.canonical).network_digest
        return {"main": network, SIDE: architecture.under(f"{SIDE}/")}

    return canonical

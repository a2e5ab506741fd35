"""The alternatives of a slot: what may stand in the place of an attention or FFN sub-block.

An alternative does two things. ``apply_`` changes the structure of a layer in place, without caring for values, so that
a saved child can be rebuilt. ``initial`` computes values from the parent's layer. Between them lies nothing else.
"""

# E residual width, H query heads, K key-value heads, D head width, I intermediate width

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.families.slot_initialisers import (
    check_heads,
    kept_groups,
    linear_from_attention,
    linear_from_ffn,
    pool_heads,
    rows_of_heads,
)
from archsmith.families.slot_layout import ATTENTION, FFN, SubBlock, bias_of, module_at, replace_module_, weight_of
from archsmith.families.slot_modules import (
    GroupedAttention,
    KeepInput,
    LinearMixer,
    NoFFN,
    NoMixer,
    NormOnly,
    OwnMixer,
    PassMixer,
    RepeatedHeads,
    empty_linear,
    resized,
)

PARENT = "parent"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Site:
    """One sub-block of one layer.

    Attributes:
        layer: The layer; ``apply_`` changes it, ``initial`` reads the parent's.
        block: Where the sub-block is.
        index: Number of the layer.
        counts_tokens: A stand-in without attention must keep the token count in the key-value cache.
    """

    layer: nn.Module
    block: SubBlock
    index: int
    counts_tokens: bool = False

    @property
    def core(self) -> nn.Module:
        """The module that does the work."""
        found: nn.Module = module_at(self.layer, self.block.core)
        return found

    def role(self, name: str) -> Any:
        """Return the projection of a role.

        Raises:
            UserError: The sub-block has none.
        """
        if name not in self.block.roles:
            raise UserError(
                f"layer{self.index}.{self.block.part}",
                Shown(f"roles {sorted(self.block.roles)}"),
                allowed=f"a sub-block whose '{name}' projection is known",
                hint=f"Name it in SubBlock(roles={{'{name}': 'path', ...}}).",
            )
        return module_at(self.layer, self.block.roles[name])

    def weight(self, name: str) -> Tensor:
        """Return the weight (out, in) of "query", "key", "value", "output", "up", "gate" or "down"."""
        return self._part(name, weight_of)

    def bias(self, name: str) -> Tensor | None:
        """Return its bias, or None."""
        return None if bias_of(self._owner(name)) is None else self._part(name, lambda module: bias_of(module))

    def _owner(self, name: str) -> nn.Module:
        fused = name in ("query", "key", "value") and "qkv" in self.block.roles
        owner: nn.Module = self.role("qkv" if fused else name)
        return owner

    def _part(self, name: str, read: Callable[[nn.Module], Any]) -> Tensor:
        owner = self._owner(name)
        tensor: Tensor = read(owner).detach()
        if name in ("query", "key", "value") and "qkv" in self.block.roles:
            tensor = tensor.chunk(3)[("query", "key", "value").index(name)]
        return tensor

    @property
    def width(self) -> int:
        """Residual width E."""
        return int(self.weight("output" if self.block.part == ATTENTION else "down").shape[0])

    def facts(self) -> dict[str, Any]:
        """Return the arguments that every stand-in for attention takes."""
        return {
            "returns_tuple": self.block.returns_tuple,
            "layer_index": self.index if getattr(self.core, "layer_idx", None) is None else self.core.layer_idx,
            "counts_tokens": self.counts_tokens,
        }

    def like(self) -> Tensor:
        """Return a weight with the device and type of this layer."""
        return next(self.layer.parameters())

    def put_(self, path: str, module: nn.Module) -> None:
        """Replace the module at a path of the layer."""
        replace_module_(self.layer, path, module.train(self.layer.training))


class Alternative(ABC):
    """One way to do the work of a sub-block; see the subclasses.

    Attributes:
        part: The part of a layer it is for.
        name: Its name among the slot's alternatives.
    """

    part: str
    name: str

    def check(self, site: Site) -> None:  # noqa: B027 - most can stand anywhere
        """Refuse a site this alternative cannot stand at.

        Raises:
            UserError: Says why.
        """

    @abstractmethod
    def apply_(self, site: Site) -> None:
        """Give the layer of ``site`` this alternative's structure; new weights need not be set."""

    def initial(self, site: Site, statistics: Mapping[str, Tensor]) -> State:
        """Return values of the changed weights by their names in the layer; others stay what the parent has.

        Args:
            site: The parent's, read only.
            statistics: What ``SlotFamily.collect_statistics`` found for this slot.
        """
        return {}

    def products(self, site: Site) -> tuple[int, int]:
        """Return products of activations for each pair of tokens, and numbers cached for each token.

        What the projections cost is counted from their weights and not part of this.
        """
        return 0, int(site.counts_tokens and site.block.causal)

    def spec(self, site: Site) -> dict[str, Any]:
        """Return as JSON values what rebuilds the structure at this site without knowing the parent."""
        return {"name": self.name}


@dataclass(frozen=True)
class Parent(Alternative):
    """The sub-block as it is."""

    part: str
    name: str = PARENT

    def apply_(self, site: Site) -> None:
        """Change nothing."""

    def products(self, site: Site) -> tuple[int, int]:
        """Return those of full attention; an FFN has none."""
        block = site.block
        if block.part != ATTENTION or not block.heads:
            return 0, 0
        return 2 * block.heads * block.head_dim, 2 * block.kv_heads * block.head_dim * block.causal


@dataclass(frozen=True)
class Removed(Alternative):
    """No-op: the sub-block adds nothing, and its own normalisation goes with it, so that the stream passes unchanged.

    In a post-norm block (BERT) the norm stands behind the sum, ``norm(x + f(x))``; it goes as well, and a layer without
    attention and FFN is the identity here too. ``NormKept`` is the version that keeps it.
    """

    part: str
    name: str = "none"

    def apply_(self, site: Site) -> None:
        """Put nothing where the sub-block was."""
        block = site.block
        if block.closing:
            site.put_(block.core, PassMixer(**site.facts()) if block.part == ATTENTION else nn.Identity())
            site.put_(block.closing, KeepInput())
            return
        nothing = NoMixer(**site.facts()) if block.part == ATTENTION or block.returns_tuple else NoFFN()
        site.put_(block.core, nothing)
        for path in block.norms:
            site.put_(path, nn.Identity())


@dataclass(frozen=True)
class NormKept(Alternative):
    """The norm alone of a post-norm block, ``norm(x)``: the next layer sees the scale it was trained on."""

    part: str
    name: str = "norm"

    def check(self, site: Site) -> None:
        """Refuse pre-norm blocks, where the norm alone has no effect."""
        if not site.block.post_norm:
            raise UserError(
                f"alternatives['{self.part}']", self.name, allowed="'norm' for post-norm blocks only; here use 'none'"
            )

    def apply_(self, site: Site) -> None:
        """Keep the norm and drop the rest."""
        block = site.block
        if block.closing:
            norm = module_at(site.layer, block.norms[0])
            site.put_(block.core, PassMixer(**site.facts()) if block.part == ATTENTION else nn.Identity())
            site.put_(block.closing, NormOnly(norm))
            return
        site.put_(block.core, NoMixer(**site.facts()) if block.part == ATTENTION else NoFFN())


@dataclass(frozen=True)
class Linear(Alternative):
    """One matrix in place of attention (each token attends to itself) or FFN (no activation, no gate)."""

    part: str
    name: str = "linear"

    def check(self, site: Site) -> None:
        """Refuse sub-blocks whose projections are not known."""
        for role in ("value", "output") if self.part == ATTENTION else ("up", "down"):
            site.weight(role)

    def _biased(self, site: Site) -> bool:
        roles = ("value", "output") if self.part == ATTENTION else ("up", "down")
        return any(site.bias(role) is not None for role in roles)

    def apply_(self, site: Site) -> None:
        """Put one linear map; in a block with a closing module it becomes that module's projection."""
        block, width, bias = site.block, site.width, self._biased(site)
        if block.closing:
            outer = block.roles["output" if block.part == ATTENTION else "down"]
            site.put_(outer, empty_linear(width, width, bias=bias, like=site.like()))
            site.put_(block.core, PassMixer(**site.facts()) if block.part == ATTENTION else nn.Identity())
        elif block.part == ATTENTION:
            site.put_(block.core, LinearMixer(width, bias=bias, like=site.like(), **site.facts()))
        else:
            site.put_(block.core, empty_linear(width, width, bias=bias, like=site.like()))

    def initial(self, site: Site, statistics: Mapping[str, Tensor]) -> State:
        """Return the product of the parent's projections."""
        block = site.block
        if block.part == ATTENTION:
            weight, bias = linear_from_attention(
                site.weight("value"),
                site.weight("output"),
                heads=block.heads,
                kv_heads=block.kv_heads,
                b_value=site.bias("value"),
                b_output=site.bias("output"),
            )
        else:
            weight, bias = linear_from_ffn(
                site.weight("up"), site.weight("down"), b_up=site.bias("up"), b_down=site.bias("down")
            )
        if block.closing:
            path = block.roles["output" if block.part == ATTENTION else "down"]
        else:
            path = f"{block.core}.linear" if block.part == ATTENTION else block.core
        return _state(path, weight, bias)


@dataclass(frozen=True)
class Width(Alternative):
    """An FFN with fewer intermediate channels.

    Attributes:
        width: How many stay, absolute, or
        percent: in per cent of the parent's, rounded, at least ``multiple``.
        multiple: The width is rounded to the nearest multiple of this.
        ranking: Which stay: "contribution" (activations times column norms), "iterative" (the finer variant), or "norm"
            (norms of the down projection's columns alone; needs no data).
    """

    name: str
    width: int | None = None
    percent: float = 0.0
    multiple: int = 1
    ranking: str = "contribution"
    part: str = FFN

    def channels(self, site: Site) -> int:
        """Return how many channels stay."""
        whole = int(site.weight("down").shape[1])
        if self.width is not None:
            return self.width
        exact = whole * self.percent / 100
        return min(whole, max(self.multiple, self.multiple * round(exact / self.multiple)))

    def check(self, site: Site) -> None:
        """Refuse more channels than there are."""
        whole = int(site.weight("down").shape[1])
        site.weight("up")
        if not 1 <= self.channels(site) <= whole or (self.width is None and not 0 < self.percent <= 100):
            raise UserError(
                f"alternatives['{self.part}']", self.name, allowed=f"a width from 1 to {whole}, or 'ffn1' to 'ffn100'"
            )

    def apply_(self, site: Site) -> None:
        """Put projections of the smaller size."""
        width = self.channels(site)
        for role, path in site.block.roles.items():
            weight = site.weight(role)
            outputs, inputs = (weight.shape[0], width) if role == "down" else (width, weight.shape[1])
            site.put_(path, resized(site.role(role), outputs, inputs))
        for owner in (site.core, *site.core.modules()):
            if isinstance(getattr(owner, "intermediate_size", None), int):
                owner.intermediate_size = width  # type: ignore[assignment]

    def kept(self, site: Site, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of the channels that stay, ascending.

        Raises:
            UserError: The ranking needs statistics that were not collected.
        """
        width, down = self.channels(site), site.weight("down")
        if width == down.shape[1]:
            return torch.arange(width)
        if self.ranking == "norm":
            scores = down.float().norm(dim=0)
        elif (key := {"contribution": "channels", "iterative": "removal"}[self.ranking]) in statistics:
            scores = statistics[key]
        else:
            raise UserError(
                f"statistics of layer{site.index}.{self.part}",
                Shown(f"none for ranking='{self.ranking}'"),
                allowed="statistics of a calibration pass",
                hint="Call family.collect_statistics(batches) first, or use ranking='norm'.",
            )
        best = torch.argsort(scores.to("cpu"), descending=True, stable=True)[:width]
        return best.sort().values

    def initial(self, site: Site, statistics: Mapping[str, Tensor]) -> State:
        """Return the parent's projections with the channels that stay."""
        kept = self.kept(site, statistics).to(site.like().device)
        state: State = {}
        for role, path in site.block.roles.items():
            weight, bias = site.weight(role), site.bias(role)
            if role == "down":
                weight = weight[:, kept]
            else:
                weight, bias = weight[kept], None if bias is None else bias[kept]
            state |= _state(path, _native(site.role(role), weight), bias)
        return state

    def spec(self, site: Site) -> dict[str, Any]:
        """Return name and absolute width."""
        return {"name": self.name, "width": self.channels(site)}


@dataclass(frozen=True)
class KVHeads(Alternative):
    """Attention with fewer key-value heads.

    Attention that knows groups (Llama, Qwen, Mistral) is told of the smaller number. Multi-head attention without a
    cache (BERT, ViT) gets projections to fewer heads whose outputs are repeated. GPT-2's, where key, query and value
    are one matrix and the cache counts, becomes ``GroupedAttention``.

    Attributes:
        heads: Key-value heads that stay.
        initialiser: "mean" (adjacent heads averaged) or "prune" (the most important heads stay, their group leads a
            larger one, groups that lost their head contribute nothing at first).
    """

    name: str
    heads: int
    initialiser: str = "mean"
    part: str = ATTENTION

    def check(self, site: Site) -> None:
        """Refuse a number that does not divide, and attention whose projections are not known."""
        if not site.block.kv_heads:
            raise UserError(
                f"layer{site.index}.{site.block.part}", Shown("no head count"), allowed="heads= and roles= of SubBlock"
            )
        check_heads(site.block.kv_heads, self.heads)
        site.weight("key")
        keys = site.block.kv_heads * site.block.head_dim
        normed = [name for name, p in site.core.named_parameters() if "norm" in name and p.numel() == keys]
        if normed and self.heads < site.block.kv_heads > 1:
            raise UserError(
                f"layer{site.index}.{self.part}",
                Shown(f"{normed}, a norm over all key heads at once"),
                allowed="attention whose heads are normalised one by one, or not at all",
            )
        if "qkv" in site.block.roles and not hasattr(site.core, "split_size"):
            raise UserError(
                f"layer{site.index}.{self.part}", Shown(type(site.core).__name__), allowed="GPT-2's fused attention"
            )

    def _way(self, site: Site) -> str:
        if "qkv" in site.block.roles:
            return "own"
        return "native" if hasattr(site.core, "num_key_value_groups") else "repeated"

    def apply_(self, site: Site) -> None:
        """Put smaller key and value projections."""
        if self.heads == site.block.kv_heads:
            return
        block, core = site.block, site.core
        way, rows = self._way(site), self.heads * block.head_dim
        if way == "own":
            site.put_(block.core, self._own(site))
            return
        for role in ("key", "value"):
            smaller = resized(site.role(role), rows, site.weight(role).shape[1])
            if way == "repeated":
                assert isinstance(smaller, nn.Linear)
                smaller = RepeatedHeads(smaller, block.kv_heads, self.heads)
            site.put_(block.roles[role], smaller)
        if way == "native":
            settings: Any = core
            settings.num_key_value_groups = block.heads // self.heads
            for name in ("num_key_value_heads", "num_kv_heads"):
                if isinstance(getattr(core, name, None), int):
                    setattr(core, name, self.heads)

    def _own(self, site: Site) -> GroupedAttention:
        block, core = site.block, site.core

        def rate(name: str) -> float:
            return float(getattr(getattr(core, name, None), "p", 0.0))

        return GroupedAttention(
            site.width,
            heads=block.heads,
            kv_heads=self.heads,
            head_dim=block.head_dim,
            bias=site.bias("query") is not None,
            scaling=float(getattr(core, "scaling", block.head_dim**-0.5)),
            causal=block.causal,
            dropout=rate("attn_dropout"),
            output_dropout=rate("resid_dropout"),
            like=site.like(),
            **{**site.facts(), "counts_tokens": False},  # its own keys say how many tokens there are
        )

    def initial(self, site: Site, statistics: Mapping[str, Tensor]) -> State:
        """Return averaged, or pruned and reordered, projections."""
        block = site.block
        if self.heads == block.kv_heads:
            return {}
        tensors = {role: (site.weight(role), site.bias(role)) for role in ("query", "key", "value", "output")}
        if self.initialiser == "mean":
            for role in ("key", "value"):
                tensors[role] = tuple(  # type: ignore[assignment]
                    None if tensor is None else pool_heads(tensor, block.kv_heads, self.heads)
                    for tensor in tensors[role]
                )
        else:
            tensors = self._pruned(site, tensors, statistics)
        own = self._way(site) == "own"
        state: State = {}
        for role, (weight, bias) in tensors.items():
            if own:
                state |= _state(f"{block.core}.{role[0]}_proj", weight, bias)
            else:
                inner = ".projection" if role in ("key", "value") and self._way(site) == "repeated" else ""
                state |= _state(block.roles[role] + inner, weight, bias)
        return state

    def _pruned(
        self,
        site: Site,
        tensors: dict[str, tuple[Tensor, Tensor | None]],
        statistics: Mapping[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        block = site.block
        if "kv_heads" not in statistics:
            raise UserError(
                f"statistics of layer{site.index}.{self.part}",
                Shown("none for kv_initialiser='prune'"),
                allowed="statistics of a calibration pass",
                hint="Call family.collect_statistics(batches) first, or use kv_initialiser='mean'.",
            )
        kept, order = kept_groups(statistics["kv_heads"], self.heads)
        device = site.like().device
        rows = rows_of_heads(kept, block.head_dim).to(device)
        group = block.heads // block.kv_heads * block.head_dim
        columns = rows_of_heads(order, group).to(device)
        alive = torch.tensor([head in kept for head in order], device=device).repeat_interleave(group)

        def taken(role: str, index: Tensor) -> tuple[Tensor, Tensor | None]:
            weight, bias = tensors[role]
            return weight[index], None if bias is None else bias[index]

        weight, bias = tensors["output"]
        return {
            "query": taken("query", columns),
            "key": taken("key", rows),
            "value": taken("value", rows),
            "output": (weight[:, columns] * alive, bias),
        }

    def products(self, site: Site) -> tuple[int, int]:
        """Return those of attention with the smaller cache; repeated heads would be cached in full."""
        block = site.block
        cached = block.kv_heads if self._way(site) == "repeated" else self.heads
        return 2 * block.heads * block.head_dim, 2 * cached * block.head_dim * block.causal

    def spec(self, site: Site) -> dict[str, Any]:
        """Return name and number of heads."""
        return {"name": self.name, "kv_heads": self.heads}


@dataclass(frozen=True)
class Own(Alternative):
    """An alternative of the user's: a module that maps the normalised stream (B, T, E) to what is added to it.

    Attributes:
        part: The part it is for.
        name: Its name.
        make: Called with the ``Site``; returns the module with its weights set (``site.width`` is E, ``site.weight``
            gives the parent's projections). Called again when a saved child is loaded.
        pair_macs: Multiply-accumulates for each pair of tokens (what attention-like modules do); its linear layers are
            counted by themselves.
        kv_values: Numbers it caches for each token.
    """

    part: str
    name: str
    make: Callable[[Site], nn.Module]
    pair_macs: int = 0
    kv_values: int = 0

    def apply_(self, site: Site) -> None:
        """Put the user's module."""
        block, like = site.block, site.like()
        module = self.make(site).to(device=like.device, dtype=like.dtype)
        if block.closing:
            site.put_(block.roles["output" if block.part == ATTENTION else "down"], nn.Identity())
        attention = block.part == ATTENTION or block.returns_tuple
        site.put_(block.core, OwnMixer(module, **site.facts()) if attention else module)

    def products(self, site: Site) -> tuple[int, int]:
        """Return what the user declared."""
        return self.pair_macs, self.kv_values + super().products(site)[1]


def _state(path: str, weight: Tensor, bias: Tensor | None) -> State:
    return {f"{path}.weight": weight} | ({} if bias is None else {f"{path}.bias": bias})


def _native(projection: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight (out, in) in the projection's own layout."""
    return weight if isinstance(projection, nn.Linear) else weight.T


_NUMBERED = re.compile(r"(kv|ffn|width)(\d+(?:\.\d+)?)")


def named_alternative(
    part: str,
    name: str,
    *,
    kv_initialiser: str = "mean",
    ranking: str = "contribution",
    multiple: int = 1,
    registered: Sequence[Alternative] = (),
) -> Alternative:
    """Return the alternative of a name: "parent", "none", "norm", "linear", "kv4", "ffn50" (per cent), "width3072".

    Raises:
        UserError: No such name for this part.
    """
    for own in registered:
        if (own.part, own.name) == (part, name):
            return own
    simple: dict[str, Callable[[str], Alternative]] = {PARENT: Parent, "none": Removed, "norm": NormKept}
    if part in (ATTENTION, FFN):
        simple["linear"] = Linear
    if name in simple:
        return simple[name](part)
    if (part, name) == (ATTENTION, "lla"):
        from archsmith.families.slot_rules import local_linear

        return local_linear()
    if (match := _NUMBERED.fullmatch(name)) is not None:
        kind, number = match[1], float(match[2])
        if part == ATTENTION and kind == "kv" and number == int(number):
            return KVHeads(name, int(number), kv_initialiser)
        if part == FFN and kind == "ffn":
            return Width(name, percent=number, multiple=multiple, ranking=ranking)
        if part == FFN and kind == "width" and number == int(number):
            return Width(name, width=int(number), ranking=ranking)
    more = {ATTENTION: ["kv4 (any number of heads)", "lla"], FFN: ["ffn50 (any per cent)", "width3072 (any width)"]}
    known = [*simple, *more.get(part, []), *(own.name for own in registered if own.part == part)]
    raise UserError(
        f"alternatives['{part}']", name, allowed=", ".join(known), hint="Register your own: registered=[Own(...)]."
    )

"""What subnets have in common is computed once: the outputs of blocks behind equal beginnings.

Two subnets that agree on everything up to a block give the same output there for the same batch. While a ``Beginnings``
watches, every block asks whether such an output is kept. What a block's output depends on is the sequence of modules
that ran before it and the sizes in them, so keys are chains of sizes and no numbers are compared.

For evaluation only: no gradients, no dropout, and running statistics that stay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from archsmith.supernet.elastic_slices import Slices


class Beginnings:
    """Keeps outputs of blocks by the sizes of everything that ran before them.

    Blocks are the children of containers that have parameters, the innermost containers first. A kept output that later
    code changed in place is not used. The length of a container is not part of a key: ``Elastic`` offers no depth where
    other parts of the network compute with it.

    Args:
        slices: Of the network.
        limit_bytes: What is kept at most; the least recently used goes first.

    Attributes:
        hits: Blocks that were not run.
        misses: Blocks that were.
    """

    def __init__(self, slices: Slices, *, limit_bytes: int = 1 << 29) -> None:
        self.slices, self.limit = slices, limit_bytes
        self.hits = self.misses = 0
        model = slices.model
        blocks = _blocks(model)
        genes = slices.genes_by_module()
        self._outer: tuple[str, ...] = ()
        self._inside: dict[str, tuple[str, ...]] = dict.fromkeys(blocks, ())
        for path, own in genes.items():
            block = next((b for b in blocks if path == b or path.startswith(f"{b}.")), None)
            if block is not None:
                self._inside[block] = tuple(dict.fromkeys((*self._inside[block], *own)))
            elif path and not list(model.get_submodule(path).children()):
                self._inside[path] = own
            else:
                self._outer = tuple(dict.fromkeys((*self._outer, *own)))
        self._blocks = frozenset(blocks)
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._kept: OrderedDict[int, tuple[Any, tuple[int, ...], int]] = OrderedDict()
        self._bytes = 0
        self._chain = 0

    def key(self, choices: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return a key by which subnets with long common beginnings are neighbours."""
        inside = (choices[gene] for genes in self._inside.values() for gene in genes)
        return (*(choices[gene] for gene in self._outer), *inside)

    def begin(self, batch: object) -> None:
        """Say that the next call is on a batch, with what was chosen last.

        Args:
            batch: Anything hashable that differs between different inputs.
        """
        assert self.slices.choices is not None
        self._chain = self._next((batch, tuple(self.slices.choices[gene] for gene in self._outer)))

    def forget(self) -> None:
        """Let go of everything: the batch or the weights change."""
        self._kept.clear()
        self._numbers.clear()
        self._bytes = 0

    @contextmanager
    def watching(self) -> Iterator[Beginnings]:
        """Let the blocks ask, within the block of code."""
        model = self.slices.model
        modules = [(path, model.get_submodule(path)) for path in self._inside]
        try:
            for path, module in modules:
                module.__dict__["forward"] = self._asking(path, module.forward)
            yield self
        finally:
            for _, module in modules:
                module.__dict__.pop("forward", None)
            self.forget()

    def _asking(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        genes, is_block = self._inside[path], path in self._blocks

        def asked(*args: Any, **kwargs: Any) -> Any:
            choices = self.slices.choices
            assert choices is not None
            chain = self._chain = self._next((self._chain, path, tuple(choices[gene] for gene in genes)))
            if not is_block:
                return forward(*args, **kwargs)
            found = self._kept.get(chain)
            if found is not None:
                if found[1] == _versions(found[0]):
                    self._kept.move_to_end(chain)
                    self.hits += 1
                    return found[0]
                self._drop(chain)
            self.misses += 1
            result = forward(*args, **kwargs)
            size = sum(t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor))
            self._kept[chain] = (result, _versions(result), size)
            self._bytes += size
            while self._bytes > self.limit and self._kept:
                self._drop(next(iter(self._kept)))
            self._chain = chain
            return result

        return asked

    def _drop(self, chain: int) -> None:
        self._bytes -= self._kept.pop(chain)[2]

    def _next(self, link: tuple[Any, ...]) -> int:
        return self._numbers.setdefault(link, len(self._numbers) + 1)


def _versions(result: Any) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _blocks(model: nn.Module) -> list[str]:
    """Return the children of containers that are no containers and lie in no other block; each module once."""
    found: list[str] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        for name, child in module.named_children():
            full = f"{path}.{name}" if path else name
            inner = isinstance(child, nn.Sequential | nn.ModuleList)
            inside = any(full.startswith(f"{other}.") for other in found)
            if inner or inside or id(child) in seen or type(child).__dict__.get("forward") is None:
                continue
            if any(True for _ in child.parameters()) and any(True for _ in child.children()):
                seen.add(id(child))
                found.append(full)
    return found


def comparable(first: Tensor, second: Tensor) -> bool:
    """Whether two results of one computation agree to rounding."""
    return first.shape == second.shape and bool(torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True))

"""Exact costs of many subnets from few counts: what one module costs depends on a few sizes.

The operations of a module are sums of products of sizes, and every size follows the choices. So shrinking one dimension
of the whole network shows which modules it concerns, and a module's cost is known for all subnets that agree on its
dimensions. Each missing number comes from a real count of the subnet at hand, which gives those of all its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Counted = dict[int, tuple[int, int]]
"""MACs and parameters of the modules that are there, by the identity of the module."""


class CostTable:
    """MACs and parameters of subnets, exact.

    Args:
        count: Counts a subnet; takes a size for every dimension.
        choices: Options of every dimension, the whole last.
    """

    def __init__(self, count: Callable[[Mapping[str, int]], Counted], choices: Mapping[str, tuple[int, ...]]) -> None:
        self._count = count
        self.counts = 1
        largest = {name: options[-1] for name, options in choices.items()}
        whole = count(largest)
        self._dims: dict[int, tuple[str, ...]] = dict.fromkeys(whole, ())
        for name, options in choices.items():
            if len(options) > 1:
                self.counts += 1
                other = count({**largest, name: options[0]})
                for module, costs in whole.items():
                    if other.get(module, (0, 0)) != costs:
                        self._dims[module] = (*self._dims[module], name)
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}

    def of(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return ``macs`` and ``params``.

        Args:
            sizes: Of every dimension; those that take no part are whole.
        """
        keys = [(module, tuple(sizes[name] for name in names)) for module, names in self._dims.items()]
        found = [self._known.get(key) for key in keys]
        if None in found:
            self.counts += 1
            counted = self._count(sizes)
            for key in keys:
                self._known[key] = counted.get(key[0], (0, 0))
            found = [self._known[key] for key in keys]
        macs, params = 0, 0
        for costs in found:
            assert costs is not None
            macs, params = macs + costs[0], params + costs[1]
        return {"macs": macs, "params": params}

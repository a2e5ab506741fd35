"""Zero-cost scores: how good a network may become, judged at its initialisation from one batch or none.

Every score is a pure function ``score(network, batch, generator) -> float``: the network, its statistics, its mode and
its gradients are the same afterwards, and torch's global random state is not used. ``SCORES`` lists them by name.

- Size: ``params``, ``macs``
- Saliency (``saliency.py``): ``synflow``, ``logsynflow``, ``snip``, ``grasp``, ``fisher``, ``grad_norm``
- Activation regions (``regions.py``): ``naswot``, ``nregions``, ``region_count``
- Sensitivity to the input (``sensitivity.py``): ``jacov``, ``zen``
- Kernel (``kernel.py``): ``ntk_condition``
"""

from archsmith.evaluate.zero_cost.base import SCORES, Batch, Needs, Score
from archsmith.evaluate.zero_cost.evaluator import BuildingFamily, ZeroCostEvaluator
from archsmith.evaluate.zero_cost.kernel import ntk_condition
from archsmith.evaluate.zero_cost.regions import naswot, nregions, region_count
from archsmith.evaluate.zero_cost.saliency import fisher, grad_norm, grasp, logsynflow, snip, synflow
from archsmith.evaluate.zero_cost.sensitivity import jacov, zen
from archsmith.evaluate.zero_cost.size import macs, params

__all__ = [
    "SCORES",
    "Batch",
    "BuildingFamily",
    "Needs",
    "Score",
    "ZeroCostEvaluator",
    "fisher",
    "grad_norm",
    "grasp",
    "jacov",
    "logsynflow",
    "macs",
    "naswot",
    "nregions",
    "ntk_condition",
    "params",
    "region_count",
    "snip",
    "synflow",
    "zen",
]

"""Zero-cost scores: how good a network may become, judged at its initialisation from one batch or none.

Every score is a pure function ``score(network, batch, generator) -> float``: the network, its statistics, its mode and
its gradients are the same afterwards, and torch's global random state is not used. ``SCORES`` lists them by name.

- Size: ``params``, ``macs``
- Saliency (``saliency.py``): ``synflow``, ``logsynflow``, ``snip``, ``grasp``, ``fisher``, ``grad_norm``
- Activation regions (``regions.py``): ``naswot``, ``nregions``, ``region_count``
- Sensitivity to the input (``sensitivity.py``): ``jacov``, ``zen``
- Kernel (``kernel.py``): ``ntk_condition``

``TEXT_SCORES`` lists those of recurrent networks (``hidden.py``: ``hidden_covariance`` and others) and of text encoders
(``encoder.py``: ``head_confidence`` and others).
"""

from archsmith.evaluate.zero_cost.base import SCORES, TEXT_SCORES, Batch, Needs, Score
from archsmith.evaluate.zero_cost.correlation import Spectrum, cosine, spectral, spectrum
from archsmith.evaluate.zero_cost.encoder import head_confidence
from archsmith.evaluate.zero_cost.evaluator import BuildingFamily, ZeroCostEvaluator
from archsmith.evaluate.zero_cost.hidden import hidden_covariance, hidden_spectrum, hidden_states
from archsmith.evaluate.zero_cost.kernel import ntk_condition
from archsmith.evaluate.zero_cost.regions import naswot, nregions, region_count
from archsmith.evaluate.zero_cost.saliency import fisher, grad_norm, grasp, logsynflow, snip, synflow
from archsmith.evaluate.zero_cost.sensitivity import jacov, zen
from archsmith.evaluate.zero_cost.size import macs, params

__all__ = [
    "SCORES",
    "TEXT_SCORES",
    "Batch",
    "BuildingFamily",
    "Needs",
    "Score",
    "Spectrum",
    "ZeroCostEvaluator",
    "cosine",
    "fisher",
    "grad_norm",
    "grasp",
    "head_confidence",
    "hidden_covariance",
    "hidden_spectrum",
    "hidden_states",
    "jacov",
    "logsynflow",
    "macs",
    "naswot",
    "nregions",
    "ntk_condition",
    "params",
    "region_count",
    "snip",
    "spectral",
    "spectrum",
    "synflow",
    "zen",
]

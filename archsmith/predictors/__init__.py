"""Predictors: from features of an architecture to a mean and an uncertainty. The contract is ``Predictor``.

``Ridge`` and ``SupportVectors`` for small samples, ``Tuned`` for the better of both, ``GaussianProcess`` where the
uncertainty matters, ``RandomForest`` and ``Boosting`` for unscaled or useless features, ``Mlp`` and ``GraphNetwork``
for many samples, ``Ensemble`` of any.
``archsmith.testing.predictors`` checks the contract. Importing this needs numpy only.
"""

from archsmith.predictors.base import Prediction, Predictor
from archsmith.predictors.ensemble import Ensemble
from archsmith.predictors.gaussian_process import GaussianProcess
from archsmith.predictors.graph_network import GraphNetwork, graph_features
from archsmith.predictors.linear import Ridge, SupportVectors
from archsmith.predictors.networks import Mlp
from archsmith.predictors.trees import Boosting, RandomForest
from archsmith.predictors.tuned import Tuned

__all__ = [
    "Boosting",
    "Ensemble",
    "GaussianProcess",
    "GraphNetwork",
    "Mlp",
    "Prediction",
    "Predictor",
    "RandomForest",
    "Ridge",
    "SupportVectors",
    "Tuned",
    "graph_features",
]

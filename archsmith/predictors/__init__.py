"""Predictors: from features of an architecture to a mean and an uncertainty. The contract is ``Predictor``."""

from archsmith.predictors.base import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]

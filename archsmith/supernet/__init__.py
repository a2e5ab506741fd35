"""Supernets: networks that hold every alternative of a space, and share weights between its architectures."""

from archsmith.supernet.base import Supernet
from archsmith.supernet.max_w import MaxW
from archsmith.supernet.mixed import GumbelSoftmax, MixedOp, Relaxation, Sigmoid, Softmax, StraightThrough
from archsmith.supernet.relaxed import RelaxedSupernet, batch_statistics
from archsmith.supernet.single_path import SinglePathSupernet, Switch

__all__ = [
    "GumbelSoftmax",
    "MaxW",
    "MixedOp",
    "Relaxation",
    "RelaxedSupernet",
    "Sigmoid",
    "SinglePathSupernet",
    "Softmax",
    "StraightThrough",
    "Supernet",
    "Switch",
    "batch_statistics",
]

"""Supernets: networks that hold every alternative of a space, and share weights between its architectures."""

from archsmith.supernet.base import Supernet
from archsmith.supernet.gates import BinaryGates
from archsmith.supernet.max_w import MaxW
from archsmith.supernet.mixed import GumbelSoftmax, MixedOp, Relaxation, Sigmoid, Softmax
from archsmith.supernet.relaxed import RelaxedSupernet, batch_statistics
from archsmith.supernet.single_path import SinglePathSupernet, Switch
from archsmith.supernet.straight_through import StraightThrough

__all__ = [
    "BinaryGates",
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

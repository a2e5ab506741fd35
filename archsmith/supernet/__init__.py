"""Supernets: networks that hold every alternative of a space, and share weights between its architectures."""

from archsmith.supernet.base import Supernet
from archsmith.supernet.single_path import SinglePathSupernet, Switch

__all__ = ["SinglePathSupernet", "Supernet", "Switch"]

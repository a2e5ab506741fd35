"""Families: how points of a space become networks. One file for each searchable family.

A file that offers families has a literal ``FAMILIES = (dict(name=..., title=..., task=...), ...)`` that can be read
without importing it, and an ``open_family(name, **settings)``.
"""

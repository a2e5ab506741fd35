"""Atoms: the smallest units that can be cut out of a network, and the surgery that cuts them.

An atom is a set of tensor slices that live and die together, with a scale (its gate), a score and a cost. ``groups``
says what the units are, ``score`` which of them are dead or must go for a budget, ``penalty`` pushes them towards zero,
``surgery`` removes them from the model, the optimiser and every other table at once.
"""

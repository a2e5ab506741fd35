"""Building blocks: plain ``nn.Module`` classes that import torch and each other, nothing else.

Their sources are inlined into the ``model.py`` of a finished result. So they use literal constructor arguments, no
closures, and read their present structure back from the shapes of their weights (``constructor()``).
"""

"""Ground floor: atomic files, the journal, named random streams, errors, and the Protocols that upper rooms implement.

Nothing here imports torch.
"""

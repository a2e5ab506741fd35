"""What ``torchrun`` says about the processes of one run, read from the environment; no torch is needed to ask."""

from __future__ import annotations

import os


def launched() -> bool:
    """Return whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def process_rank() -> int:
    """Return the number of this process among those that ``torchrun`` started, from 0; 0 for any other process."""
    return int(os.environ["RANK"]) if launched() else 0


def process_count() -> int:
    """Return how many processes ``torchrun`` started on all machines together; 1 for any other process."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_process_count() -> int:
    """Return how many of them run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def local_process_rank() -> int:
    """Return the number of this process among those on this machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0

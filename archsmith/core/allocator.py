"""The allocator switch: keep large activations in the heap instead of mapping and faulting them anew at every step.

glibc serves an allocation above ``M_MMAP_THRESHOLD`` (32 MiB at most by default) with a fresh ``mmap`` and gives it
back to the kernel when it is freed. A training step on the CPU that holds activations of that size therefore pays a
page fault for every 4 KiB of every activation, at every step. With both thresholds raised the memory stays with the
process and is reused. Only where bytes live changes, never what they hold.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1  # numbers of <malloc.h>
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1


def raise_malloc_thresholds() -> bool:
    """Let glibc keep and reuse memory blocks of up to 2 GiB; a switch of the whole process, for its whole life.

    The price: freed memory is not handed back to the system before the process ends, so other programs see its peak.
    Call it once, before the first large allocation, from a program's entry point; a library has no business calling it.

    Returns:
        True when the C library accepted both thresholds. False, with nothing changed, where there is no ``mallopt``
        (macOS, Windows, musl) or the C library refuses a threshold this large (some older glibc versions).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))

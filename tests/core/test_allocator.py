import ctypes
import platform
import subprocess
import sys

import pytest

from archsmith.core import allocator

FAULTS = """
import mmap, resource, sys
from archsmith.core.allocator import raise_malloc_thresholds
if sys.argv[1] == "raised":
    assert raise_malloc_thresholds()
SIZE = 37_000_000
def faults(repeats):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        b"x" * SIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(faults(4) / (4 * SIZE / mmap.PAGESIZE))
"""


def share_of_pages_faulted(mode: str) -> float:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a switch of glibc")
def test_large_blocks_are_reused_instead_of_faulted_anew() -> None:
    assert share_of_pages_faulted("default") > 0.5
    assert share_of_pages_faulted("raised") < 0.05


def test_elsewhere_it_does_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator.raise_malloc_thresholds() is False


@pytest.mark.parametrize(("accepted", "calls"), [(1, 2), (0, 1)])
def test_the_answer_of_the_c_library_is_reported(monkeypatch: pytest.MonkeyPatch, accepted: int, calls: int) -> None:
    made: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            made.append((option, value))
            return accepted

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert allocator.raise_malloc_thresholds() is bool(accepted)
    assert made == [(-3, 2**31 - 1), (-1, 2**31 - 1)][:calls]

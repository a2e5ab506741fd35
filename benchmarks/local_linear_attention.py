"""Memory of local linear attention, blockwise against naive: bytes saved for backward and peak resident size.

Each form runs forward and backward in a fresh process. Run: ``python benchmarks/local_linear_attention.py``
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

from archsmith.layers.local_linear_attention import local_linear_attention


def one(form: str, length: int, heads: int, channels: int, ridge: float) -> None:
    """Run one form and print a table row; form "none" is the process without any attention."""
    torch.set_num_threads(1)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, channels, generator=generator, requires_grad=True) for _ in range(3))
    start = time.perf_counter()
    if form != "none":
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            output = local_linear_attention(q, k, v, ridge=ridge, blockwise=form == "blockwise")
        output.sum().backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {form} | {sum(saved.values()) / 2**20:.1f} MiB | {peak:.0f} MiB | {seconds:.1f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("all", "none", "blockwise", "naive"), default="all")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--ridge", type=float, default=10.0)
    given = parser.parse_args()
    if given.form != "all":
        one(given.form, given.length, given.heads, given.channels, given.ridge)
        return
    print("| form | saved for backward | peak resident size | forward and backward |\n|---|---|---|---|", flush=True)
    for form in ("none", "blockwise", "naive"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--form", form], check=True)


if __name__ == "__main__":
    main()

"""Elastic kernels: the centre of a larger one, as it is or through a learned matrix.

Without a transform a 3 x 3 kernel is the centre of the 5 x 5 one (BigNAS, arXiv 2003.11142). With one, each step from a
size to the next smaller multiplies the flattened centre by a matrix of its own, the same for all channels, that starts
as the identity (Once for all: Cai et al., arXiv 1908.09791); the extracted network holds the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.supernet.elastic_slices import MappedTensor, Part, SlicedAttribute, SlicedAxis


def has_elastic_kernel(module: nn.Module) -> bool:
    """Whether the kernel of a module can shrink to its centre: a convolution with an odd kernel, equal on all axes."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    size = module.kernel_size
    return len(set(size)) == 1 and size[0] % 2 == 1 and size[0] > 1


def smallest_kernel(module: nn.modules.conv._ConvNd) -> int:
    """Return the smallest kernel for which the padding that keeps the output's size is not negative."""
    size = module.kernel_size[0]
    if isinstance(module.padding, str):
        return 1
    step = min(int(p) // int(d) for p, d in zip(module.padding, module.dilation, strict=True))
    return max(size - 2 * step, 1)


class KernelTransform(nn.Module):
    """Kernels of smaller sizes from the largest.

    Args:
        sizes: Kernel sizes, ascending.
        spatial: Number of spatial axes.
        learned: Whether there are matrices; without them a kernel is cropped.
        like: Gives type and device of the matrices.
    """

    def __init__(self, sizes: Sequence[int], spatial: int, *, learned: bool, like: Tensor) -> None:
        super().__init__()
        self.sizes, self.spatial = tuple(sizes), spatial
        steps = self.sizes[:-1] if learned else ()
        self.matrices = nn.ParameterList(
            [nn.Parameter(torch.eye(size**spatial, dtype=like.dtype, device=like.device)) for size in steps]
        )

    def forward(self, weight: Tensor, size: int) -> Tensor:
        """Return the kernels of ``size`` from those of the largest size, (out, in, *spatial)."""
        if not len(self.matrices):
            return cropped(weight, size)
        for number in reversed(range(len(self.sizes) - 1)):
            if self.sizes[number] < size:
                break
            small = cropped(weight, self.sizes[number])
            weight = nn.functional.linear(small.flatten(2), self.matrices[number]).view_as(small)
        return weight

    def shrinks(self, size: int) -> bool:
        """Whether ``size`` is not the largest."""
        return size != self.sizes[-1]


def cropped(weight: Tensor, size: int) -> Tensor:
    """Return the centre of kernels, a view."""
    for axis in range(2, weight.dim()):
        weight = weight.narrow(axis, (weight.shape[axis] - size) // 2, size)
    return weight


def kernel_parts(path: str, module: nn.modules.conv._ConvNd, gene: str, transform: KernelTransform) -> list[Part]:
    """Return the parts of one convolution with an elastic kernel.

    Args:
        path: Its qualified name.
        module: The convolution, whole.
        gene: Name of the gene that gives the size.
        transform: Of its kernels.
    """
    parts: list[Part] = []
    name = f"{path}.weight" if path else "weight"
    if len(transform.matrices):
        parts.append(MappedTensor(name, (gene,), transform.forward, transform.shrinks))
    else:
        whole = module.kernel_size[0]
        parts += [
            SlicedAxis(name, axis, (gene,), lambda k: slice((whole - k) // 2, (whole - k) // 2 + k))
            for axis in range(2, module.weight.dim())
        ]
    for leaf in kernel_attributes(module, module.kernel_size[0]):
        parts.append(SlicedAttribute(f"{path}.{leaf}" if path else leaf, (gene,), _Attribute(module, leaf)))
    return parts


class _Attribute:
    """The value of one attribute by kernel size; remembers the whole convolution's."""

    def __init__(self, module: nn.modules.conv._ConvNd, leaf: str) -> None:
        sizes = range(smallest_kernel(module), module.kernel_size[0] + 1, 2)
        self.values = {size: kernel_attributes(module, size)[leaf] for size in sizes}

    def __call__(self, size: int) -> Any:
        return self.values[size]


def kernel_attributes(module: nn.modules.conv._ConvNd, size: int) -> dict[str, Any]:
    """Return the attributes of a convolution whose kernel shrinks to ``size``: the output keeps its size."""
    found: dict[str, Any] = {"kernel_size": (size,) * len(module.kernel_size)}
    less = (module.kernel_size[0] - size) // 2
    if isinstance(module.padding, str):
        padded = (
            [d * (size - 1) // 2 for d in module.dilation] if module.padding == "same" else [0] * len(module.dilation)
        )
    else:
        padded = [int(p) - less * int(d) for p, d in zip(module.padding, module.dilation, strict=True)]
        found["padding"] = tuple(padded)
    found["_reversed_padding_repeated_twice"] = [p for p in reversed(padded) for _ in range(2)]
    return found


@torch.no_grad()
def shrink_kernel_(module: nn.modules.conv._ConvNd, size: int, transform: KernelTransform) -> None:
    """Give a convolution the kernels of ``size``, in memory of their own."""
    attributes = kernel_attributes(module, size)
    small = transform.forward(module.weight.detach(), size)
    module.weight = nn.Parameter(small.clone(), requires_grad=module.weight.requires_grad)
    for name, value in attributes.items():
        setattr(module, name, value)

"""Which linear region of the network each image falls into: the pattern of active ReLUs is the region's name."""

# B batch, U units (ReLU outputs of one layer)

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.zero_cost.base import Batch, NormMode, fixed, watching, zero_cost_score

_EXACT_FLOAT32 = 2**24


@zero_cost_score(needs="images", arxiv="2006.04647")
def naswot(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``log |det K|``, K[i, j] the number of ReLUs that agree on images i and j; batch statistics.

    Minus infinity when two images have one pattern, as when the output does not depend on the input. Counted are
    ``nn.ReLU`` modules.

    Source: Mellor et al. 2021, arXiv 2006.04647.

    Raises:
        UserError: The network has no ``nn.ReLU``.
    """
    return _log_determinant(agreement_kernel(network, batch.images, norm="batch"))


@zero_cost_score(needs="images", arxiv="2207.05135")
def nregions(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return ``log |det K|`` as ``naswot``, with the running statistics of the new network: a soft count of regions.

    A reconstruction. The cached per-architecture values that go by this name come with no definition; they are no
    counts (they are not whole numbers) and fall together with ``naswot`` on networks whose output is constant. Of what
    was tried, this agrees best with their ranking; ``region_count`` is the plain count.

    Source of the cached values: Cavagnero et al. 2022 (FreeREA), arXiv 2207.05135.

    Raises:
        UserError: The network has no ``nn.ReLU``.
    """
    return _log_determinant(agreement_kernel(network, batch.images, norm="running"))


@zero_cost_score(needs="images", arxiv="2102.11535")
def region_count(network: nn.Module, batch: Batch, generator: torch.Generator) -> float:
    """Return the number of different ReLU patterns in the batch, at most B; batch statistics.

    It says something only where images share regions: few ReLUs, small images, large batches. At the width and
    resolution of a benchmark every image of a batch has a region of its own.

    Source: Chen et al. 2021 (TE-NAS), arXiv 2102.11535.

    Raises:
        UserError: The network has no ``nn.ReLU``.
    """
    digests = [hashlib.blake2b(digest_size=16) for _ in range(len(batch.images))]

    def see(_: Tensor, output: Tensor) -> None:
        for digest, row in zip(digests, (output > 0).flatten(1).cpu().numpy(), strict=True):
            digest.update(row.tobytes())

    with fixed(network, norm="batch") as view, watching(network, nn.ReLU, see) as count, torch.no_grad():
        _insist_on_relus(network, count)
        view(batch.images)
    return float(len({digest.digest() for digest in digests}))


def agreement_kernel(network: nn.Module, images: Tensor, *, norm: NormMode) -> Tensor:
    """Return for each pair of images how many ReLUs of the network are active in both or in neither, (B, B) float64.

    Args:
        network: Network with ``nn.ReLU`` modules.
        images: (B, C, H, W).
        norm: What batch normalisations do, see ``archsmith.evaluate.zero_cost.base.fixed``.

    Raises:
        UserError: The network has no ``nn.ReLU``.
    """
    kernel = torch.zeros(len(images), len(images), dtype=torch.float64)

    def see(_: Tensor, output: Tensor) -> None:
        units = output[0].numel()
        sign_BU = torch.where(output.flatten(1) > 0, 1.0, -1.0)
        if units >= _EXACT_FLOAT32:
            sign_BU = sign_BU.double()
        # +1 where two images agree, -1 where not: (units + s s') / 2 counts the agreements
        kernel.add_((units + (sign_BU @ sign_BU.T).double().cpu()) / 2)

    with fixed(network, norm=norm) as view, watching(network, nn.ReLU, see) as count, torch.no_grad():
        _insist_on_relus(network, count)
        view(images)
    return kernel


def _log_determinant(kernel: Tensor) -> float:
    return float(torch.linalg.slogdet(kernel).logabsdet)


def _insist_on_relus(network: nn.Module, count: int) -> None:
    if count == 0:
        raise UserError(
            "network",
            Shown(f"a {type(network).__name__} without nn.ReLU"),
            allowed="a network with nn.ReLU modules, whose patterns name the linear regions",
        )

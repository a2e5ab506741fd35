"""One training step of the supernet against a straightforward implementation of the same mathematics.

Baseline: three ``nn.Sequential`` branches for each block, torch's default memory layout, the penalty as a term of the
loss, RMSprop and the moving average tensor by tensor. Ours: the searcher's own step (channels-last, fast depthwise
weight gradients, multi-tensor updates). Both start from the same weights and see the same batch; their gradients must
agree in float64 and their losses in float32. Both sides use the same allocator; its raised thresholds are lines of
their own.

Run: ``python benchmarks/supernet_step.py [--threads 1]``
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from _rounds import interleaved, machine, ratio, spread
from torch import nn

from archsmith.atoms.groups import tensors_of
from archsmith.atoms.penalty import ScalePenalty, penalty_weights
from archsmith.core.allocator import raise_malloc_thresholds
from archsmith.families.mobile import MobileFamily, mobile_family
from archsmith.supernet.depthwise import use_fast_depthwise_
from archsmith.train.average import MovingAverage
from archsmith.train.layout import use_memory_format_
from archsmith.train.optim import RMSprop, decay_groups

BATCH, RHO, LR, DECAY = 64, 1e-3, 0.02, 0.99


class NaiveBlock(nn.Module):
    """The block as one would write it down from the paper."""

    def __init__(
        self, channels: int, out: int, stride: int, atoms: tuple[tuple[int, int], ...], expand: bool, momentum: float
    ):
        super().__init__()
        self.residual = stride == 1 and channels == out
        norm = {"eps": 1e-3, "momentum": momentum}
        self.branches = nn.ModuleList()
        for kernel, width in atoms:
            first = (
                [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width, **norm), nn.ReLU()] if expand else []
            )
            depthwise = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
            last = [nn.BatchNorm2d(width, **norm), nn.ReLU(), nn.Conv2d(width, out, 1, bias=False)]
            self.branches.append(nn.Sequential(*first, depthwise, *last))
        self.norm = nn.BatchNorm2d(out, **norm)

    def forward(self, x):
        """Map (B, C, H, W) to (B, C', H', W')."""
        y = self.norm(sum(branch(x) for branch in self.branches))
        return x + y if self.residual else y


class NaiveNet(nn.Module):
    """Stem, blocks, last convolution, pooling, classifier; parameters in the same order as ``MobileNet``."""

    def __init__(self, family: MobileFamily):
        super().__init__()
        norm = {"eps": 1e-3, "momentum": family.norm_momentum}
        stem = family.stem_channels
        layers = [
            nn.Conv2d(family.image[0], stem, 3, family.stem_stride, 1, bias=False),
            nn.BatchNorm2d(stem, **norm),
            nn.ReLU(),
        ]
        channels = stem
        for block in family.plan:
            layers.append(
                NaiveBlock(channels, block.out_channels, block.stride, block.atoms, block.expand, family.norm_momentum)
            )
            channels = block.out_channels
        layers += [
            nn.Conv2d(channels, family.last_channels, 1, bias=False),
            nn.BatchNorm2d(family.last_channels, **norm),
            nn.ReLU(),
        ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(family.last_channels, family.num_classes)

    def forward(self, x):
        """Return logits (B, classes)."""
        return self.classifier(self.features(x).mean((2, 3)))


def naive_step(network: NaiveNet, scales, weights, images, labels):
    """Return a function that does one step: a plain loop over tensors everywhere."""
    state = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in network.parameters()}
    shadow = {name: t.detach().clone() for name, t in network.state_dict().items()}

    def step():
        network.train()
        network.zero_grad(set_to_none=True)
        penalty = sum(c * scale.abs().sum() for c, scale in zip(weights, scales, strict=True))
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.1) + RHO * penalty
        loss.backward()
        with torch.no_grad():
            for p, (square, momentum) in state.items():
                square.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                momentum.mul_(0.9).add_(p.grad / (square + 1e-3).sqrt())
                p.sub_(LR * momentum)
            for name, t in network.state_dict().items():
                if t.is_floating_point():
                    shadow[name].mul_(DECAY).add_(t, alpha=1 - DECAY)

    return step


def our_step(network, penalty, images, labels):
    """Return a function that does one step as the searcher does it."""
    optimizer = RMSprop(decay_groups(network, 0.0), LR)
    average = MovingAverage(network, DECAY)

    def step():
        network.train()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels, label_smoothing=0.1).backward()
        penalty.add_gradient_(RHO)
        optimizer.step()
        average.update(network)

    return step


def differences(naive, ours, images, labels) -> tuple[float, float]:
    """Return how far both are apart: all gradients in float64, the loss in float32, both relative.

    In float32 the gradients of both differ from the float64 ones by about 1e-3 at this initialisation (rectifiers on
    the edge), so only float64 can tell whether the mathematics is the same.
    """
    gradients, losses = [], []
    for network in (naive, ours):
        losses.append(float(F.cross_entropy(network.train()(images), labels).detach()))
        twin = copy.deepcopy(network).double()
        twin.zero_grad(set_to_none=True)
        F.cross_entropy(twin(images.double()), labels, label_smoothing=0.1).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    distance = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return float(distance), abs(losses[0] - losses[1]) / abs(losses[0])


def compare(side: int, preset: str) -> None:
    """Check that both do the same, then time them."""
    family = mobile_family(preset, image=(3, side, side), num_classes=10, dropout=0.0)
    ours = family.build(family.largest(), seed=1)
    naive = NaiveNet(family)
    with torch.no_grad():
        for target, source in zip(naive.parameters(), ours.parameters(), strict=True):
            target.copy_(source)
    use_memory_format_(ours, torch.channels_last)
    use_fast_depthwise_(ours)
    atoms = family.atoms(ours)
    weights = penalty_weights(atoms)
    named = tensors_of(ours)
    penalty = ScalePenalty(weights, {g.name: named[g.scale] for g in atoms})
    position = {id(p): i for i, p in enumerate(ours.parameters())}
    listed = list(naive.parameters())
    scales = [listed[position[id(named[g.scale])]] for g in atoms]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, side, side, generator=generator)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    gap, loss_gap = differences(naive, ours, images, labels)
    assert gap < 1e-9 and loss_gap < 1e-4, (gap, loss_gap)
    slow = naive_step(naive, scales, [weights[g.name] for g in atoms], images, labels)
    fast = our_step(ours, penalty, images.contiguous(memory_format=torch.channels_last), labels)
    seconds = interleaved({"straightforward": slow, "archsmith": fast})
    middle, low, high = ratio(seconds["straightforward"], seconds["archsmith"])
    print(f"\n{side}x{side}, preset {preset}, {len(atoms):,} atoms, batch {BATCH}")
    print(f"  relative gaps: gradients in float64 {gap:.0e}, loss in float32 {loss_gap:.0e}")
    for name, values in seconds.items():
        print(f"  {name:16s}{spread(values)}")
    print(f"  ratio           {middle:.2f}x (quartiles {low:.2f} to {high:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("supernet training step:", machine(arguments.threads))
    for raised in (False, True):
        if raised:
            print("\nallocator thresholds raised (both sides):", raise_malloc_thresholds())
        for side, preset in ((8, "tiny"), (16, "tiny"), (32, "small")):
            compare(side, preset)


if __name__ == "__main__":
    main()

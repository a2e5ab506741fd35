"""The supernet of stage-wise elastic mobile networks: the largest of them, and all others as its slices.

A child is the first channels of every tensor, the first blocks of every stage and the centre of every depthwise
kernel; its shortcuts are projected where its own width changes. Training normalises by batch statistics alone:
momentum is 0 and nothing accumulates, because running statistics of one child say nothing of another. Take new ones
(``archsmith.train.calibration.calibrate_``) before a child is evaluated in evaluation mode.

Source: BigNAS, arXiv 2003.11142.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from archsmith.families.bignas_space import resized
from archsmith.layers.bignas import BigNasNet, InvertedResidual, ResidualEverywhere
from archsmith.supernet.elastic_slices import Part, SlicedAttribute, SlicedAxis, SlicedChildren, Slices
from archsmith.supernet.sliced import SlicedSupernet

if TYPE_CHECKING:
    from archsmith.families.bignas import BigNasFamily

NORM = ("weight", "bias", "running_mean", "running_var")


class BigNasSupernet(SlicedSupernet[BigNasNet]):
    """The largest network with one active child; called, it computes the child.

    Args:
        family: Its largest network is the supernet.
        seed: Seed of the published initialisation; None leaves torch's own weights.

    Attributes:
        network: The largest network, with a projection in every shortcut that some child needs one for; whole, whatever
            is active.
        active: The active child; the largest at first.
    """

    def __init__(self, family: BigNasFamily, *, seed: int | None = None) -> None:
        super().__init__()
        self.family = family
        self.network = family.build(family.largest(), seed=seed, idle=True)
        self._drop_needless_projections()
        self.begin_(family, Slices(self.network, list(parts_of(self.network))))

    def sizes(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the size of everything that a genotype reaches, by the genes of ``parts_of``."""
        family, chosen = self.family, self.family.table.completed(architecture)
        channels = chosen["stem/width"]
        last, mix = family.table.head(architecture)
        sizes: dict[str, Any] = {"resolution": resized(family.image, chosen["resolution"]), "stem": channels}
        for s, stage in enumerate(family.table.plan(architecture)):
            sizes[f"depth.{s}"] = len(stage)
            for b, (width, _, kernel, hidden, _, squeeze) in enumerate(stage):
                own = {"in": channels, "out": width, "kernel": kernel, "hidden": hidden, "squeeze": squeeze}
                sizes |= {f"{name}.{s}.{b}": value for name, value in own.items()}
                channels = width
        return {**sizes, "end": channels, "last": last, "mix": mix}

    def _drop_needless_projections(self) -> None:
        """Leave out the idle projections that no child uses: behind a stage's first block the width never changes."""
        for stage in self.network.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in list(stage)[1:]:
                assert isinstance(block, ResidualEverywhere)
                block.shortcut.project = nn.Identity()


def parts_of(network: BigNasNet) -> Iterator[Part]:
    """Yield what follows which size: "stem", "hidden.<stage>.<block>", ..., "depth.<stage>", "end", "last", "mix"."""
    yield SlicedAttribute("resize.size", ("resolution",), _same)
    yield from _conv_norm("stem", rows="stem")
    for s, stage in enumerate(network.stages):
        assert isinstance(stage, nn.ModuleList)
        yield SlicedChildren(f"stages.{s}", (f"depth.{s}",), range)
        for b, block in enumerate(stage):
            assert isinstance(block, ResidualEverywhere)
            name, at = f"stages.{s}.{b}", f"{s}.{b}"
            yield from _body(f"{name}.body", block.body, at)
            if not isinstance(block.shortcut.project, nn.Identity):
                yield SlicedAttribute(f"{name}.shortcut.projects", (f"in.{at}", f"out.{at}"), _differ)
                yield SlicedAxis(f"{name}.shortcut.project.weight", 0, (f"out.{at}",), _same)
                yield SlicedAxis(f"{name}.shortcut.project.weight", 1, (f"in.{at}",), _same)
    yield from _conv_norm("last", rows="last", columns="end")
    if isinstance(network.mix, nn.Identity):
        yield SlicedAxis("classifier.weight", 1, ("last",), _same)
    else:
        yield SlicedAxis("mix.0.weight", 0, ("mix",), _same)
        yield SlicedAxis("mix.0.weight", 1, ("last",), _same)
        yield SlicedAxis("classifier.weight", 1, ("mix",), _same)


def _body(name: str, body: InvertedResidual, at: str) -> Iterator[Part]:
    """Yield the parts of an inverted residual; ``at`` are the numbers of stage and block."""
    hidden, kernel, squeeze = f"hidden.{at}", f"kernel.{at}", f"squeeze.{at}"
    whole = body.depthwise.kernel_size[0]
    if not isinstance(body.expand, nn.Identity):
        yield from _conv_norm(f"{name}.expand", rows=hidden, columns=f"in.{at}")
    yield SlicedAxis(f"{name}.depthwise.weight", 0, (hidden,), _same)
    for axis in (2, 3):
        yield SlicedAxis(f"{name}.depthwise.weight", axis, (kernel,), lambda k, whole=whole: _centre(k, whole))
    yield SlicedAttribute(f"{name}.depthwise.kernel_size", (kernel,), lambda k: (k, k))
    yield SlicedAttribute(f"{name}.depthwise.padding", (kernel,), lambda k: (k // 2, k // 2))
    yield from _norm(f"{name}.depthwise_norm", hidden)
    if not isinstance(body.gate, nn.Identity):
        for leaf, rows, columns in (("reduce", squeeze, hidden), ("expand", hidden, squeeze)):
            yield SlicedAxis(f"{name}.gate.{leaf}.weight", 0, (rows,), _same)
            yield SlicedAxis(f"{name}.gate.{leaf}.weight", 1, (columns,), _same)
            yield SlicedAxis(f"{name}.gate.{leaf}.bias", 0, (rows,), _same)
    yield SlicedAxis(f"{name}.project.weight", 0, (f"out.{at}",), _same)
    yield SlicedAxis(f"{name}.project.weight", 1, (hidden,), _same)
    yield from _norm(f"{name}.project_norm", f"out.{at}")


def _conv_norm(name: str, *, rows: str, columns: str | None = None) -> Iterator[Part]:
    """Yield the parts of a ``ConvNormAct``."""
    yield SlicedAxis(f"{name}.conv.weight", 0, (rows,), _same)
    if columns is not None:
        yield SlicedAxis(f"{name}.conv.weight", 1, (columns,), _same)
    yield from _norm(f"{name}.norm", rows)


def _norm(name: str, gene: str) -> Iterator[Part]:
    for leaf in NORM:
        yield SlicedAxis(f"{name}.{leaf}", 0, (gene,), _same)


def _same(value: Any) -> Any:
    return value


def _differ(first: int, second: int) -> bool:
    return first != second


def _centre(kernel: int, whole: int) -> slice:
    """Return the centre of an axis of a kernel."""
    first = (whole - kernel) // 2
    return slice(first, first + kernel)

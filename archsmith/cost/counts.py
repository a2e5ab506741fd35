"""Parameters and multiply-accumulates (MACs) of a network, exact, per layer and for ONE example.

The network runs once on symbolic tensors (shapes without numbers), so nothing is computed and nothing changes: mode,
parameters, buffers and attributes are the same afterwards. Below it, every operator that reaches the dispatcher is
counted by ``operators.py`` and charged to the innermost module that called it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from archsmith.core.errors import Shown, UserError
from archsmith.cost.operators import RULES, operator_macs
from archsmith.graph import Inputs, as_inputs, attributes_kept, evaluating, quiet_tracing

Convention = Literal["standard", "paper"]

_AVERAGE_POOLINGS = frozenset(
    {
        F.avg_pool1d,
        F.avg_pool2d,
        F.avg_pool3d,
        F.adaptive_avg_pool1d,
        F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d,
    }
)


@dataclass(frozen=True)
class LayerCount:
    """What one module costs by itself, its submodules excluded.

    Args:
        name: Qualified name, empty for the network itself; a shared module appears once, under its first name.
        kind: Name of its class.
        macs: MACs per example, summed over all its calls.
        params: Elements of its own parameters; a shared one belongs to its first owner only.
        output_shape: Shape of the first tensor it returned last, batch axis of size 1 included; None if never called.
    """

    name: str
    kind: str
    macs: int
    params: int
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Counts:
    """Exact counts of a network; the sums over ``layers`` are the totals.

    Args:
        macs: MACs of one example (one MAC is two FLOPs).
        params: Elements of all parameters, shared ones once.
        params_conv_linear: The same without the parameters of normalisation layers (what many papers print).
        convention: What counts as a MAC: ``standard`` or ``paper``, see ``count``.
        layers: Every module without submodules, and every other one that has own parameters or MACs, in the order of
            ``named_modules``.
        uncounted: Operators that ran and have no counting rule (custom operators, say); empty means ``macs`` is exact.
    """

    macs: int
    params: int
    params_conv_linear: int
    convention: Convention
    layers: tuple[LayerCount, ...]
    uncounted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return asdict(self)


def count(
    module: nn.Module, inputs: Inputs, *, convention: Convention = "standard", batch_axis: int | None = 0
) -> Counts:
    """Count the MACs and parameters of ``module`` in evaluation mode, for one example.

    Conventions, named in the result: ``standard`` counts convolutions and matrix products (linear layers, attention
    scores and mixing, the weight matrices of recurrent layers) and nothing else: no bias, normalisation, activation,
    pooling or embedding. ``paper`` adds the input elements of every average pooling operator, as the profiler behind
    the published AtomNAS tables does; a plain ``mean`` is not a pooling operator.

    Args:
        module: Network on any device, the meta device included; left exactly as it is.
        inputs: One tensor or a tuple of arguments; only shapes and types matter. Of a batch the first example is
            counted: all tensors that are as long as the first one along ``batch_axis`` are cut to length 1 there, so
            the result does not depend on the batch and work shared between examples is counted whole.
        convention: ``standard`` or ``paper``.
        batch_axis: Axis of the examples; None counts the inputs whole, as one example.

    Returns:
        Exact counts. Operators whose number of products depends on the data are run on the real inputs.

    Raises:
        UserError: Unknown convention, an empty batch, or inputs that the module does not accept.

    Example:
        >>> count(nn.Linear(3, 2), torch.zeros(8, 3)).macs
        6
    """
    if convention not in get_args(Convention):
        raise UserError("convention", convention, allowed=" or ".join(get_args(Convention)))
    counter = observed(module, inputs, lambda: _Counter(pooling=convention == "paper"), batch_axis=batch_axis)
    return _summary(module, counter, convention)


def observed(module: nn.Module, inputs: Inputs, make: Callable[[], C], *, batch_axis: int | None = 0) -> C:
    """Run ``module`` once for one example and return the observer that saw its operators.

    Args:
        module: As in ``count``; left exactly as it is.
        inputs: As in ``count``.
        make: Makes a fresh observer; called again when the symbolic run fails and the real one begins.
        batch_axis: As in ``count``.

    Raises:
        UserError: An empty batch, or inputs that the module does not accept.
    """
    arguments = _one_example(as_inputs(module, inputs), batch_axis)
    observer = make()
    with evaluating(module), attributes_kept(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with quiet_tracing():
                _run(module, arguments, observer, symbolic=True)
        except Exception as symbolic_error:
            # Control flow that looks at numbers needs numbers; a meta network has none.
            if any(p.device.type == "meta" for p in module.parameters()):
                raise _refused(module, arguments, symbolic_error) from symbolic_error
            observer = make()
            try:
                _run(module, arguments, observer, symbolic=False)
            except Exception as error:
                raise _refused(module, arguments, error) from error
    return observer


def _refused(module: nn.Module, arguments: tuple[Any, ...], error: Exception) -> UserError:
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        "inputs",
        Shown(f"tensors of shape {shapes} (one example), with which {type(module).__name__} fails: {first_line}"),
        allowed="inputs that the network's forward accepts",
    )


def _one_example(arguments: tuple[Any, ...], batch_axis: int | None) -> tuple[Any, ...]:
    if batch_axis is None:
        return arguments
    first = next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    if not 0 <= batch_axis < first.dim() or first.shape[batch_axis] == 0:
        raise UserError(
            "inputs",
            Shown(f"a first tensor of shape {tuple(first.shape)}"),
            allowed=f"at least one example along axis {batch_axis}",
            hint="Pass batch_axis=None to count inputs that have no batch axis.",
        )
    size = first.shape[batch_axis]

    def narrowed(tensor: Tensor) -> Tensor:
        batched = tensor.dim() > batch_axis and tensor.shape[batch_axis] == size
        return tensor.narrow(batch_axis, 0, 1) if batched else tensor

    result: tuple[Any, ...] = tree_map_only(Tensor, narrowed, arguments)
    return result


@dataclass
class Observer(ABC):
    """Sees the operators of one run; ``stack`` holds the names of the modules that are running.

    Attributes:
        pooling: Whether ``add_pooling`` is called for average poolings.
        stack: Qualified names of the running modules, the innermost last.
        shapes: Shape of the first tensor that each module returned last.
    """

    pooling: bool = False
    stack: list[str] = field(default_factory=lambda: [""])
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def begin(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: B027 (most have no use for them)
        """Take the tensors that stand for the module's parameters in this run, by qualified name."""

    @abstractmethod
    def see(self, operator: Any, args: tuple[Any, ...], out: Any) -> None:
        """Take one call of an ATen operator."""

    def add_pooling(self, elements: int) -> None:  # noqa: B027
        """Take the number of input elements of an average pooling."""


C = TypeVar("C", bound=Observer)


@dataclass
class _Counter(Observer):
    """Tallies MACs by module."""

    macs: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, None] = field(default_factory=dict)

    def see(self, operator: Any, args: tuple[Any, ...], out: Any) -> None:
        macs = operator_macs(operator, args, out)
        if macs is None:
            self.uncounted[str(operator)] = None
        elif macs:
            self.add_pooling(macs)

    def add_pooling(self, elements: int) -> None:
        self.macs[self.stack[-1]] = self.macs.get(self.stack[-1], 0) + elements


class _ObserveOperators(TorchDispatchMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func.overloadpacket not in RULES:
            # Under inference mode composite operators arrive whole: let their parts come by instead.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.observer.see(func, args, out)
        return out


class _ObservePoolings(TorchFunctionMode):
    """Sees average poolings by name: below, adaptive pooling to one cell can not be told from ``mean``."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _AVERAGE_POOLINGS:
            self.observer.add_pooling((args[0] if args else kwargs["input"]).numel())
        return func(*args, **kwargs)


def _run(module: nn.Module, arguments: tuple[Any, ...], observer: Observer, *, symbolic: bool) -> None:
    """Run ``module`` once under the observer, on symbolic tensors or on copies of the real ones."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    with ExitStack() as stack:
        stack.enter_context(_module_names(module, observer))
        stack.enter_context(_without_fused_attention())
        if symbolic:
            # Tensors that a module holds as plain attributes are made symbolic as they are met.
            mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            tensors: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in state.items()}
            arguments = tree_map_only(Tensor, mode.from_tensor, arguments)
        else:
            tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
            arguments = tree_map_only(Tensor, Tensor.clone, arguments)
        observer.begin({name: tensors[name] for name, _ in module.named_parameters()})
        if observer.pooling:
            stack.enter_context(_ObservePoolings(observer))
        stack.enter_context(_ObserveOperators(observer))
        functional_call(module, tensors, arguments)


@contextmanager
def _module_names(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Keep ``observer.stack`` at the running module and note what each returns."""
    with ExitStack() as stack:
        for name, submodule in module.named_modules():

            def enter(m: nn.Module, args: Any, name: str = name) -> None:
                observer.stack.append(name)

            def leave(m: nn.Module, args: Any, out: Any, name: str = name) -> None:
                observer.stack.pop()
                first = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
                if first is not None:
                    observer.shapes[name] = tuple(first.shape)

            stack.callback(submodule.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(submodule.register_forward_hook(leave, always_call=True).remove)
        yield


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Make attention arrive as matrix products: the fused operators pad heads on some devices and hide whole layers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _summary(module: nn.Module, counter: _Counter, convention: Convention) -> Counts:
    seen: set[nn.Parameter] = set()
    layers = []
    for name, submodule in module.named_modules():
        own = {p for p in submodule.parameters(recurse=False) if p not in seen}
        seen |= own
        macs, params = counter.macs.get(name, 0), sum(p.numel() for p in own)
        if macs or params or not any(True for _ in submodule.children()):
            layers.append(LayerCount(name, type(submodule).__name__, macs, params, counter.shapes.get(name)))
    outside_norms = {p for m in module.modules() if not is_normalisation(m) for p in m.parameters(recurse=False)}
    return Counts(
        macs=sum(counter.macs.values()),
        params=sum(p.numel() for p in seen),
        params_conv_linear=sum(p.numel() for p in outside_norms),
        convention=convention,
        layers=tuple(layers),
        uncounted=tuple(counter.uncounted),
    )


def is_normalisation(module: nn.Module) -> bool:
    """Whether the class is a normalisation by its name: torch's own, and those that models bring (LlamaRMSNorm)."""
    return re.search(r"Norm(\dd)?$", type(module).__name__) is not None

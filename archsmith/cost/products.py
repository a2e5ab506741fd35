"""The products of a network one by one: every convolution and matrix product that ``count`` counts, with its sizes.

``count`` says how many multiply-accumulates there are; here stands where each of them comes from: the sizes whose
product it is, and the parameter that is its weight. That is what is needed to say what a *cut* network would cost
without building it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from archsmith.cost.counts import Observer, observed
from archsmith.cost.operators import aten, operator_macs
from archsmith.graph import Inputs

Kind = Literal["convolution", "depthwise", "product", "recurrent"]


@dataclass(frozen=True)
class Product:
    """One convolution or matrix product of one example.

    Attributes:
        module: Qualified name of the module that called it.
        kind: "depthwise" is a convolution with one input and one output channel in every group.
        macs: Its multiply-accumulates, the product of ``sizes``.
        sizes: What is multiplied: (positions, out, in / groups, kernel) of a convolution, (batch, rows, inner, columns)
            of a matrix product, (steps, rows, columns) of a recurrent weight.
        weight: Name of the parameter all of whose elements are one operand, or empty: two activations, or a part or a
            function of a parameter.
        weight_axes: Axes of that parameter that run over outputs and over inputs (per group).
        read: Elements of the activations it reads.
        written: Elements that it writes.
    """

    module: str
    kind: Kind
    macs: int
    sizes: tuple[int, ...]
    weight: str = ""
    weight_axes: tuple[int, int] = (0, 1)
    read: int = 0
    written: int = 0


@dataclass
class _Recorder(Observer):
    """Notes every product of one run."""

    parameters: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    uncounted: dict[str, None] = field(default_factory=dict)

    def begin(self, parameters: Mapping[str, Tensor]) -> None:
        # Views of a parameter share its storage, which lives as long as the run.
        self.parameters = {tensor.untyped_storage()._cdata: (name, tensor) for name, tensor in parameters.items()}

    def see(self, operator: Any, args: tuple[Any, ...], out: Any) -> None:
        macs = operator_macs(operator, args, out)
        if macs is None:
            self.uncounted[str(operator)] = None
        elif macs:
            self.products += self._products(operator.overloadpacket, args, out)

    def whole_parameter(self, operand: Tensor) -> tuple[str, Tensor]:
        """Return the parameter whose every element ``operand`` holds, with its name; an empty name for none."""
        name, tensor = self.parameters.get(operand.untyped_storage()._cdata, ("", operand))
        return (name, tensor) if name and tensor.numel() == operand.numel() else ("", operand)

    def _products(self, packet: Any, args: tuple[Any, ...], out: Any) -> list[Product]:
        module = self.stack[-1]
        if packet in (aten.convolution, aten._convolution, aten.convolution_overrideable):
            return [self._convolution(module, args, out)]
        if packet in (aten.mkldnn_rnn_layer, aten._cudnn_rnn):
            return self._recurrent(module, packet, args)
        if len(args) > 2 and isinstance(args[2], Tensor) and "attention" in str(packet):
            query, key, value = args[:3]
            rows = prod(query.shape[:-2])
            sizes = [(rows, query.shape[-2], inner, key.shape[-2]) for inner in (query.shape[-1], value.shape[-1])]
            read = query.numel() + key.numel() + value.numel()
            return [Product(module, "product", prod(each), each, read=read, written=0) for each in sizes]
        added = packet in (aten.addmm, aten._addmm_activation, aten.baddbmm, aten.addbmm, aten.addmv)
        left, right = (args[1], args[2]) if added else (args[0], args[1])
        return [self._matrix_product(module, left, right, out)]

    def _convolution(self, module: str, args: tuple[Any, ...], out: Tensor) -> Product:
        inputs, operand, transposed, groups = args[0], args[1], args[6], args[8]
        name, weight = self.whole_parameter(operand)
        positions = inputs.numel() // operand.shape[0] if transposed else out.numel() // operand.shape[0]
        sizes = (positions, operand.shape[0], operand.shape[1], prod(operand.shape[2:]))
        depthwise = groups > 1 and operand.shape[1] == 1 and operand.shape[0] == groups
        return Product(
            module,
            "depthwise" if depthwise else "convolution",
            prod(sizes),
            sizes,
            name if weight.shape == operand.shape else "",
            (1, 0) if transposed else (0, 1),
            inputs.numel(),
            out.numel(),
        )

    def _matrix_product(self, module: str, left: Tensor, right: Tensor, out: Any) -> Product:
        batch = prod(left.shape[:-2]) if left.dim() > 2 else 1
        rows = left.shape[-2] if left.dim() > 1 else 1
        columns = right.shape[-1] if right.dim() > 1 else 1
        sizes = (batch, rows, left.shape[-1], columns)
        written = out.numel() if isinstance(out, Tensor) else 0
        for operand, other, outputs in ((right, left, 1), (left, right, 0)):
            name, weight = self.whole_parameter(operand)
            if name and weight.dim() == 2 and operand.dim() == 2 and sorted(weight.shape) == sorted(operand.shape):
                transposed = operand.stride() != weight.stride() or operand.shape != weight.shape
                axis = 1 - outputs if transposed else outputs
                return Product(module, "product", prod(sizes), sizes, name, (axis, 1 - axis), other.numel(), written)
        return Product(module, "product", prod(sizes), sizes, "", read=left.numel() + right.numel(), written=written)

    def _recurrent(self, module: str, packet: Any, args: tuple[Any, ...]) -> list[Product]:
        steps = prod(args[0].shape[:-1])
        weights = list(args[1:3]) if packet is aten.mkldnn_rnn_layer else [w for w in args[1] if w.dim() == 2]
        products = []
        for operand in weights:
            name, weight = self.whole_parameter(operand)
            sizes = (steps, *operand.shape)
            products.append(
                Product(module, "recurrent", prod(sizes), sizes, name if weight.shape == operand.shape else "")
            )
        return products


class Called(nn.Module):
    """A network with its own way of being called, as a network that is called plainly.

    Args:
        model: The network; it is not copied.
        call: ``call(model, *arguments)``.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, *arguments: Any) -> Any:
        """Call the network in its own way."""
        return self._call(self.model, *arguments)


def called(
    model: nn.Module, inputs: Any, call: Callable[..., Any] | None = None
) -> tuple[nn.Module, Inputs, Callable[[str], str]]:
    """Return a network and positional arguments for ``count`` and ``products``, and how to read its names.

    Args:
        model: The network.
        inputs: A tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        call: ``call(model, *arguments)`` where ``model(*arguments)`` is not the way; it gets keyword arguments where
            ``inputs`` is a mapping.
    """
    if isinstance(inputs, Mapping):
        keys, own = tuple(inputs), call

        def by_name(network: nn.Module, *arguments: Any) -> Any:
            named = dict(zip(keys, arguments, strict=True))
            return own(network, **named) if own is not None else network(**named)

        return Called(model, by_name), tuple(inputs.values()), lambda name: name.removeprefix("model").removeprefix(".")
    if call is not None:
        return Called(model, call), inputs, lambda name: name.removeprefix("model").removeprefix(".")
    return model, inputs, lambda name: name


def products(module: nn.Module, inputs: Inputs, *, batch_axis: int | None = 0) -> tuple[tuple[Product, ...], bool]:
    """Return every product of ``module`` for one example, in the order of execution, and whether these are all.

    Args:
        module: As in ``archsmith.cost.count``; left exactly as it is.
        inputs: As there.
        batch_axis: As there.

    Returns:
        The products, whose MACs sum to ``count(module, inputs).macs``; and False when an operator without a counting
        rule ran.

    Raises:
        UserError: Inputs that the module does not accept.

    Example:
        >>> products(nn.Linear(3, 2), torch.zeros(8, 3))[0][0].sizes
        (1, 1, 3, 2)
    """
    recorder = observed(module, inputs, _Recorder, batch_axis=batch_axis)
    return tuple(recorder.products), not recorder.uncounted

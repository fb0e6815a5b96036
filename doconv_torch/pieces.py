"""What one step of a module's own code is: linear in its only input, a sum, or anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.linear import UNIT, Scale, Taps
from doconv_core.models.merge import Node, Step, atom
from doconv_torch import affine
from doconv_torch.arguments import pads_of
from doconv_torch.batchnorm import any_norm_obstacle
from doconv_torch.ordinary import is_batch_norm, is_convolution, obstacle

POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Operations by what they do, under the names that they have as operators, functions and methods.
_NAMES = {
    "add": "+", "iadd": "+", "add_": "+", "sub": "-", "isub": "-", "sub_": "-", "subtract": "-",
    "mul": "*", "imul": "*", "mul_": "*", "multiply": "*", "truediv": "/", "itruediv": "/",
    "div": "/", "div_": "/", "divide": "/", "neg": "neg", "negative": "neg",
    "contiguous": "pass", "clone": "pass", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv",
    "avg_pool1d": "pool", "avg_pool2d": "pool", "avg_pool3d": "pool", "dropout": "dropout",
}  # fmt: skip
_CHANGING = frozenset(["iadd", "add_", "isub", "sub_", "imul", "mul_", "itruediv", "div_"])
# What is done with parameters alone is computed once.
_PURE = frozenset(
    ["sigmoid", "tanh", "exp", "softplus", "relu", "abs", "neg", "sqrt", "rsqrt", "pow", "clamp",
     "view", "reshape", "getitem", "unsqueeze", "squeeze", "flatten", "expand", "transpose",
     "permute", "add", "sub", "mul", "truediv", "div", "contiguous", "detach"]
)  # fmt: skip


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a step calls."""
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def changes(node: fx.Node) -> bool:
    """Return whether an operation changes what it takes."""
    name = name_of(node)
    inplace = node.kwargs.get("inplace", False) is not False
    return inplace or name in _CHANGING or (name.endswith("_") and not name.startswith("_"))


class Reader:
    """Reads the steps of a module's own code, in their order.

    known: modules inside that are linear, by their `id`. constants: what does not depend on what
    the module is given, as far as it was read.
    """

    def __init__(self, module: nn.Module, known: Mapping[int, Node]) -> None:
        self._module, self._known = module, known
        self.constants: dict[fx.Node, Tensor] = {}
        self._steps: dict[fx.Node, Step] = {}

    def step(self, node: fx.Node) -> Step | None:
        """Return what a step is; None for a constant."""
        value = self._constant(node)
        if value is not None:
            self.constants[node] = value
            return None
        inputs = tuple(each for each in node.all_input_nodes if each not in self.constants)
        if node.op == "call_module":
            step = Step(node, inputs, self._called(node))
        elif changes(node) and not (inputs and self._is_own(inputs[0])):
            step = Step(node, inputs)
        else:
            step = self._computed(node, inputs)
        self._steps[node] = step
        return step

    def _constant(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(self._module.get_submodule(owner), name, None)
            return _wide(value) if isinstance(value, Tensor) and not value.is_meta else None
        given = node.all_input_nodes
        if not given or name_of(node) not in _PURE or not all(n in self.constants for n in given):
            return None
        args: Any = fx.node.map_arg(node.args, self.constants.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, self.constants.__getitem__)
        function: Any = node.target
        if isinstance(function, str):
            function, args = getattr(args[0], function), args[1:]
        return function(*args, **kwargs)  # type: ignore[no-any-return]

    def _called(self, node: fx.Node) -> Node | None:
        module = self._module.get_submodule(str(node.target))
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or node.kwargs:
            return None
        return self._known.get(id(module)) or layer_node(module)

    def _is_own(self, node: fx.Node) -> bool:
        """Return whether a result is nobody else's, so that it may be changed."""
        while len(node.users) == 1 and node in self._steps:
            step = self._steps[node]
            if step.node is None:  # an operation may be a view of what it takes
                return bool(step.signs) or node.op == "call_module"
            if not isinstance(step.node.piece, Scale) or not step.node.piece.passes:
                return True
            node = step.inputs[0]
        return False

    def _computed(self, node: fx.Node, inputs: tuple[fx.Node, ...]) -> Step:
        """Return what an operation is."""
        kind, args = _NAMES.get(name_of(node)), node.args
        two = len(args) == 2 and not node.kwargs
        if two and kind in ("+", "-") and not any(map(self._is_constant, args)):
            return Step(node, args, None, (1, 1 if kind == "+" else -1))
        if len(inputs) != 1:
            return Step(node, inputs)
        if kind == "pool":
            rank = int(name_of(node)[-2])
            pool: Any = POOLS[rank - 1]
            return Step(node, inputs, layer_node(pool(*args[1:], **node.kwargs)))
        if kind == "conv":
            return Step(node, inputs, self._convolution(node))
        scale = None
        if kind in ("+", "-", "*", "/") and two:
            scale = self._arithmetic(kind, *args)
        elif kind == "neg":
            scale = Scale(-UNIT.factor)
        elif (kind == "pass" and len(args) == 1) or (
            kind == "dropout" and (args[2:3] or (node.kwargs.get("training"),)) == (False,)
        ):
            scale = UNIT
        return Step(node, inputs, None if scale is None else atom(scale))

    def _is_constant(self, value: Any) -> bool:
        return not isinstance(value, fx.Node) or value in self.constants

    def _arithmetic(self, kind: str, a: Any, b: Any) -> Scale | None:
        """Return a value and a constant, in either order, as a scale."""
        ahead = not self._is_constant(a)
        constant = self._by_channel(b if ahead else a)
        if constant is None or (kind == "/" and not ahead):
            return None
        if kind == "*":
            return Scale(constant)
        if kind == "/":
            return Scale(1 / constant)
        offset = constant if kind == "+" or not ahead else -constant
        one = UNIT.factor if kind == "+" or ahead else -UNIT.factor
        return Scale(one, offset if offset.any() else None)

    def _by_channel(self, value: Any) -> Any:
        """Return a number, or a tensor with one entry for each channel; None for anything else."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return np.array(float(value))
        tensor = self.constants.get(value) if isinstance(value, fx.Node) else None
        if tensor is None or not tensor.is_floating_point():
            return None
        if tensor.numel() == 1:
            return tensor.reshape(()).numpy()
        shape = tensor.shape[1:] if tensor.shape[0] == 1 else tensor.shape
        if len(shape) < 2 or any(size != 1 for size in shape[1:]):
            return None
        return tensor.flatten().numpy()

    def _convolution(self, node: fx.Node) -> Node | None:
        """Return a convolution that the code itself computes with constants."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given: dict[str, Any] = {
            "bias": None,
            "stride": 1,
            "padding": 0,
            "dilation": 1,
            "groups": 1,
        }
        given.update(zip(names, node.args, strict=False))
        given.update(node.kwargs)
        weight, bias = (self.constants.get(given[name]) for name in ("weight", "bias"))
        if weight is None or (bias is None) != (given["bias"] is None):
            return None
        stride, padding, dilation, groups = (given[name] for name in names[3:])
        return atom(_taps(weight, bias, stride, padding, dilation, groups, "zeros"))


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def layer_node(layer: Any) -> Node | None:
    """Return what one of PyTorch's own layers, or a batch norm, is; None for what is not linear."""
    if any(p.is_meta for p in layer._parameters.values() if p is not None):
        return None
    if is_convolution(layer):
        if obstacle(layer) is not None:
            return None
        bias = None if layer.bias is None else _wide(layer.bias)
        return atom(
            _taps(_wide(layer.weight), bias, layer.stride, layer.padding, layer.dilation,
                  layer.groups, layer.padding_mode)
        )  # fmt: skip
    if is_batch_norm(layer):
        if any_norm_obstacle(layer) is not None:
            return None
        found = next(filter(None, (affine.read(layer, axes) for axes in (4, 3, 5, 2))), None)
        if found is None or found.after:
            return None
        return atom(Scale(found.scale.cpu().double().numpy(), found.offset.cpu().double().numpy()))
    if type(layer) in _PASSING:
        return None if layer.training and type(layer) is not nn.Identity else atom(UNIT)
    return _pool_node(layer) if type(layer) in POOLS else None


def _taps(
    weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
    mode: str,
) -> Taps:  # fmt: skip
    size = tuple(weight.shape[2:])
    stride, dilation = (_tuple(each, len(size)) for each in (stride, dilation))
    padding = padding if isinstance(padding, str) else _tuple(padding, len(size))
    geometry = Geometry(stride, dilation, pads_of(size, stride, padding, dilation), mode)
    return Taps(weight.numpy(), None if bias is None else bias.numpy(), geometry, groups)


def _pool_node(pool: Any) -> Node | None:
    """Return what an average pooling is, where it treats its input's borders as a kernel does."""
    rank = POOLS.index(type(pool)) + 1
    size, stride = _tuple(pool.kernel_size, rank), _tuple(pool.stride, rank)
    padding = _tuple(pool.padding, rank)
    if pool.ceil_mode or (any(padding) and not pool.count_include_pad):
        return None
    kernel = np.full((1, 1, *size), 1 / (getattr(pool, "divisor_override", None) or np.prod(size)))
    geometry = Geometry(stride, (1,) * rank, symmetric(padding))
    return atom(Taps(kernel, None, geometry, alike=True))


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    """Return an argument that may be one integer for all dimensions, alone or in a tuple."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values

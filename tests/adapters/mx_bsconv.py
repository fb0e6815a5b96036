"""BSConv layers, models with them, and networks by name, in MXNet Gluon."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import doconv_mx as package  # before MXNet, which it makes importable

# isort: split
import mxnet as mx
import numpy as np
from contract_bsconv import EPSILON, BSConvCase, Results
from gluon_models import trained_statistics
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

from adapters.mx import LAYERS as DO_LAYERS
from adapters.mx import ORDINARY, Own, array
from doconv_core import Left
from doconv_core.kinds.bsconv_model import GROUPED, other_size
from doconv_mx.bsconv import LAYERS
from doconv_mx.view import copied, count, walk  # noqa: F401

WORDS = {
    "stride": "strides", "padding": "padding", "eps": "epsilon", "wrong": "eps",
    "norms": "momentum, epsilon", "d": "D", "sequential": "HybridSequential", "call": "forward",
    "conv": "mxnet.gluon.nn.Conv2D", "module": "mxnet.gluon.Block", "root": "Net",
}  # fmt: skip
DOUBLE, EXACT, FOUND = "float64", 1e-12, 1e-10
HALF_TYPES = ("float16",)
REFUSE_OWN_CALLS = ("keep", "merge", "dense")
TWO = [mx.cpu(0), mx.cpu(1)]


def pads(case: BSConvCase) -> bool:
    alike = all(before == after for before, after in case.padding)
    return alike and case.padding_mode == "zeros"


def build(case: BSConvCase, dtype: str = "float32") -> HybridBlock:
    spec = case.spec
    options: dict[str, Any] = {"with_bn": spec.with_bn}
    if spec.with_bn:
        options["bn_options"] = {"epsilon": EPSILON}
    if spec.variant == "s":
        options |= {"p": spec.p, "min_mid_channels": spec.min_mid_channels}
    layer = LAYERS[spec.variant, ORDINARY[spec.rank - 1]](
        spec.in_channels, spec.out_channels, spec.kernel_size, case.stride,
        tuple(before for before, _ in case.padding), case.dilation, use_bias=case.bias, **options,
    )  # fmt: skip
    layer.cast(dtype)
    layer.initialize()
    return layer


def round_trip(layer: HybridBlock, case: BSConvCase, folder: Path) -> HybridBlock:
    file = str(folder / "layer.params")
    layer.save_parameters(file)
    loaded = build(case)
    loaded.load_parameters(file)
    return loaded


def forward(layer: HybridBlock, x: np.ndarray) -> np.ndarray:
    return layer(array(x)).asnumpy()


def by_kernel(layer: HybridBlock, x: Any) -> Any:
    """Return the convolution of a padded input with the layer's composed kernel."""
    kernel, options = layer.composed_kernel(), layer.depthwise._kwargs
    return mx.nd.Convolution(
        x, kernel, layer.bias.data(), kernel=kernel.shape[2:], num_filter=kernel.shape[0],
        stride=options["stride"], dilate=options["dilate"],
    )  # fmt: skip


def gradients(layer: HybridBlock, x: np.ndarray, dy: np.ndarray, composed: bool = False) -> Results:
    inputs = array(x)
    inputs.attach_grad()
    with autograd.record(train_mode=False):
        output = by_kernel(layer, inputs) if composed else layer(inputs)
    output.backward(array(dy), train_mode=False)
    found = {}
    for path, part in layer._children.items():
        for name, parameter in part._reg_params.items():
            if parameter.grad_req != "null":
                gradient = parameter.grad().asnumpy()
                if name == "weight":
                    gradient = gradient.reshape(*gradient.shape[:2], -1)
                found[f"{path}.{name}"] = gradient
    return Results(output.asnumpy(), inputs.grad.asnumpy(), found)


def composed_kernel(layer: HybridBlock) -> tuple[np.ndarray, str]:
    kernel = layer.composed_kernel().asnumpy()
    return kernel, kernel.dtype.name


def is_ordinary(layer: HybridBlock, form: str) -> bool:
    if form == "dense":
        return type(layer) in ORDINARY
    types: set[type] = set()
    layer.apply(lambda block: types.add(type(block)))
    own = {nn.HybridSequential, *ORDINARY}
    if form == "merge":
        return types <= own and parts(layer) == ["pointwise", "depthwise"]
    return types <= own | {nn.BatchNorm}


def dtypes(layer: HybridBlock) -> set[str]:
    return {p.data().asnumpy().dtype.name for p in layer.collect_params().values()}


def penalty(model: HybridBlock, layer: HybridBlock, alpha: float) -> tuple[float, Any, Any]:
    """Return the loss, and its gradients of the pointwise weights of one layer of the model."""
    with autograd.record():
        loss = package.orthonormality_loss(model, alpha)
    loss.backward()
    found = [getattr(layer, name).weight.grad() for name in ("pointwise1", "pointwise2")]
    return loss.asscalar(), *(g.asnumpy().reshape(len(g), -1) for g in found)


def _subclassed(made: HybridBlock) -> None:
    made.register_child(Own(6, 3, groups=6, in_channels=6), "depthwise")
    vars(made)["depthwise"] = made._children["depthwise"]


def _exchanged(name: str, *arguments: Any, **options: Any) -> Any:
    def change(made: HybridBlock) -> None:
        conv = nn.Conv2D(*arguments, in_channels=8 if name == "pointwise1" else 6, **options)
        setattr(made, name, initialized(conv))

    return change


def _other_axis(made: HybridBlock) -> None:
    made.batch_norm1 = nn.BatchNorm(axis=2, in_channels=7)


def own_call(made: HybridBlock) -> None:
    made.forward = made.forward


# What may be done to a BSConv-S with batch norms, 8 channels to 6, and why it is then not folded.
POINTWISE = "its pointwise1 is no pointwise convolution of stride 1"
NOT_FOLDABLE = [
    (
        lambda made: made.pointwise1.register_forward_hook(lambda *_: None),
        "its pointwise1 has hooks, which would see other values; remove them first",
    ),
    (_subclassed, "its depthwise cannot be folded: it is a Own; expected a mxnet.gluon.nn.Conv"),
    (
        lambda made: made.add(nn.Activation("relu")),
        "its parts are pointwise1, batch_norm1, .*; expected pointwise1",
    ),
    (_exchanged("pointwise1", 4, 1, 2), POINTWISE),
    (_exchanged("pointwise1", 4, 3), POINTWISE),
    (_exchanged("pointwise1", 4, 1, activation="relu"), "its pointwise1 is no pointwise convolut"),
    (
        _exchanged("pointwise1", 4, 1, layout="NHWC"),
        "its pointwise1 cannot be folded: its layout is NHWC; expected .* of layout NCHW",
    ),
    (_exchanged("depthwise", 6, 3), "its depthwise is no depthwise convolution"),
    (own_call, "has a forward of its own"),
    (_other_axis, "its batch_norm1 cannot be folded: normalizes another axis"),
    (lambda made: made.depthwise.register_forward_hook(print), "its depthwise has hooks"),
]


# Whole models.

REPLACED = ["stem", "body.0", "head"]
LEFT = (Left("body.2", "Conv2D", GROUPED), Left("body.3", "Conv2D", other_size((1, 5))))
IMAGES = (2, 4, 9, 10)
LAST = "head"


class Net(HybridBlock):
    """A block with attributes, a container, batch norms, strides, activations and groups."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with self.name_scope():
            self.stem = nn.Conv2D(8, 3, strides=2, in_channels=4, activation="relu")
            self.body = nn.HybridSequential()
            with self.body.name_scope():
                self.body.add(
                    nn.Conv2D(8, 3, padding=1, use_bias=False, in_channels=8),
                    nn.BatchNorm(in_channels=8),
                    nn.Conv2D(8, 3, padding=1, groups=2, in_channels=8),
                    nn.Conv2D(8, (1, 5), padding=(0, 2), in_channels=8),
                )
            self.head = nn.Conv2D(5, 5, padding=2, in_channels=8)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        x = self.stem(x)
        return self.head(x + self.body(x))


class Doubled(package.BSConvU2D):
    """A BSConv that computes something else."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return 2 * super().hybrid_forward(F, x)


def make(kind: str, i: int, o: int, kernel: int, rank: int = 2, **options: Any) -> HybridBlock:
    """Return a layer that takes `i` channels and gives `o`."""
    made = {
        "conv": ORDINARY[rank - 1], "do_conv": DO_LAYERS[rank - 1], "own": Own, "doubled": Doubled,
        "u": LAYERS["u", ORDINARY[rank - 1]], "s": LAYERS["s", ORDINARY[rank - 1]],
    }[kind]  # fmt: skip
    if issubclass(made, ORDINARY) and kind != "do_conv":
        return made(o, kernel, in_channels=i, **options)
    return made(i, o, kernel, **options)


def built(kind: str, i: int, o: int, kernel: int, rank: int = 2, **options: Any) -> HybridBlock:
    return initialized(make(kind, i, o, kernel, rank, **options))


def dense() -> HybridBlock:
    return nn.Dense(2)


def initialized(block: HybridBlock, dtype: str = "float32", ctx: Any = None) -> HybridBlock:
    mx.random.seed(0)
    block.cast(dtype)
    block.initialize(mx.init.Normal(0.5), ctx=ctx)
    return block


def chain(*layers: Any, rank: int = 2) -> HybridBlock:
    """Return a model of layers, each as `make` takes it, or the number of an earlier one."""
    model = nn.HybridSequential()
    for row in layers:
        model.add(model[row] if isinstance(row, int) else make(*row, rank=rank))
    return initialized(model)


def network(dtype: str = "float64", ctx: Any = None, model: Any = None) -> HybridBlock:
    model = model or Net()
    mx.random.seed(0)
    model.cast(dtype)
    model.initialize(mx.init.Normal(0.3), ctx=ctx)
    trained_statistics(model)
    return model


def converted(variant: str = "u", model: Any = None, **options: Any) -> HybridBlock:
    mx.random.seed(4)
    made = package.to_bsconv(model or network(), variant, **options).model
    if options.get("with_bn"):
        trained_statistics(made)
    return made


def at(model: HybridBlock, path: str) -> HybridBlock:
    return dict(walk(model))[path]


def kinds(model: HybridBlock) -> dict[str, str]:
    return {path: type(block).__name__ for path, block in walk(model)}


def parts(layer: HybridBlock) -> list[str]:
    return list(layer._children)


def is_bare(model: HybridBlock) -> bool:
    """Whether nothing of this package is left in the model."""
    return not any(type(block).__module__.startswith("doconv") for _, block in walk(model))


# Networks by name.


def described(network: Any, **options: Any) -> HybridBlock:
    model = package.build(network, **options)
    model.initialize()
    return model


def empty(network: Any) -> HybridBlock:
    """Return the network without values."""
    return package.build(network)


def trainable(model: HybridBlock) -> int:
    """Return the number of what is trained."""
    parameters = model.collect_params().values()
    return sum(prod(p.shape) for p in parameters if p.grad_req != "null")


inference = forward


def network_gradients(
    model: HybridBlock, x: np.ndarray, dy: np.ndarray, *, training: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the output, and the gradients of `sum(output · dy)`, as a state's."""
    _use_statistics(model, not training)
    with autograd.record():
        output = model(array(x))
    output.backward(array(dy))
    _use_statistics(model, False)
    for parameter in model.collect_params().values():
        if parameter.grad_req != "null":
            parameter.set_data(parameter.grad())
    return output.asnumpy(), dict(package.export_state(model).arrays)


def _use_statistics(model: HybridBlock, use: bool) -> None:
    """Let batch norms compute as in inference, or not, also where gradients are recorded.

    Instead of `record(train_mode=False)`, in which MXNet's max pooling has no right gradient.
    """

    def tell(block: HybridBlock) -> None:
        if isinstance(block, nn.BatchNorm):
            block._kwargs["use_global_stats"] = use

    model.apply(tell)

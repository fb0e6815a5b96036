"""The contract in MXNet Gluon: layers, chains of them, and networks by description."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import doconv_mx as package  # before MXNet, which it makes importable

# isort: split
import mxnet as mx
import numpy as np
from contract import Case, Results, snapshot
from mxnet import autograd
from mxnet.gluon import HybridBlock, Trainer, nn

from doconv_mx import surgery, tree
from doconv_mx.bsconv import BSCONVS
from doconv_mx.dgc import DynamicHeads2D

LAYERS = (package.DOConv1D, package.DOConv2D, package.DOConv3D)
ORDINARY = (nn.Conv1D, nn.Conv2D, nn.Conv3D)
WORDS = {
    "stride": "strides", "dilation": "dilation", "out": "channels", "padding": "padding",
    "eps": "epsilon", "wrong": "eps", "norms": "momentum, epsilon", "d": "D",
    "sequential": "HybridSequential", "call": "forward", "conv": "mxnet.gluon.nn.Conv2D",
    "module": "mxnet.gluon.Block", "root": "Network", "none": "Dropout",
}  # fmt: skip
DOUBLE, EXACT = "float64", 1e-12
HALF_TYPES = ("float16",)
REFUSE_OWN_CALLS = ("keep", "merge", "dense")
types = {
    "conv": "Conv2D", "do_conv": "DOConv2D", "norm": "BatchNorm", "own": "Own",
    "transposed": "Conv2DTranspose",
}  # fmt: skip
copied, walk = surgery.copied, lambda model: dict(tree.walk(model))


class Own(nn.Conv2D):
    """A convolution that may compute something else."""


class Doubled(package.BSConvU2D):
    """A BSConv that computes something else."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return 2 * super().hybrid_forward(F, x)


class DoubledDO(package.DOConv2D):
    """A DO layer that computes something else."""

    def hybrid_forward(self, F: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().hybrid_forward(F, x, *args, **kwargs)


class DoubledEagerly(package.DOConv2D):
    """A DO layer that computes something else."""

    def forward(self, x: Any, *args: Any) -> Any:
        return 2 * super().forward(x, *args)


class Named(package.DOConv2D):
    """A DO layer that computes the same."""


OTHERS = {DoubledDO: "forward", DoubledEagerly: "forward"}


def pads(case: Case) -> bool:
    """Whether Gluon's layer can pad like the case: with zeros, alike on both sides."""
    return case.symmetric and case.padding_mode == "zeros"


def initialized(block: HybridBlock, dtype: str = "float32", ctx: Any = None) -> HybridBlock:
    mx.random.seed(0)
    block.cast(dtype)
    block.initialize(mx.init.Normal(0.5), ctx=ctx)
    return block


def make(
    kind: str, i: int, o: int, kernel: Any, rank: int = 2, dtype: str = "float32", **options: Any
) -> HybridBlock:
    conv = ORDINARY[rank - 1]
    if kind in ("norm", "relu"):
        made = nn.BatchNorm(in_channels=i) if kind == "norm" else nn.Activation("relu")
    elif kind in ("conv", "own", "transposed", "patched"):
        cls = {"own": Own, "transposed": nn.Conv2DTranspose}.get(kind, conv)
        made = cls(o, kernel, in_channels=i, **options)
        if kind == "patched":
            made.hybrid_forward = made.hybrid_forward
    else:
        cls = {"do_conv": LAYERS[rank - 1], "doubled": Doubled}.get(kind, kind)
        made = (BSCONVS.layers[kind, conv] if isinstance(cls, str) else cls)(
            i, o, kernel, **options
        )
    return initialized(made, dtype)


def build(case: Case, dtype: str = "float32", kind: str | None = None) -> HybridBlock:
    spec, kind = case.spec, kind or case.kind
    padding = tuple(before for before, _ in case.padding)
    return make(
        kind, spec.in_channels, spec.out_channels, spec.kernel_size, spec.rank, dtype,
        strides=case.stride, padding=padding, dilation=case.dilation, use_bias=case.bias,
        **case.options(kind, WORDS["eps"]),
    )  # fmt: skip


def ordinary_type(case: Case) -> type:
    return ORDINARY[case.spec.rank - 1]


def dynamic(case: Any) -> HybridBlock:
    spec = case.spec
    return initialized(package.DGConv2D(
        spec.in_channels, spec.out_channels, spec.kernel_size, case.stride, case.padding,
        case.dilation, **case.sizes,
    ))  # fmt: skip


def lasso(model: HybridBlock, x: np.ndarray, weight: float) -> float:
    """Return what the gradients that `gradients` gives are of: no loss of Gluon's has it."""
    package.add_saliency_lasso(model, weight)
    heads, z = model.heads, array(x)
    with autograd.train_mode():
        z = model.relu(model.norm(z))
    names = ("squeeze_weight", "saliency_weight", "saliency_bias")
    saliency = heads.saliency(mx.nd, z, *(getattr(heads, name).data() for name in names))
    return weight * saliency.mean(axis=(0, 2)).sum().asscalar()


def take_over(case: Case, conv: HybridBlock) -> HybridBlock:
    multiplier = case.spec.depth_multiplier
    return LAYERS[case.spec.rank - 1].from_conv(conv, depth_multiplier=multiplier)


def chain(*layers: Any, rank: int = 2, **options: Any) -> HybridBlock:
    model = nn.HybridSequential()
    for row in layers:
        model.add(model[row] if isinstance(row, int) else make(*row, rank=rank, **options))
    return model


def described(network: Any, dtype: str = "float32", **options: Any) -> HybridBlock:
    model = package.build(network, **options)
    for block in walk(model).values():
        if isinstance(block, DynamicHeads2D):
            block.lasso = 0
    model.cast(dtype)
    model.initialize()
    return model


def empty(network: Any) -> HybridBlock:
    return package.build(network)


def round_trip(layer: HybridBlock, new: HybridBlock, x: Any, folder: Path) -> HybridBlock:
    layer.save_parameters(str(folder / "layer.params"))
    new.load_parameters(str(folder / "layer.params"))
    return new


def array(values: np.ndarray) -> mx.nd.NDArray:
    # Not mx.nd.array, which uses names that SciPy has deprecated.
    return mx.nd.from_numpy(np.array(values, order="C"))


def forward(model: HybridBlock, x: np.ndarray) -> np.ndarray:
    return _call(model, array(x)).asnumpy()


def gradients(
    model: HybridBlock,
    x: np.ndarray,
    dy: np.ndarray,
    training: bool = False,
    composed: bool = False,
    lasso: float = 0.0,
) -> Results:
    inputs = array(x)
    if lasso:
        package.add_saliency_lasso(model, lasso / len(x))  # of each image
    inputs.attach_grad()
    _use_statistics(model, not training)
    with autograd.record():
        output = (_by_kernel if composed else _call)(model, inputs)
    output.backward(array(dy))
    _use_statistics(model, False)
    return Results(output.asnumpy(), inputs.grad.asnumpy(), _gradients(model))


def _call(model: HybridBlock, x: mx.nd.NDArray) -> mx.nd.NDArray:
    """Return the output; in float16, of which MXNet's CPU computes no convolution at all, that of
    the kernel composed by the layer in float16, convolved in float32 and rounded.
    """
    if x.dtype != np.float16:
        return model(x)
    kernel = model.composed_kernel() if hasattr(model, "composed_kernel") else model.weight.data()
    given = (x, kernel) if model.bias is None else (x, kernel, model.bias.data())
    return mx.nd.Convolution(*(a.astype("float32") for a in given), **model._kwargs).astype(x.dtype)


def _use_statistics(model: HybridBlock, use: bool) -> None:
    """Let batch norms compute as in inference, or not, also where gradients are recorded.

    Instead of `record(train_mode=False)`, in which MXNet's max pooling has no right gradient.
    """
    for block in walk(model).values():
        if isinstance(block, nn.BatchNorm):
            block._kwargs["use_global_stats"] = use


def _by_kernel(layer: HybridBlock, x: Any) -> Any:
    kernel, options = layer.composed_kernel(), layer.depthwise._kwargs
    return mx.nd.Convolution(
        x, kernel, layer.bias.data(), kernel=kernel.shape[2:], num_filter=kernel.shape[0],
        stride=options["stride"], dilate=options["dilate"],
    )  # fmt: skip


def penalty(model: HybridBlock, alpha: float = 0.1) -> tuple[float, dict[str, np.ndarray]]:
    with autograd.record():
        loss = package.orthonormality_loss(model, alpha)
    loss.backward()
    return loss.asscalar(), _gradients(model)


def _gradients(model: HybridBlock) -> dict[str, np.ndarray]:
    """Return the gradients of the parameters, by their names in a state."""
    state = snapshot(package, model)
    for parameter in model.collect_params().values():
        if parameter.grad_req != "null":
            parameter.set_data(parameter.grad())
    found = snapshot(package, model).arrays
    package.load_state(model, state)
    return found


def descend(
    model: HybridBlock, x: np.ndarray, target: np.ndarray, alpha: float, rates: Iterable[float]
) -> None:
    x, target = array(x), array(target)
    model.hybridize()
    trainer = Trainer(model.collect_params(), "sgd")
    for rate in rates:
        trainer.set_learning_rate(rate)
        with autograd.record():
            loss = ((model(x) - target) ** 2).mean() + package.orthonormality_loss(model, alpha)
        loss.backward()
        trainer.step(1)


def composed_kernel(layer: HybridBlock) -> tuple[np.ndarray, str]:
    kernel = layer.composed_kernel().asnumpy()
    return kernel, kernel.dtype.name


def is_ordinary(layer: HybridBlock, form: str) -> bool:
    if form == "dense":
        return type(layer) in ORDINARY
    types = {type(block) for block in walk(layer).values()}
    if form == "merge":
        parts = list(layer._children)
        return types <= {nn.HybridSequential, *ORDINARY} and parts == ["pointwise", "depthwise"]
    return types <= {nn.HybridSequential, *ORDINARY, nn.BatchNorm}


def dtypes(layer: HybridBlock) -> set[str]:
    return {p.data().asnumpy().dtype.name for p in layer.collect_params().values()}


def trainable(model: HybridBlock) -> int:
    parameters = model.collect_params().values()
    return sum(prod(p.shape) for p in parameters if p.grad_req != "null")


def entries(layer: HybridBlock) -> dict[str, Any]:
    return dict(layer._collect_params_with_prefix())


def freeze(parameter: Any) -> None:
    parameter.grad_req = "null"


def is_trained(parameter: Any) -> bool:
    return parameter.grad_req == "write"


def drawn_after(call: Callable[[], Any]) -> Any:
    mx.random.seed(0)
    call()
    return mx.nd.random.uniform(shape=3)


def _subclassed(made: HybridBlock) -> None:
    made.register_child(Own(6, 3, groups=6, in_channels=6), "depthwise")
    vars(made)["depthwise"] = made._children["depthwise"]


def _other(name: str, i: int, *arguments: Any, **options: Any) -> Any:
    conv = initialized(nn.Conv2D(*arguments, in_channels=i, **options))
    return lambda made: setattr(made, name, conv)


def own_call(made: HybridBlock) -> None:
    made.forward = made.forward


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
    (_other("pointwise1", 8, 4, 1, 2), "its pointwise1 is no pointwise convolution of stride"),
    (_other("pointwise1", 8, 4, 3), "its pointwise1 is no pointwise convolution of stride 1"),
    (_other("pointwise1", 8, 4, 1, activation="relu"), "pointwise1 is no pointwise convolution"),
    (
        _other("pointwise1", 8, 4, 1, layout="NHWC"),
        "its pointwise1 cannot be folded: its layout is NHWC; expected .* of layout NCHW",
    ),
    (_other("depthwise", 6, 6, 3), "its depthwise is no depthwise convolution"),
    (own_call, "has a forward of its own"),
    (
        lambda made: setattr(made, "batch_norm1", nn.BatchNorm(axis=2, in_channels=7)),
        "its batch_norm1 cannot be folded: normalizes another axis",
    ),
    (lambda made: made.depthwise.register_forward_hook(print), "its depthwise has hooks"),
]

"""What `training_step.py` measures in Gluon, hybridized. Run by it, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from step_cases import TUTORIAL, LayerCase, ModelCase
from step_measure import Row, figure, measure

from doconv_core import ConvSpec
from doconv_mx import DOConv2D, fold, get_model, import_gluoncv, over_parameterize, verify

import_gluoncv()

import gluoncv  # noqa: E402
import mxnet as mx  # noqa: E402
from gluoncv import model_zoo  # noqa: E402
from mxnet.gluon import nn  # noqa: E402

NAME = "Gluon"
CONVS = {1: nn.Conv1D, 2: nn.Conv2D, 3: nn.Conv3D}
NETWORKS = {
    "ResNet-18": "resnet18_v1",
    "ResNet-50": "resnet50_v1b",
    "MobileNetV2": "mobilenetv2_1.0",
}
LARGEST = "resnet152_v1"


def version() -> str:
    """Return the framework's version."""
    return f"MXNet {mx.__version__}, GluonCV {gluoncv.__version__}"


def formula(F: Any, weight: Any, depthwise: Any, spec: ConvSpec, *_: Any) -> Any:
    """Return the kernel by the plain formula: the identity added to D, W expanded, and a sum.

    It takes the arguments of `doconv_mx.compose.compose`; layouts and types are those measured.
    """
    g, o, taps = spec.groups, spec.out_channels_per_group, spec.taps
    unit = F.reshape(F.one_hot(F.arange(taps), taps), shape=(1, taps, taps))
    d = F.reshape(F.broadcast_add(depthwise, unit), shape=(g, 1, -1, taps, taps))
    w = F.reshape(weight, shape=(g, o, -1, 1, taps))
    kernel = F.sum(F.broadcast_mul(w, d), axis=-1)
    return F.reshape(kernel, shape=(spec.out_channels, -1, *spec.kernel_size))


@contextmanager
def by_formula() -> Iterator[None]:
    """Let the DO layers that are called first in this block take the plain formula."""
    with patch("doconv_mx.do_conv.compose", formula):
        yield


def moved(network: Any) -> Any:
    """Return the network with a D that is not zero, as after some training."""
    for name, parameter in network.collect_params().items():
        if name.endswith("depthwise_weight"):
            parameter.set_data(mx.nd.random.normal(scale=0.02, shape=parameter.shape))
    return network


def _ways(plain: Any, step: Callable[[Any], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Return the step of an ordinary network, of the plain formula's, and of ours."""
    ways = {}
    for name in ("plain", "formula", "ours"):
        network = plain if name == "plain" else moved(over_parameterize(plain)[0])
        network.hybridize(static_alloc=True)
        way = step(network)
        if name == "formula":
            with by_formula():
                way()  # the graph is made by the first call
        else:
            way()
        ways[name] = way
    return ways


def layers(cases: Iterable[LayerCase], patience: float) -> Iterable[Row]:
    """Yield a row for each layer, hybridized: forward and backward, the input's gradient too."""
    for case in cases:
        x = mx.nd.random.normal(shape=(case.batch, case.in_channels, *(case.size,) * case.rank))
        x.attach_grad()
        plain = nn.HybridSequential()
        plain.add(
            CONVS[case.rank](
                case.out_channels, case.kernel, padding=case.kernel // 2, groups=case.groups,
                use_bias=False, in_channels=case.in_channels,
            )
        )  # fmt: skip
        plain.initialize()
        gradient = mx.nd.random.normal(shape=plain(x).shape)

        def step(network: Any, x: Any = x, gradient: Any = gradient) -> Callable[[], None]:
            def call() -> None:
                with mx.autograd.record():
                    y = network(x)
                y.backward(gradient)
                mx.nd.waitall()

            return call

        yield measure(NAME, "layer", case.name, _ways(plain, step), patience)


def models(cases: Iterable[ModelCase], patience: float) -> Iterable[Row]:
    """Yield a row for each network, hybridized: a training step with SGD and momentum."""
    for case in cases:
        ways = _ways(_network(case), lambda network, case=case: _model_step(network, case))
        yield measure(NAME, "training step", case.name, ways, patience)


def step(way: str, case: ModelCase) -> Callable[[], None]:
    """Return one way's training step, and nothing else in memory."""
    model = _network(case)
    if way != "plain":
        model = moved(over_parameterize(model)[0])
    model.hybridize(static_alloc=True)
    call = _model_step(model, case)
    with by_formula() if way == "formula" else nullcontext():
        call()
    return call


def _network(case: ModelCase) -> Any:
    if case.network == TUTORIAL:
        shape = (3, case.size, case.size)
        return get_model(TUTORIAL, num_classes=1000, in_channels=3, input_shape=shape)
    plain = model_zoo.get_model(NETWORKS[case.network], pretrained=False)
    plain.initialize()
    plain(mx.nd.zeros((1, 3, case.size, case.size))).wait_to_read()
    return plain


def _model_step(network: Any, case: ModelCase) -> Callable[[], None]:
    x = mx.nd.random.normal(shape=(case.batch, 3, case.size, case.size))
    labels = mx.nd.random.randint(0, 1000, shape=case.batch)
    loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = mx.gluon.Trainer(
        network.collect_params(), "sgd", {"learning_rate": 1e-4, "momentum": 0.9}
    )

    def call() -> None:
        with mx.autograd.record():
            error = loss(network(x), labels)
        error.backward()
        trainer.step(len(x))
        mx.nd.waitall()

    return call


def compositions(kernels: Iterable[tuple[int, int]], patience: float) -> Iterable[Row]:
    """Yield a row for each kernel: composing it, forward and backward."""
    for channels_in, channels_out in kernels:
        layer = DOConv2D(channels_in, channels_out, 3, use_bias=False)
        layer.initialize()
        moved(layer)
        weight, depthwise = layer.weight.data(), layer.depthwise_weight.data()
        gradient = mx.nd.random.normal(shape=weight.shape)
        yardstick = _composition(
            lambda w=weight, d=depthwise, s=layer.spec: formula(mx.nd, w, d, s), gradient
        )

        def stream(weight: Any = weight, gradient: Any = gradient) -> None:
            copies = weight + 1, gradient + 1
            mx.nd.waitall()
            del copies

        ways = {
            "formula": yardstick,
            "ours": _composition(layer.composed_kernel, gradient),
            "floor": stream,
        }
        name = f"3×3, {channels_in}→{channels_out}"
        yield measure(NAME, "composition alone", name, ways, patience)


def _composition(compose: Callable[[], Any], gradient: Any) -> Callable[[], None]:
    def step() -> None:
        with mx.autograd.record():
            kernel = compose()
        kernel.backward(gradient)
        mx.nd.waitall()

    return step


def inference(case: ModelCase, patience: float) -> Iterable[Row]:
    """Yield a row for the folded network, and for the unfolded one, hybridized."""
    x = mx.nd.random.normal(shape=(case.batch, 3, case.size, case.size))
    plain = _network(case)
    ours = moved(over_parameterize(plain)[0])
    named = {"plain": plain, "folded": fold(ours)[0], "unfolded": ours}
    ways = {}
    for name, network in named.items():
        network.hybridize(static_alloc=True, static_shape=True)
        ways[name] = lambda network=network: network(x).wait_to_read()
    yield measure(NAME, "inference", case.name, ways, patience)


def tools() -> Iterable[Row]:
    """Yield the seconds that the whole-model tools take on the largest network."""
    plain = model_zoo.get_model(LARGEST, pretrained=False)
    plain.initialize()
    x = mx.nd.random.uniform(shape=(1, 3, 64, 64))
    plain(x).wait_to_read()
    begin = time.perf_counter()
    model, _ = over_parameterize(plain)
    mx.nd.waitall()
    middle = time.perf_counter()
    folded, _ = fold(model)
    mx.nd.waitall()
    end = time.perf_counter()
    assert verify(folded, model, x).absolute == 0
    yield figure(NAME, "over_parameterize, seconds", "ResNet-152", ours=middle - begin)
    yield figure(NAME, "fold, seconds", "ResNet-152", ours=end - middle)

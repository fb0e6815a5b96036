"""BSConv layers and their loss in PyTorch: what the contract does not ask."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import doconv_torch  # noqa: E402
from doconv_core import NotFoldable, orthonormality, orthonormality_gradient  # noqa: E402
from doconv_torch import (  # noqa: E402
    BSConvS,
    BSConvS1d,
    BSConvS2d,
    BSConvU,
    BSConvU2d,
    BSConvU3d,
    DOConv2d,
    mark_orthonormal,
    orthonormality_loss,
    over_parameterize,
    to_bsconv,
)


def layer(cls=BSConvS2d, **options):
    torch.manual_seed(0)
    return cls(8, 6, 3, padding=1, **options)


def x(**options):
    return torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(1), **options)


def two():
    torch.manual_seed(0)
    return nn.Sequential(BSConvS2d(8, 8, 3, padding=1), nn.ReLU(), BSConvS2d(8, 4, 3))


def expected_loss(*layers):
    return sum(orthonormality(s.pointwise1.weight.detach().flatten(1).numpy()) for s in layers)


def test_the_layer_takes_the_place_of_the_ordinary_one():
    arguments = (8, 6, (3, 5), (2, 1), (1, 2), (1, 1), 1, False, "circular")
    made, plain = BSConvU2d(*arguments), nn.Conv2d(*arguments)
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode", "bias",
    ):  # fmt: skip
        assert getattr(made, name) == getattr(plain, name), name
    assert made(x()).shape == plain(x()).shape
    assert (BSConvU, BSConvS) == (BSConvU2d, BSConvS2d)
    assert isinstance(made[0], nn.Conv2d)
    assert list(made[:1]._modules) == ["pointwise"]
    assert type(made[:1]) is nn.Sequential


def test_parts_have_the_options_of_their_layer():
    made = layer(with_bn=True, p=0.5, bn_options={"eps": 0.1, "momentum": 0.3}, dtype=torch.float64)
    names = ["pointwise1", "batch_norm1", "pointwise2", "batch_norm2", "depthwise"]
    assert list(made._modules) == names
    assert (made.batch_norm1.eps, made.batch_norm2.momentum) == (0.1, 0.3)
    assert made.pointwise1.out_channels == 4
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert layer(device="meta").depthwise.weight.is_meta


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (BSConvU2d, {"groups": 2}, ValueError, "BSConvU2d takes groups=1 alone.*groups=2"),
        (BSConvS2d, {"p": 0}, ValueError, "p must be above 0 and at most 1; received p=0"),
        (BSConvS2d, {"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        (BSConvU2d, {"stride": 0}, ValueError, "stride must be at least 1"),
        (BSConvU2d, {"padding": -1}, ValueError, "padding must be at least 0"),
        (BSConvU2d, {"with_bn": None}, TypeError, "with_bn must be True or False"),
        (BSConvU2d, {"bn_options": {"eps": 1}}, ValueError, "give with_bn=True as well"),
        (
            BSConvU2d,
            {"with_bn": True, "bn_options": {"epsilon": 1}},
            TypeError,
            "bn_options may have eps, momentum.*received 'epsilon'",
        ),
    ],
)
def test_arguments_that_give_no_layer_are_refused(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(8, 6, 3, **options)


@pytest.mark.parametrize("cls", [BSConvU2d, BSConvS2d])
@pytest.mark.parametrize("with_bn", [False, True])
def test_copies_pickles_and_state_dicts(cls, with_bn):
    made = layer(cls, with_bn=with_bn)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    loaded = cls(8, 6, 3, padding=1, with_bn=with_bn)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        assert type(other) is cls
        assert other.spec == made.spec
        assert torch.equal(other.eval()(x()), made.eval()(x()))


@pytest.mark.parametrize("cls", [BSConvU2d, BSConvS2d])
def test_the_composed_kernel_is_that_of_the_layer_and_has_its_gradients(cls):
    made = layer(cls, dtype=torch.float64)
    inputs = x(dtype=torch.float64)
    kernel = made.composed_kernel()
    by_kernel = nn.functional.conv2d(inputs, kernel, made.bias, padding=1)
    torch.testing.assert_close(by_kernel, made(inputs), rtol=1e-12, atol=1e-12)
    weights = list(made.parameters())
    for found, expected in zip(
        torch.autograd.grad(by_kernel.square().sum(), weights),
        torch.autograd.grad(made(inputs).square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(NotFoldable, match="with batch norms is no mere kernel; fold"):
        layer(cls, with_bn=True).composed_kernel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_composed_and_folded_with_one_rounding(dtype):
    made = layer(dtype=dtype)
    exact = copy.deepcopy(made).double().composed_kernel()
    kernel = made.fold(form="dense").weight
    assert kernel.dtype == made.composed_kernel().dtype == dtype
    assert torch.equal(kernel, exact.to(dtype))
    torch.testing.assert_close(made.composed_kernel(), kernel)


def test_compiled_and_under_autocast():
    made = layer(with_bn=True)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x()), copy.deepcopy(made)(x()))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x()).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
def test_folding_keeps_mode_dtype_and_what_is_trainable(form):
    made = layer(dtype=torch.float64).eval().requires_grad_(False)
    folded = made.fold(form=form)
    assert not any(module.training for module in folded.modules())
    assert {(p.dtype, p.requires_grad) for p in folded.parameters()} == {(torch.float64, False)}
    assert layer(device="meta").fold(form=form).state_dict().keys()
    torch.testing.assert_close(folded(x(dtype=torch.float64)), made(x(dtype=torch.float64)))


def hooked(made):
    made.pointwise1.register_forward_hook(lambda *_: None)


def subclassed(made):
    made.depthwise = type("Own", (nn.Conv2d,), {})(6, 6, 3, padding=1, groups=6)


def renamed(made):
    made.add_module("more", nn.ReLU())


def strided(made):
    made.pointwise1 = nn.Conv2d(8, 4, 1, stride=2)


def widened(made):
    made.pointwise1 = nn.Conv2d(8, 4, 3)


def own_forward(made):
    made.forward = made.forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "its pointwise1 has hooks, which would see other values; remove them first"),
        (subclassed, "its depthwise cannot be folded: it is a Own; expected a torch.nn.Conv2d"),
        (renamed, "its parts are pointwise1, batch_norm1, .*, more; expected pointwise1"),
        (strided, "its pointwise1 is no pointwise convolution of stride 1"),
        (widened, "its pointwise1 is no pointwise convolution of stride 1"),
        (own_forward, "has a forward of its own"),
        (
            lambda made: made.train(),
            "batch_norm1 cannot be folded: in training mode; call mod",
        ),
        (lambda made: made.depthwise.register_forward_hook(print), "its depthwise has hooks"),
    ],
)
def test_what_may_compute_something_else_is_not_folded(change, message):
    made = layer(with_bn=True, padding_mode="reflect").eval()
    change(made)
    with pytest.raises(NotFoldable, match=message):
        made.fold(form="dense")


def test_a_layer_with_a_forward_of_its_own_is_not_folded_in_any_form():
    made = layer().eval()
    own_forward(made)
    for form in ("keep", "merge", "dense"):
        with pytest.raises(NotFoldable, match="has a forward of its own"):
            made.fold(form=form)


def test_folding_says_which_forms_there_are():
    with pytest.raises(ValueError, match="form must be one of 'keep', 'merge', 'dense'"):
        layer().fold(form="deploy")
    with pytest.raises(NotFoldable, match=r"meets zero padding .* use form='merge'"):
        layer(with_bn=True).eval().fold(form="dense")


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
def test_the_depthwise_part_may_be_a_do_layer(form):
    made = over_parameterize(layer(dtype=torch.float64)).model
    assert type(made.depthwise) is DOConv2d
    nn.init.normal_(made.depthwise.depthwise_weight, std=0.1)
    inputs = x(dtype=torch.float64)
    torch.testing.assert_close(
        nn.functional.conv2d(inputs, made.composed_kernel(), made.bias, padding=1), made(inputs)
    )
    folded = made.fold(form=form)
    assert not any(isinstance(module, DOConv2d) for module in folded.modules())
    torch.testing.assert_close(folded(inputs), made(inputs), rtol=1e-12, atol=1e-12)


def test_from_conv_says_what_it_takes():
    with pytest.raises(TypeError, match=r"BSConvU2d.from_conv takes over a torch.nn.Conv2d"):
        BSConvU2d.from_conv(nn.Conv1d(4, 4, 3))
    with pytest.raises(ValueError, match=r"takes groups=1 alone.*received groups=2"):
        BSConvU2d.from_conv(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="start must be one of 'weights', 'random'"):
        BSConvU2d.from_conv(nn.Conv2d(4, 4, 3), start="zeros")


@pytest.mark.parametrize("with_bn", [False, True])
def test_from_conv_starts_from_the_weights(with_bn):
    conv = layer(BSConvU3d, dtype=torch.float64).fold(form="dense")
    found = BSConvU3d.from_conv(conv, with_bn=with_bn, bn_options={"eps": 1e-9} if with_bn else {})
    assert found.explained == pytest.approx(1)
    inputs = torch.randn(1, 8, 4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(found.eval()(inputs), conv(inputs), rtol=1e-7, atol=1e-7)
    assert BSConvU3d.from_conv(conv, start="random").explained is None


def test_the_loss_and_its_gradient_are_the_cores():
    model = two()
    loss = orthonormality_loss(model, alpha=0.5)
    assert loss.item() == pytest.approx(0.5 * expected_loss(model[0], model[2]), rel=1e-6)
    loss.backward()
    weight = model[0].pointwise1.weight
    gradient = 0.5 * orthonormality_gradient(weight.detach().flatten(1).numpy())
    np.testing.assert_allclose(weight.grad.flatten(1).numpy(), gradient, rtol=1e-5, atol=1e-6)
    assert model[0].pointwise2.weight.grad is None


def test_the_gradient_of_orthonormal_rows_is_zero():
    made = layer(dtype=torch.float64)
    with torch.no_grad():
        made.pointwise1.weight.copy_(torch.eye(4, 8).reshape(4, 8, 1, 1))
    orthonormality_loss(made).backward()
    assert torch.equal(made.pointwise1.weight.grad, torch.zeros(4, 8, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_the_loss_sees_through_wrappers(wrap):
    model = two()
    loss = orthonormality_loss(wrap(model))
    assert torch.equal(loss, orthonormality_loss(model))
    loss.backward()
    assert model[0].pointwise1.weight.grad is not None


# One of two processes, which trains on its half of the batch.
PROCESS = """
import sys, torch
from torch import distributed, nn
from doconv_torch import BSConvS2d, orthonormality_loss

rank, folder = int(sys.argv[1]), sys.argv[2]
store = distributed.FileStore(f"{folder}/store", 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = nn.Sequential(BSConvS2d(8, 8, 3, padding=1), nn.ReLU(), BSConvS2d(8, 4, 3))
x, values = torch.load(f"{folder}/given.pt")
model.load_state_dict(values)
wrapped = nn.parallel.DistributedDataParallel(model)
loss = wrapped(x[rank : rank + 1]).square().mean() + orthonormality_loss(wrapped)
loss.backward()
torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_one(tmp_path):
    model, inputs = two(), x()
    torch.save((inputs, model.state_dict()), tmp_path / "given.pt")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    (model(inputs).square().mean() + orthonormality_loss(model)).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_the_loss_is_computed_in_float32_at_least():
    model, inputs = two(), x()
    expected = orthonormality_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs)
        assert torch.equal(orthonormality_loss(model), expected)
    half = copy.deepcopy(model).bfloat16()
    found = orthonormality_loss(half)
    assert found.dtype == torch.float32
    assert torch.equal(found, orthonormality_loss(half.float()))
    assert orthonormality_loss(two().double()).dtype == torch.float64


def test_the_loss_is_compiled_with_the_step():
    model = two()

    def step(inputs):
        return model(inputs).mean() + orthonormality_loss(model)

    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), step(x()))


def test_marked_convolutions_count_once_wherever_they_are():
    linear = mark_orthonormal(nn.Conv2d(6, 4, 1, bias=False))
    model = nn.ModuleDict({"a": linear, "b": linear, "plain": nn.Conv2d(4, 4, 1)})
    expected = orthonormality(linear.weight.detach().flatten(1).numpy())
    assert orthonormality_loss(model, 1).item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(orthonormality_loss(copy.deepcopy(model)), orthonormality_loss(model))
    both = nn.Sequential(two(), linear)
    mark_orthonormal(both[0][0].pointwise1)  # which counts already
    sum_of_parts = orthonormality_loss(both[0]) + orthonormality_loss(linear)
    torch.testing.assert_close(orthonormality_loss(both), sum_of_parts)


def test_a_marked_convolution_that_becomes_a_bsconv_u_counts_no_more():
    model = nn.Sequential(mark_orthonormal(nn.Conv2d(6, 4, 1)), two())
    replaced = to_bsconv(model, kernel_sizes=(1,)).model
    assert isinstance(replaced[0], BSConvU2d)
    assert torch.equal(orthonormality_loss(replaced), orthonormality_loss(model[1]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: orthonormality_loss(nn.Conv2d(4, 4, 1)),
            ValueError,
            "the Conv2d has no weight",
        ),
        (
            lambda: orthonormality_loss(layer(BSConvU2d)),
            ValueError,
            "neither a BSConvS1d, BSC",
        ),
        (
            lambda: orthonormality_loss([]),
            TypeError,
            "must be a torch.nn.Module; received list",
        ),
        (lambda: orthonormality_loss(two(), "1"), TypeError, "alpha must be a number; received"),
        (lambda: orthonormality_loss(two(), float("inf")), ValueError, "alpha must be finite"),
        (lambda: mark_orthonormal(nn.Linear(2, 2)), TypeError, "takes a convolution; received Lin"),
        (
            lambda: mark_orthonormal(nn.Conv2d(4, 4, 3)),
            ValueError,
            r"kernel_size=\(3, 3\)",
        ),
        (lambda: mark_orthonormal(nn.Conv1d(4, 4, 1, groups=2)), ValueError, "received .*groups=2"),
    ],
)
def test_what_has_no_loss_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("alpha", [0.1, 0])
def test_training_with_the_loss_makes_the_rows_orthonormal(alpha):
    torch.manual_seed(0)
    model = nn.Sequential(
        BSConvS1d(8, 6, 3, p=0.5, with_bn=True), nn.ReLU(), BSConvS1d(6, 4, 3, p=0.5)
    )
    inputs, target = torch.randn(16, 8, 9), torch.randn(16, 4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), target) + orthonormality_loss(model, alpha)
        loss.backward()
        optimizer.step()
        schedule.step()
    for trained in (model[0], model[2]):
        w = trained.pointwise1.weight.detach().flatten(1)
        off = (w @ w.T - torch.eye(len(w))).abs().max()
        assert off <= 1e-5 if alpha else off > 0.5


def test_the_package_has_every_name():
    assert {"BSConvU", "BSConvS", "to_bsconv", "mark_orthonormal"} <= set(doconv_torch.__all__)

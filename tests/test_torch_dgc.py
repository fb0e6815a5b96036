"""Dynamic group convolutions in PyTorch: what only PyTorch has."""

from __future__ import annotations

import copy
import pickle

from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import functional_call, grad, vmap  # noqa: E402

from doconv_torch import DGConv2d, saliency_lasso, set_progress  # noqa: E402

SAME = torch.testing.assert_close


def two():
    """Return two layers, of which one has a kernel for each image and one a map for each head."""
    torch.manual_seed(0)
    layers = DGConv2d(16, 64, 3, stride=2, padding=1), DGConv2d(64, 8, 1, heads=2)
    for layer in layers:
        nn.init.normal_(layer.heads.saliency_bias, 1, 0.5)
    net = nn.Sequential(*layers)
    set_progress(net, 0.5)
    return net


def x(batch=4):
    return torch.randn(batch, 16, 6, 6, generator=torch.Generator().manual_seed(1))


def test_copies_after_a_pass_are_whole_and_have_no_graph():
    net = two()
    net(x())
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert copied[0].heads.lasso is None
        assert torch.equal(copied.eval()(x()), net.eval()(x()))
        net.train()


def test_one_graph_has_the_lasso_and_any_progress():
    net, plain = two(), two()

    def step(model, inputs):
        return model(inputs).square().mean() + saliency_lasso(model, 0.1)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for progress in (0.5, 1):
        for function, model in ((compiled, net), (step, plain)):
            set_progress(model, progress)
            function(model, x()).backward()
    SAME([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_other_types_devices_and_memory_formats():
    expected = two()(x())
    net = two()
    with torch.autocast("cpu", torch.bfloat16):
        found, lasso = net(x()), saliency_lasso(net)
    assert (found.dtype, lasso.dtype) == (torch.bfloat16, torch.float32)
    SAME(found.float(), expected, rtol=0.05, atol=0.05)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        net = two().to(dtype)
        assert net(x().to(dtype)).dtype == dtype
        assert net[0].heads.inactive == 8
    net = two().to(memory_format=torch.channels_last)
    SAME(net(x().contiguous(memory_format=torch.channels_last)), expected)
    assert net.eval()(x(0)).shape == (0, 8, 3, 3)
    made = DGConv2d(16, 64, 3, device="meta")
    assert made(torch.empty(2, 16, 6, 6, device="meta")).shape == (2, 64, 4, 4)


def test_gradients_for_each_image_at_once():
    net = two().eval()
    values, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(values, image):
        return functional_call(net, (values, buffers), (image[None],)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(values, x())
    for n, image in enumerate(x()):
        each = torch.autograd.grad(loss(values, image), [*values.values()])
        SAME([gradient[n] for gradient in found.values()], [*each])

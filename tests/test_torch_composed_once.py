"""PyTorch: kernels composed once in a block have the values and gradients of no block at all."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import CheckpointError, checkpoint  # noqa: E402
from torch_models import batch, compositions, gradients, images, layer, network, output, trained  # noqa: E402

from doconv_torch import DOConv2d, composed_once, over_parameterize  # noqa: E402

LAYERS = pytest.mark.parametrize(
    ("multiplier", "groups"), [(None, 1), (None, 2), (None, 4), (12, 2), (18, 1), (20, 4)]
)


def of_both(model, run):
    """Assert that a block changes no gradient of a run; return them, and the compositions in it."""
    run()
    expected = gradients(model)
    model.zero_grad()
    with compositions() as calls, composed_once(model):
        run()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-12, atol=1e-12)
    return expected, len(calls)


@LAYERS
def test_micro_batches_add_the_gradients_of_no_block(multiplier, groups):
    model = layer(multiplier, groups)

    def run():
        for seed in range(3):
            model(batch(seed)).square().sum().backward()
            assert model.depthwise_weight.grad is not None

    assert of_both(model, run)[1] == 1


@LAYERS
def test_recurrent_use_with_a_backward_after_the_block(multiplier, groups):
    model = layer(multiplier, groups)

    def unrolled():
        return model(model(model(batch()).tanh()).tanh())

    expected = unrolled()
    expected.sum().backward()
    gradient = gradients(model)
    model.zero_grad()
    with compositions() as calls, composed_once(model):
        found = unrolled()
    assert len(calls) == 1
    assert torch.equal(found, expected)
    found.sum().backward()
    torch.testing.assert_close(gradients(model), gradient, rtol=1e-12, atol=1e-12)


@LAYERS
def test_gradients_of_gradients(multiplier, groups):
    model, names = layer(multiplier, groups), ("weight", "depthwise_weight")

    def of(model, x):
        y = model(model(x)).square().sum()
        parameters = [getattr(model, name) for name in names]
        first = torch.autograd.grad(y, [x, *parameters], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return torch.autograd.grad(penalty, [x, *parameters])

    x = batch().requires_grad_()
    expected = of(model, x)
    with composed_once(model):
        found = of(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_whole_model_and_its_accumulated_step():
    model = trained(over_parameterize(network())[0])
    other = copy.deepcopy(model)
    for model_, block in ((model, False), (other, True)):
        optimizer = torch.optim.SGD(model_.parameters(), lr=0.01)
        for _ in range(2):
            with compositions() as calls, composed_once(model_) if block else nullcontext():
                for count in (2, 3):
                    output(model_, images(count)).square().mean().backward()
            assert len(calls) == (6 if block else 12)
            optimizer.step()
            optimizer.zero_grad()
    found = list(other.parameters())
    torch.testing.assert_close(found, list(model.parameters()), rtol=1e-4, atol=1e-6)


def test_partly_frozen_layers():
    for frozen in ("weight", "depthwise_weight"):
        model, other = layer(), "depthwise_weight" if frozen == "weight" else "weight"
        getattr(model, frozen).requires_grad_(False)
        assert other in of_both(model, lambda model=model: model(batch()).sum().backward())[0]


@pytest.mark.parametrize("backward_under_autocast", [False, True])
def test_autocast(backward_under_autocast):
    model, x = layer(dtype=torch.float32), batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
    expected.float().sum().backward()
    gradient = gradients(model)
    model.zero_grad()
    with composed_once(model):
        full = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(x)
            assert model.composed_kernel().dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_under_autocast):
            found.float().sum().backward()
    assert full.dtype == torch.float32
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradients(model), gradient, rtol=1e-6, atol=1e-6)


def test_functional_calls_and_transforms():
    model, x = layer(), batch()
    parameters = {name: 2 * p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def results():
        return [
            torch.func.functional_call(model, parameters, (x,)),
            *torch.func.grad(loss)(parameters, x).values(),
            *torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None]).values(),
            torch.func.vmap(model)(x),
            torch.func.grad(lambda x: model(x).square().sum())(x),
            torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
            torch.func.jacrev(lambda w: loss({**parameters, "weight": w}, x))(model.weight),
        ]

    expected = results()
    with composed_once(model):
        cold = results()
        model(x)
        warm = results()
        assert torch.equal(model(x), model.fold()(x))
    for found in (cold, warm):
        torch.testing.assert_close(found, expected)


def test_compiled_traced_and_exported_calls():
    model, x = layer(dtype=torch.float32), batch(dtype=torch.float32)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with composed_once(model):
        model(x)
        torch.testing.assert_close(compiled(x), expected)
        compiled(x).sum().backward()
        traced, exported = torch.jit.trace(model, x), torch.export.export(model, (x,)).module()
        nn.init.ones_(model.depthwise_weight)
        changed = model(x)
        assert not torch.allclose(changed, expected)
        torch.testing.assert_close(compiled(x), changed)
    torch.testing.assert_close(traced(x), changed)
    torch.testing.assert_close(exported(x), changed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls(reentrant):
    model = nn.Sequential(layer(), nn.Tanh(), layer())

    def run():
        for seed in range(2):
            x = batch(seed).requires_grad_()
            y = checkpoint(model, checkpoint(model, x, use_reentrant=reentrant),
                           use_reentrant=reentrant)  # fmt: skip
            y.square().sum().backward()

    of_both(model, run)


def test_a_checkpoint_recomputed_after_the_block_is_refused_by_pytorch():
    model = layer()
    with composed_once(model):
        y = checkpoint(model, batch().requires_grad_(), use_reentrant=False)
    with pytest.raises(CheckpointError):
        y.sum().backward()


def test_saved_tensor_hooks_and_anomaly_mode():
    model = layer()
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True, False):
        of_both(model, lambda: model(batch()).sum().backward())


def test_replicas_and_parametrized_layers_compose_as_usual():
    model, x = layer(), batch()
    replica = model._replicate_for_data_parallel()
    for name, parameter in model.named_parameters():
        setattr(replica, name, (2 * parameter.detach()).requires_grad_())
    normed = nn.utils.parametrizations.weight_norm(layer())
    with composed_once(nn.ModuleList([model, normed])):
        model(x)
        copies = [replica(x), replica(x)]
        assert not torch.equal(copies[0], model(x))
        assert torch.equal(copies[0], copies[1])
        normed(x).sum().backward()
        normed(x).sum().backward()
        with torch.no_grad():
            normed.parametrizations.weight.original0.mul_(2)
        assert torch.equal(normed(x), normed.fold()(x))


def test_the_meta_device_and_one_tap():
    model = nn.Sequential(
        layer(device="meta"), DOConv2d(4, 4, 1, device="meta", dtype=torch.float64)
    )
    with composed_once(model):
        model(batch(device="cpu").to("meta")).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_no_model_is_refused():
    message = r"model must be a torch\.nn\.Module; received dict"
    with pytest.raises(TypeError, match=message), composed_once({}):
        pass
